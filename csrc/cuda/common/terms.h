// A float as the 16-bit numbers that products with rows are formed of.
#pragma once
#include "common/rows.h"
#include "common/warp.h"

namespace memokern {
namespace cuda {

enum { kQueryThreads = 256, kQueryWarps = kQueryThreads / 32 };  // of the kernels that make them

// The largest power of two that is at most v; 1 where v is 0 or subnormal.
MK_DEVICE float power_of_two(float v) {
  const u32 bits = as_bits(v) & 0x7f800000u;
  return as_float(bits ? bits : 0x3f800000u);
}

// Terms whose sum is v, `apart` numbers from each other.
template <int kType>
MK_DEVICE void write_terms(float v, u16* to, i64 apart) {
  typedef Stored<kType> Numbers;
  MK_UNROLL
  for (int i = 0; i < Numbers::kTerms; i++) {
    const u32 term = pack<Numbers::kBrain>(v, 0) & 0xffff;
    to[i * apart] = (u16)term;
    v -= Numbers::kBrain ? as_float(term << 16) : half_value((u16)term);
  }
}

}  // namespace cuda
}  // namespace memokern
