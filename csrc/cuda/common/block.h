// Sums and choices over a block, the same in all threads and in every run: the order is that of the threads.
#pragma once
#include "common/warp.h"

namespace memokern {
namespace cuda {

// shared: [warps]. All threads come, and may come again at once.
MK_DEVICE double block_sum(double v, double* shared, int warps) {
  v = warp_sum(v);
  const int warp = warp_index();
  if (lane_index() == 0) shared[warp] = v;
  block_sync();
  double sum = 0;
  for (int w = 0; w < warps; w++) sum += shared[w];
  block_sync();
  return sum;
}

// The least and the largest of what is not NaN.
MK_DEVICE double block_min(double v, double* shared, int warps) {
  v = warp_min(v);
  const int warp = warp_index();
  if (lane_index() == 0) shared[warp] = v;
  block_sync();
  for (int w = 0; w < warps; w++) v = fmin(v, shared[w]);
  block_sync();
  return v;
}
MK_DEVICE double block_max(double v, double* shared, int warps) { return -block_min(-v, shared, warps); }

// How many bits are set.
MK_DEVICE u32 count_bits(u32 v) {
  v -= v >> 1 & 0x55555555;
  v = (v & 0x33333333) + (v >> 2 & 0x33333333);
  return ((v + (v >> 4)) & 0x0f0f0f0f) * 0x01010101 >> 24;
}
// Those of a lower place than the lane's.
MK_DEVICE u32 bits_before(u32 v) { return v & ((1u << lane_index()) - 1); }

// A number and the place that it was found at.
struct Found {
  float value;
  u32 at;
};
// The larger number, and of equals the first. None is NaN.
MK_DEVICE Found better(const Found& a, const Found& b) {
  return b.value > a.value || (b.value == a.value && b.at < a.at) ? b : a;
}
MK_DEVICE Found warp_best(Found f) {
  for (int mask = 16; mask; mask >>= 1) {
    const float value = warp_xor(f.value, mask), at = warp_xor(as_float(f.at), mask);
    f = better(f, {value, as_bits(at)});
  }
  return f;
}
// shared: [warps].
MK_DEVICE Found block_best(Found f, Found* shared, int warps) {
  f = warp_best(f);
  const int warp = warp_index();
  if (lane_index() == 0) shared[warp] = f;
  block_sync();
  for (int w = 0; w < warps; w++) f = better(f, shared[w]);
  block_sync();
  return f;
}

}  // namespace cuda
}  // namespace memokern
