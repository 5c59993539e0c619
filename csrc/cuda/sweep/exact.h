// Rows by direct differences in float64: their distances, and their part of the residual or of the gradient.
#pragma once
#include "common/warp.h"
#include "sweep/variant.h"

namespace memokern {
namespace cuda {

// Adds up the warps' parts of `count` pairs, whose places in s.exact are s.pair.
MK_DEVICE void finish_parts(const Shared& s, int count) {
  block_sync();
  for (int i = thread_index(); i < count; i += kThreads) {
    MK_UNROLL
    for (int k = 0; k < kExact; k++) {
      double sum = 0;
      MK_UNROLL
      for (int w = 0; w < kWarps; w++) sum += s.distance[(i * kExact + k) * kWarps + w];
      s.exact[k * kOwned * kRows + s.pair[i]] = sum;
    }
  }
  block_sync();
}

// Of all marked rows of the tile at n0, the sums of add_parts(). All threads take each pair of a query and a
// row, because pairs are few as a rule, and one warp would wait for memory many times over.
template <class Params>
MK_DEVICE void evaluate_marked(const Params& p, const Shared& s, i64 n0) {
  const int warp = warp_index();
  int count = 0;
  for (int own = 0; own < kOwned; own++) {
    const i64 b = cluster_rank() + own * kCluster;
    if (b >= p.b) break;
    for (int i = 0; i < kLaneRows; i++)
      for (u32 left = s.owned[own].marked[i]; left; left &= left - 1) {
        const int j = 32 * i + first_bit(left);
        double sum[kExact] = {};
        add_parts(p, b, n0 + j, s.owned[own].alpha, sum);
        MK_UNROLL
        for (int k = 0; k < kExact; k++) {
          const double part = warp_sum(sum[k]);
          if (lane_index() == 0) s.distance[(count * kExact + k) * kWarps + warp] = part;
        }
        if (thread_index() == 0) s.pair[count] = own * kRows + j;
        if (++count == kPairs) {
          finish_parts(s, count);
          count = 0;
        }
      }
  }
  if (count) finish_parts(s, count);
}

// Adds w (alpha y - x) of the tile's near rows, with coefficients for weights in the backward sweep, to
// `near`, whose sums so far are multiplied by the tile's factor. Threads share out the features; near
// [kQueries][kDP] is the cluster's.
template <class Params>
MK_DEVICE void add_near(const Params& p, const Shared& s, i64 n0, float* near) {
  const float scale = (float)p.scale, shift = (float)p.shift;
  for (int own = 0; own < kOwned; own++) {
    const i64 b = cluster_rank() + own * kCluster;
    if (b >= p.b) break;
    const Owned& o = s.owned[own];
    bool any = false;
    for (int i = 0; i < kLaneRows; i++) any |= o.marked[i] != 0;
    const bool before = o.near_before && o.factor != 0;
    if (!any && !(before && o.factor != 1)) continue;
    for (i64 d = thread_index(); d < p.d; d += kThreads) {
      const float x = p.x[b * p.d + d];
      double sum = before ? (double)near[b * kDP + d] * o.factor : 0;
      for (int i = 0; i < kLaneRows; i++)
        for (u32 left = o.marked[i]; left; left &= left - 1) {
          const int j = 32 * i + first_bit(left);
          const double v = difference_at<kType>(p.rows, (n0 + j) * p.stride + d, x, o.alpha, scale, shift);
          sum += s.exact[own * kRows + j] * v;
        }
      near[b * kDP + d] = (float)sum;
    }
  }
}

}  // namespace cuda
}  // namespace memokern
