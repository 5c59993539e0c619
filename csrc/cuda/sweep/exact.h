// Rows by direct differences in float64: their distances, and their part of the residual.
#pragma once
#include "common/warp.h"
#include "sweep/variant.h"

namespace memokern {
namespace cuda {

// A thread's part of |x - alpha y_n|^2. The order of the sum depends on d alone, so that equal rows are ties.
MK_DEVICE double part_of_distance(const SweepParams& p, i64 b, i64 n, double alpha) {
  const float *x = p.x + b * p.d, scale = (float)p.scale, shift = (float)p.shift;
  const i64 row = n * p.stride;
  double sum = 0;
#pragma unroll 8
  for (i64 d = thread_index(); d < p.d; d += kThreads) {
    const double v = difference_at<kType>(p.rows, row + d, x[d], alpha, scale, shift);
    sum += v * v;
  }
  return sum;
}

// Adds up the warps' parts of the distances of `count` pairs, whose places in s.exact are s.pair.
MK_DEVICE void finish_distances(const Shared& s, int count) {
  block_sync();
  for (int i = thread_index(); i < count; i += kThreads) {
    double r2 = 0;
    MK_UNROLL
    for (int w = 0; w < kWarps; w++) r2 += s.distance[i * kWarps + w];
    s.exact[s.pair[i]] = r2;
  }
  block_sync();
}

// The distances of all marked rows of the tile at n0. All threads take each pair of a query and a row,
// because pairs are few as a rule, and one warp would wait for memory many times over.
MK_DEVICE void evaluate_marked(const SweepParams& p, const Shared& s, i64 n0) {
  int count = 0;
  for (int own = 0; own < kOwned; own++) {
    const i64 b = cluster_rank() + own * kCluster;
    if (b >= p.b) break;
    for (int i = 0; i < kLaneRows; i++)
      for (u32 left = s.owned[own].marked[i]; left; left &= left - 1) {
        const int j = 32 * i + first_bit(left);
        const double part = warp_sum(part_of_distance(p, b, n0 + j, s.owned[own].alpha));
        if (lane_index() == 0) s.distance[count * kWarps + warp_index()] = part;
        if (thread_index() == 0) s.pair[count] = own * kRows + j;
        if (++count == kPairs) {
          finish_distances(s, count);
          count = 0;
        }
      }
  }
  if (count) finish_distances(s, count);
}

// Adds w (alpha y - x) of the tile's near rows to `near`, whose sums so far are multiplied by the tile's
// factor. Threads share out the features; near [kQueries][kDP] is the cluster's.
MK_DEVICE void add_near(const SweepParams& p, const Shared& s, i64 n0, float* near) {
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
