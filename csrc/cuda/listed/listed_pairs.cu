// Listed rows by direct differences in float64. One warp owns a pair of a query and a row at a time, and
// streams its features: |x - alpha y|^2, and with MK_GRADIENT <g, y> and <x - alpha y, y>. A row is read once
// for each list that it is in. A row that does not exist has distance NaN.
#include "listed/lists.h"

namespace memokern {
namespace cuda {

// The query whose list has the i-th pair.
MK_DEVICE i64 query_of(const ListedParams& p, i64 i) {
  i64 low = 0, high = p.b - 1;
  while (low < high) {
    const i64 middle = (low + high) / 2;
    if (p.start[middle + 1] > i)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

MK_PLAIN_KERNEL(kListThreads) memokern_listed_pairs(MK_PARAMS(ListedParams, p)) {
  const i64 first = (i64)block_x() * kListWarps + warp_index(), step = p.parts * kListWarps;
  const float scale = (float)p.scale, shift = (float)p.shift;
  for (i64 i = first; i < p.m; i += step) {
    const i64 b = query_of(p, i), n = p.index[i];
    const double alpha = p.alpha[b];
    double r2 = 0, gy = 0, xy = 0;
    if (exists(p, n)) {
#pragma unroll 4
      for (i64 d = lane_index(); d < p.d; d += 32) {
        const double y = value_at<MK_ROWS>(p.rows, n * p.stride + d, scale, shift);
        // Each operation rounded by itself: a query that was made as alpha y is at distance 0.
        const double v = add((double)p.x[b * p.d + d], -multiply(alpha, y));
        r2 += v * v;
        if (MK_GRADIENT) {
          gy += p.grad_mean[b * p.d + d] * y;
          xy += v * y;
        }
      }
    } else {
      r2 = not_a_number();
    }
    r2 = warp_sum(r2);
    if (MK_GRADIENT) {
      gy = warp_sum(gy);
      xy = warp_sum(xy);
    }
    if (lane_index() != 0) continue;
    p.r2[i] = r2;
    if (MK_GRADIENT) {
      p.gy[i] = gy;
      p.xy[i] = xy;
    }
  }
}

}  // namespace cuda
}  // namespace memokern
