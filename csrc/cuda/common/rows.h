// Rows as they are stored, and as they enter products: as one or three 16-bit numbers u with
// y = scale (u - offset) + shift, exactly.
//
// The order of features within a sum is free, so threads read what lies together: four features of a row for
// the first product, two for the second. Both kernels' sides of that bargain are stated where they are used.
#pragma once
#include "common/device.h"

namespace memokern {
namespace cuda {

// kBytes: of a stored number. kBrain: whether products are of bfloat16, else of float16. kTerms: 16-bit
// numbers whose sum is a feature of a query, to 22 bits (float16) or 24 (bfloat16). kPieces: the same of a
// row. kOffset: what is added to a row as stored.
template <int kType>
struct Stored;
template <>
struct Stored<kF32> {
  enum { kBytes = 4, kTerms = 3, kPieces = 3, kBrain = 1, kOffset = 0 };
};
template <>
struct Stored<kBF16> {
  enum { kBytes = 2, kTerms = 3, kPieces = 1, kBrain = 1, kOffset = 0 };
};
template <>
struct Stored<kF16> {
  enum { kBytes = 2, kTerms = 2, kPieces = 1, kBrain = 0, kOffset = 0 };
};
template <>
struct Stored<kU8> {
  enum { kBytes = 1, kTerms = 2, kPieces = 1, kBrain = 0, kOffset = -128 };
};

// kCount numbers of a row that lie together, read at once.
template <int kBytes, int kCount>
struct alignas(kBytes* kCount) Words {
  u32 v[kBytes * kCount / 4];
};
template <>
struct alignas(2) Words<1, 2> {
  u16 v[1];
};

// Two floats as kPieces pairs of bfloat16 whose sum is them.
MK_DEVICE void split(float low, float high, u32 (&out)[3]) {
  MK_UNROLL
  for (int i = 0; i < 3; i++) {
    out[i] = pack<true>(low, high);
    low -= as_float(out[i] << 16);
    high -= as_float(out[i] & 0xffff0000u);
  }
}

// Bytes lie in the lower half of a float16 with the value 1024 + byte; less 1152 that is byte - 128.
enum : u32 { kByteFrame = 0x64646464u, k1152 = 0x64806480u };

// Four features of a row: pairs (0, 1) and (2, 3).
template <int kType>
MK_DEVICE void pairs_of_row(const Words<Stored<kType>::kBytes, 4>& w, u32 (&out)[2][Stored<kType>::kPieces]) {
  if constexpr (kType == kF32) {
    split(as_float(w.v[0]), as_float(w.v[1]), out[0]);
    split(as_float(w.v[2]), as_float(w.v[3]), out[1]);
  } else if constexpr (kType == kU8) {
    out[0][0] = half2_subtract(pick_bytes(w.v[0], kByteFrame, 0x4140), k1152);
    out[1][0] = half2_subtract(pick_bytes(w.v[0], kByteFrame, 0x4342), k1152);
  } else {
    out[0][0] = w.v[0];
    out[1][0] = w.v[1];
  }
}

// Two features of two rows: of each feature the pair (row a, row b).
template <int kType>
MK_DEVICE void pairs_of_feature(const Words<Stored<kType>::kBytes, 2>& a,
                                const Words<Stored<kType>::kBytes, 2>& b,
                                u32 (&out)[2][Stored<kType>::kPieces]) {
  if constexpr (kType == kF32) {
    split(as_float(a.v[0]), as_float(b.v[0]), out[0]);
    split(as_float(a.v[1]), as_float(b.v[1]), out[1]);
  } else if constexpr (kType == kU8) {
    const u32 both = a.v[0] | (u32)b.v[0] << 16;
    out[0][0] = half2_subtract(pick_bytes(both, kByteFrame, 0x4240), k1152);
    out[1][0] = half2_subtract(pick_bytes(both, kByteFrame, 0x4341), k1152);
  } else {
    out[0][0] = pick_bytes(a.v[0], b.v[0], 0x5410);
    out[1][0] = pick_bytes(a.v[0], b.v[0], 0x7632);
  }
}

// The value of a stored number as memokern.calls.values.dequantized has it: rounded to float32 after the
// product and after the sum.
template <int kType>
MK_DEVICE double value_at(const void* rows, i64 i, float scale, float shift) {
  float v;
  if constexpr (kType == kF32)
    v = ((const float*)rows)[i];
  else if constexpr (kType == kBF16)
    v = as_float((u32)((const u16*)rows)[i] << 16);
  else if constexpr (kType == kF16)
    v = half_value(((const u16*)rows)[i]);
  else
    v = (float)((const u8*)rows)[i];
  return (double)add(multiply(v, scale), shift);
}

// alpha y - x, each operation rounded by itself: a query that was made as alpha y is at distance 0.
template <int kType>
MK_DEVICE double difference_at(const void* rows, i64 i, float x, double alpha, float scale, float shift) {
  return add(multiply(alpha, value_at<kType>(rows, i, scale, shift)), -(double)x);
}

}  // namespace cuda
}  // namespace memokern
