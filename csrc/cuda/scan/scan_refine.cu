// A later level of the index for the rows that are left. `parts` blocks share a query's list, and each warp
// takes kAtOnce rows at a time, whose coordinates k1 .. k2 of `fine` its lanes read together. Adds them to
// the rows' bounds, and takes away the bands b1 .. b2 that they replace. MK_FINE: how coordinates are stored.
#include "scan/query.h"

namespace memokern {
namespace cuda {

enum { kAtOnce = 4 };

// What a lane adds to the bounds of some rows.
MK_DEVICE void add_lane_parts(const ScanParams& p, const float* x, const i64 (&n)[kAtOnce],
                              float (&sum)[kAtOnce]) {
  for (i64 k = p.k1 + lane_index(); k < p.k2; k += 32) {
    const float z = x[p.k0 + k];
    MK_UNROLL
    for (int u = 0; u < kAtOnce; u++)
      sum[u] += z * (float)value_at<MK_FINE>(p.fine, n[u] * p.fine_width + k, 1, 0);
  }
  const i64 width = p.k0 + p.bands + 1;
  const float* const of_query = x + p.k0 + p.fine_width;
  for (i64 e = p.b1 + lane_index(); e < p.b2; e += 32) {
    MK_UNROLL
    for (int u = 0; u < kAtOnce; u++) sum[u] -= of_query[e] * p.coarse[n[u] * width + p.k0 + e];
  }
  if (p.first && lane_index() == 31) {
    MK_UNROLL
    for (int u = 0; u < kAtOnce; u++) sum[u] += of_query[p.bands] * p.coarse[n[u] * width + p.k0 + p.bands];
  }
}

MK_PLAIN_KERNEL(kScanThreads) memokern_scan_refine(MK_PARAMS(ScanParams, p)) {
  const i64 b = block_x() / p.parts, part = block_x() % p.parts, count = p.count[b];
  if (count <= 1) return;
  const float* const x = p.scaled + b * scaled_width(p);
  const i64 step = p.parts * kScanWarps * kAtOnce;
  for (i64 i = (part * kScanWarps + warp_index()) * kAtOnce; i < count; i += step) {
    // Rows beyond the last are the last once more.
    i64 n[kAtOnce];
    float sum[kAtOnce] = {};
    MK_UNROLL
    for (int u = 0; u < kAtOnce; u++) n[u] = p.index[b * p.n + (i + u < count ? i + u : count - 1)];
    add_lane_parts(p, x, n, sum);
    for (int mask = 16; mask; mask >>= 1) {
      MK_UNROLL
      for (int u = 0; u < kAtOnce; u++) sum[u] += warp_xor(sum[u], mask);
    }
    MK_UNROLL
    for (int u = 0; u < kAtOnce; u++)
      if (lane_index() == u && i + u < count) p.left[b * p.n + i + u] += sum[u];
  }
}

}  // namespace cuda
}  // namespace memokern
