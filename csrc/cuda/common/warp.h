// Sums and extremes over a warp, the same in all lanes.
#pragma once
#include "common/device.h"

namespace memokern {
namespace cuda {

MK_DEVICE double warp_sum(double v) {
  for (int mask = 16; mask; mask >>= 1) v += warp_xor(v, mask);
  return v;
}
// A number that is NaN is passed over.
MK_DEVICE float warp_max(float v) {
  for (int mask = 16; mask; mask >>= 1) v = fmaxf(v, warp_xor(v, mask));
  return v;
}
MK_DEVICE double warp_max(double v) {
  for (int mask = 16; mask; mask >>= 1) v = fmax(v, warp_xor(v, mask));
  return v;
}
MK_DEVICE double warp_min(double v) {
  for (int mask = 16; mask; mask >>= 1) v = fmin(v, warp_xor(v, mask));
  return v;
}

}  // namespace cuda
}  // namespace memokern
