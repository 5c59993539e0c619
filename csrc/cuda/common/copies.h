// The order of copies by the machine and of what threads write to shared memory.
#pragma once
#include "common/device.h"

namespace memokern {
namespace cuda {

// Before copies write where the thread has written: they are not in the order of its own accesses. The
// emulator has one order for all.
#ifdef __CUDACC__
MK_DEVICE void copy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#else
MK_DEVICE void copy_fence() {}
#endif

}  // namespace cuda
}  // namespace memokern
