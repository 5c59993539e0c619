// The k nearest rows so far, in shared memory: by distance, and by their number among equals. A list is
// joined with further rows by counting, for each of both, how many come before it.
//
// Squares of direct differences are all positive, so that a sum of them in float32 is right to a share of
// itself, whatever the data are: each difference and its square are rounded, a lane adds up d / 32 of them,
// and five more additions join the lanes.
#pragma once
#include "common/arrays.h"
#include "common/block.h"
#include "common/rows.h"
#include "nearest/abi.h"

namespace memokern {
namespace cuda {

enum { kNearThreads = 256, kNearWarps = kNearThreads / 32, kMostNeighbours = 64 };
enum : i64 { kFree = 1ll << 62 };  // from here on, the numbers of places that are free
enum { kNearRows = 32, kUnion = kMostNeighbours + kNearThreads };

// The most that a float32 distance can be of a row whose distance is r2.
MK_DEVICE double most_about(double r2, i64 d) {
  const double unit_roundoff = 6.1e-8, smallest = 1.5e-45;  // above 2^-24 and 2^-149
  return r2 * (1 + ((double)d / 32 + 16) * unit_roundoff) + (double)d * smallest;
}
// float32, not below v.
MK_DEVICE float rounded_up(double v) { return (float)(v * (1 + 1.3e-7) + 1.5e-45); }

// distance, index [kUnion]: the first k are the list, and further rows follow.
struct Neighbours {
  double* distance;
  i64* index;
};
MK_DEVICE constexpr i64 neighbours_bytes() { return 2 * array_bytes(8 * kUnion); }
MK_DEVICE Neighbours next_neighbours(u8*& next) {
  Neighbours list;
  list.distance = next_array<double>(next, kUnion);
  list.index = next_array<i64>(next, kUnion);
  return list;
}
// Free places, in the order in which they are given up.
MK_DEVICE void clear(const Neighbours& list, i64 k) {
  for (i64 i = thread_index(); i < k; i += kNearThreads) {
    list.distance[i] = infinity();
    list.index[i] = kFree + i;
  }
  block_sync();
}
// The list of the k first of k + more. All threads come; what they wrote is there after a barrier.
MK_DEVICE void join(const Neighbours& list, i64 k, i64 more) {
  enum { kEach = (kUnion + kNearThreads - 1) / kNearThreads };
  double distance[kEach];
  i64 index[kEach], rank[kEach];
  block_sync();
  MK_UNROLL
  for (int j = 0; j < kEach; j++) {
    const i64 i = thread_index() + j * kNearThreads;
    rank[j] = k;
    if (i >= k + more) continue;
    distance[j] = list.distance[i];
    index[j] = list.index[i];
    rank[j] = 0;
    for (i64 o = 0; o < k + more; o++) {
      const double other = list.distance[o];
      rank[j] += other < distance[j] || (other == distance[j] && list.index[o] < index[j]);
    }
  }
  block_sync();
  MK_UNROLL
  for (int j = 0; j < kEach; j++)
    if (rank[j] < k) {
      list.distance[rank[j]] = distance[j];
      list.index[rank[j]] = index[j];
    }
  block_sync();
}

}  // namespace cuda
}  // namespace memokern
