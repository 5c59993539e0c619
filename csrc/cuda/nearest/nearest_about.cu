// All distances in float32, by direct differences. One block owns a group of kNearRows rows and MK_QUERIES
// queries, and each warp of it kEach rows, whose features its lanes stream: a row that was read serves all
// queries. It writes the distances [b][n], and the group's smallest for each query. Blocks of the same rows
// are neighbours, so a row comes from device memory once.
#include "nearest/neighbours.h"

namespace memokern {
namespace cuda {

enum { kEach = kNearRows / kNearWarps, kTeam = MK_QUERIES };

MK_DEVICE constexpr i64 about_shared_bytes() { return array_bytes(4ll * kNearWarps * kTeam); }

MK_PLAIN_KERNEL(kNearThreads) memokern_nearest_about(MK_PARAMS(NearestParams, p)) {
  u8* next = shared_memory();
  float* const of_warp = next_array<float>(next, kNearWarps * kTeam);
  const i64 teams = (p.b + kTeam - 1) / kTeam, group = block_x() / teams, b0 = block_x() % teams * kTeam;
  const int warp = warp_index();
  const i64 n0 = group * kNearRows + warp * kEach, groups = (p.n + kNearRows - 1) / kNearRows;
  const float scale = (float)p.scale, shift = (float)p.shift;
  float sum[kTeam][kEach] = {};
  // Queries and rows beyond the last one are the last one once more.
  i64 query[kTeam], row[kEach];
  MK_UNROLL
  for (int q = 0; q < kTeam; q++) query[q] = (b0 + q < p.b ? b0 + q : p.b - 1) * p.d;
  MK_UNROLL
  for (int i = 0; i < kEach; i++) row[i] = (n0 + i < p.n ? n0 + i : p.n - 1) * p.stride;
#pragma unroll 2
  for (i64 d = lane_index(); d < p.d; d += 32) {
    float x[kTeam], y[kEach];
    MK_UNROLL
    for (int i = 0; i < kEach; i++) y[i] = (float)value_at<MK_ROWS>(p.rows, row[i] + d, scale, shift);
    MK_UNROLL
    for (int q = 0; q < kTeam; q++) x[q] = p.x[query[q] + d];
    MK_UNROLL
    for (int q = 0; q < kTeam; q++) MK_UNROLL
    for (int i = 0; i < kEach; i++) {
      const float v = x[q] - y[i];
      sum[q][i] += v * v;
    }
  }
  MK_UNROLL
  for (int q = 0; q < kTeam; q++) {
    float least = (float)infinity();
    MK_UNROLL
    for (int i = 0; i < kEach; i++) {
      for (int mask = 16; mask; mask >>= 1) sum[q][i] += warp_xor(sum[q][i], mask);
      const bool there = b0 + q < p.b && n0 + i < p.n;
      if (there && lane_index() == i) p.about[(b0 + q) * p.n + n0 + i] = sum[q][i];
      if (there) least = fminf(least, sum[q][i]);
    }
    if (lane_index() == 0) of_warp[warp * kTeam + q] = least;
  }
  block_sync();
  const int q = thread_index();
  if (q >= kTeam || b0 + q >= p.b) return;
  float least = (float)infinity();
  for (int w = 0; w < kNearWarps; w++) least = fminf(least, of_warp[w * kTeam + q]);
  p.least[(b0 + q) * groups + group] = least;
}

}  // namespace cuda
}  // namespace memokern
