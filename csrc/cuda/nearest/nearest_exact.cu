// The nearest rows, by direct differences in float64. memokern_nearest_exact: one block owns a query and a
// part of the rows, and streams their float32 distances; rows that can be among the k nearest are evaluated,
// a row in each warp. After each step the list has the k nearest of the rows so far. memokern_nearest_join
// makes one list of those of all parts.
#include "nearest/neighbours.h"

namespace memokern {
namespace cuda {

MK_DEVICE constexpr i64 exact_shared_bytes() { return neighbours_bytes() + array_bytes(4 * kNearWarps); }

// |x - y|^2; what is not a number is as far as can be.
MK_DEVICE double distance_to(const NearestParams& p, i64 b, i64 n) {
  const float scale = (float)p.scale, shift = (float)p.shift;
  double sum = 0;
#pragma unroll 4
  for (i64 d = lane_index(); d < p.d; d += 32) {
    const double v = (double)p.x[b * p.d + d] - value_at<MK_ROWS>(p.rows, n * p.stride + d, scale, shift);
    sum += v * v;
  }
  sum = warp_sum(sum);
  return sum == sum ? sum : infinity();
}

MK_PLAIN_KERNEL(kNearThreads) memokern_nearest_exact(MK_PARAMS(NearestParams, p)) {
  u8* next = shared_memory();
  const Neighbours list = next_neighbours(next);
  u32* const of_warp = next_array<u32>(next, kNearWarps);
  const i64 b = block_x() / p.parts, part = block_x() % p.parts;
  const i64 first = part * p.n / p.parts, last = (part + 1) * p.n / p.parts;
  const float* const about = p.about + b * p.n;
  const float most = p.most[b];
  const int warp = warp_index();
  float limit = most;
  clear(list, p.k);
  for (i64 n0 = first; n0 < last; n0 += kNearThreads) {
    const i64 n = n0 + thread_index();
    // A distance that is NaN or infinite in float32 says nothing.
    const bool near = n < last && !(about[n] > limit);
    if (!block_any(near)) continue;
    const u32 ballot = warp_ballot(near);
    if (lane_index() == 0) of_warp[warp] = count_bits(ballot);
    block_sync();
    i64 before = p.k, more = 0;
    for (int w = 0; w < kNearWarps; w++) {
      if (w < warp) before += of_warp[w];
      more += of_warp[w];
    }
    if (near) list.index[before + count_bits(bits_before(ballot))] = n;
    block_sync();
    for (i64 i = p.k + warp; i < p.k + more; i += kNearWarps) {
      const double r2 = distance_to(p, b, list.index[i]);
      if (lane_index() == 0) list.distance[i] = r2;
    }
    join(list, p.k, more);
    limit = fminf(most, rounded_up(most_about(list.distance[p.k - 1], p.d)));
    block_sync();
  }
  for (i64 i = thread_index(); i < p.k; i += kNearThreads) {
    p.part_distance[(b * p.parts + part) * p.k + i] = list.distance[i];
    p.part_index[(b * p.parts + part) * p.k + i] = list.index[i];
  }
}

MK_PLAIN_KERNEL(kNearThreads) memokern_nearest_join(MK_PARAMS(NearestParams, p)) {
  u8* next = shared_memory();
  const Neighbours list = next_neighbours(next);
  const i64 b = block_x(), all = p.parts * p.k;
  clear(list, p.k);
  // The nearest of each part come first, and soon there is none that is nearer than the list's last.
  for (i64 i0 = 0; i0 < all; i0 += kNearThreads) {
    const i64 i = i0 + thread_index(), more = all - i0 < kNearThreads ? all - i0 : (i64)kNearThreads;
    const i64 from = (b * p.parts + i % p.parts) * p.k + i / p.parts;
    const double distance = i < all ? p.part_distance[from] : infinity();
    if (!block_any(i < all && distance <= list.distance[p.k - 1])) continue;
    if (i < all) {
      const i64 index = p.part_index[from];
      list.distance[p.k + thread_index()] = distance;
      // Free places of parts get numbers of their own: no two are alike.
      list.index[p.k + thread_index()] = index < kFree ? index : kFree + kMostNeighbours + i;
    }
    join(list, p.k, more);
  }
  bool lost = false;
  for (i64 d = thread_index(); d < p.d; d += kNearThreads) lost |= p.x[b * p.d + d] != p.x[b * p.d + d];
  lost = block_any(lost);
  for (i64 i = thread_index(); i < p.k; i += kNearThreads) {
    p.distance[b * p.k + i] = lost ? not_a_number() : list.distance[i];
    p.index[b * p.k + i] = list.index[i];
  }
}

}  // namespace cuda
}  // namespace memokern
