// What kernels of few features use of the machine besides.
#pragma once
#include "common/device.h"

// So many blocks share a multiprocessor, which bounds the registers.
#ifdef __CUDACC__
#define MK_BOUNDED_KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#else
#define MK_BOUNDED_KERNEL(threads, blocks) static void
#endif

namespace memokern {
namespace cuda {

// An operation of the special-function unit, 16 a clock of a multiprocessor: 2^v to 2 units in the last
// place; 0 where that is below the smallest normal number.
#ifdef __CUDACC__
MK_DEVICE float exp2_fast(float v) {
  float e;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(v));
  return e;
}
#else
MK_DEVICE float exp2_fast(float v) { return v < -126 ? 0 : exp2f(v); }
#endif

}  // namespace cuda
}  // namespace memokern
