// Halves, and the product of two tiles, as the emulated machine computes them.
#include <cfenv>
#include <cmath>

#include "numbers.h"

namespace memokern {
namespace cuda {
namespace emulator {

u16 to_brain(float v) {
  const u32 b = as_bits(v);
  if (v != v) return 0x7fff;
  return (u16)((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

u16 to_half(float v) {
  const u32 b = as_bits(v), sign = b >> 16 & 0x8000, size = b & 0x7fffffff;
  if (size > 0x7f800000) return 0x7fff;
  if (size >= 0x477ff000) return (u16)(sign | 0x7c00);  // rounds to 65536 or more
  if (size < 0x38800000) {                              // below 2^-14: a multiple of 2^-24
    const float scaled = fabsf(v) * 0x1p24f;
    return (u16)(sign | (u32)nearbyintf(scaled));
  }
  const u32 rounded = size + 0xfff + (size >> 13 & 1);
  return (u16)(sign | ((rounded - 0x38000000) >> 13));
}

float from_half(u16 h) {
  const u32 sign = (u32)(h & 0x8000) << 16, exponent = h >> 10 & 31, rest = h & 1023;
  if (exponent == 31) return as_float(sign | 0x7f800000 | rest << 13);
  if (exponent) return as_float(sign | (exponent + 112) << 23 | rest << 13);
  const float v = (float)rest * 0x1p-24f;
  return sign ? -v : v;
}

u32 half2_subtract(u32 a, u32 b) {
  u32 out = 0;
  for (int i = 0; i < 2; i++)
    out |= (u32)to_half(from_half((u16)(a >> 16 * i)) - from_half((u16)(b >> 16 * i))) << 16 * i;
  return out;
}

// What a tensor core makes of a sum: it drops what lies beyond 24 bits.
static float truncated(double v) {
  const float f = (float)v;
  if (!std::isfinite(f) || std::fabs((double)f) <= std::fabs(v)) return f;
  return std::nextafterf(f, 0.0f);
}

void multiply_warp(float* const (&c)[32], const u32 (&a)[32][4], const u32 (&b)[32][2], bool brain) {
  float left[16][16], right[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const int g = lane >> 2, t = lane & 3;
    for (int i = 0; i < 2; i++) {
      for (int k = 0; k < 4; k++) {
        const u16 h = (u16)(a[lane][k] >> 16 * i);
        left[g + 8 * (k & 1)][2 * t + i + 8 * (k >> 1)] = brain ? as_float((u32)h << 16) : from_half(h);
      }
      for (int k = 0; k < 2; k++) {
        const u16 h = (u16)(b[lane][k] >> 16 * i);
        right[2 * t + i + 8 * k][g] = brain ? as_float((u32)h << 16) : from_half(h);
      }
    }
  }
  for (int row = 0; row < 16; row++) {
    double sum[8] = {};
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 8; n++) sum[n] += (double)left[row][k] * (double)right[k][n];
    for (int n = 0; n < 8; n++) {
      float& to = c[(row & 7) * 4 + n / 2][(n & 1) + 2 * (row >> 3)];
      to = truncated(to + sum[n]);
    }
  }
}

}  // namespace emulator
}  // namespace cuda
}  // namespace memokern
