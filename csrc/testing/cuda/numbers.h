// What the emulator's runtime needs of numbers.cpp beside emulator.h.
#pragma once
#include "emulator.h"

namespace memokern {
namespace cuda {
namespace emulator {

// c += A B of the fragments of a warp's lanes, whose layout device.h has.
void multiply_warp(float* const (&c)[32], const u32 (&a)[32][4], const u32 (&b)[32][2], bool brain);

}  // namespace emulator
}  // namespace cuda
}  // namespace memokern
