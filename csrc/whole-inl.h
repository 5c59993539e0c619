// <xc, yc> over all features of one row and one query, with a proven error: what a scan knows of a row at last.
//
// With x = scale xc and u = 2^-24. In float: x is rounded once, raw + offset four times (raw, which is its part of
// |yc| + pad; offset; their sum), and a sum goes through WHOLE / 4W additions and a few more before it is double.
// uint8 rows in integers, where the instruction set multiplies pairs of 16 bits: x = q1 hi + q2 lo + rest, |rest| <= q2 / 2, and
// sum x raw is a sum of integers; the part of the offset is a number per query. Three times as fast, and sharper.
#pragma once
#include "posterior-inl.h"

namespace memokern { namespace MEMOKERN_ISA_NS {

#ifdef __AVX2__
#define MK_PAIRS 1
#else
#define MK_PAIRS 0
#endif

enum {
  WHOLE = 2048,  // features of a product that are added up in float
  PAIRS = 1024   // features of a sum of 32-bit integers: 16 lanes of 255 * 2^15 each, 64 times
};

struct WholeQuery {
  float* x;          // [D, padded with zeros] scale xc
  int16_t *hi, *lo;  // [D, the same]
  double q1, q2;
  double offset;     // <x, (shift - center) / scale>
  double error;
  Arena arena;

  template <class X> bool prepare(const Source<float>& src, const X* from, double alpha, double size, double y_max) {
    const int64_t D = src.rows.d, Dp = round_up(D, (int64_t)64);
    const bool integers = MK_PAIRS && src.rows.type == kU8;
    if (!arena.reserve(Arena::bytes<float>(Dp) + 2 * Arena::bytes<int16_t>(integers ? Dp : 0))) return false;
    x = arena.take<float>(Dp);
    for (int64_t d = 0; d < D; d++) x[d] = (float)(src.rows.scale * ((double)from[d] - alpha * src.center[d]));
    const double u = 1.01 * 0x1p-24;
    error = u * size * ((WHOLE / (4 * Vec<float>::W) + 16) * y_max + 4 * src.pad) + 1e-12 * size * (y_max + src.pad);
    if (!integers) return true;
    hi = arena.take<int16_t>(Dp);
    lo = arena.take<int16_t>(Dp);
    float most = 0;
    offset = 0;
    for (int64_t d = 0; d < D; d++) most = __builtin_fabsf(x[d]) > most ? __builtin_fabsf(x[d]) : most;
    for (int64_t d = 0; d < D; d++) offset += (double)x[d] * (src.rows.shift - src.center[d]);
    offset /= src.rows.scale;
    q1 = most / 32760.0 + 1e-30;
    q2 = q1 / 65500;
    const double r1 = 1 / q1, r2 = 1 / q2;
    for (int64_t d = 0; d < D; d++) {
      const double v = x[d] * r1, h = (double)(int)(v + (v < 0 ? -0.5 : 0.5)), w = (x[d] - q1 * h) * r2;
      hi[d] = (int16_t)h;
      lo[d] = (int16_t)(int)(w + (w < 0 ? -0.5 : 0.5));
    }
    const double raw = (y_max + src.pad) / __builtin_fabs(src.rows.scale);  // no row of raw numbers is longer
    error = u * size * y_max + 0.51 * q2 * __builtin_sqrt((double)D) * raw + 1e-12 * size * (y_max + src.pad);
    return true;
  }
};

template <class S> static double whole_typed(const Source<float>& src, int64_t n, const WholeQuery& q) {
  enum { W = Vec<float>::W };
  typedef Vec<float>::T V;
  const S* raw = (const S*)src.rows.data + n * src.rows.stride;
  const float *x = q.x, *off = src.offset;
  const int64_t D = src.rows.d;
  double sum = 0;
  for (int64_t d = 0; d < D;) {
    const int64_t end = imin(D, d + WHOLE);
    V s[4] = {};
    for (; d + 4 * W <= end; d += 4 * W)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) s[i] += (Convert<float, S>::vec(raw + d + i * W) + load(off + d + i * W)) * load(x + d + i * W);
    for (; d + W <= end; d += W) s[0] += (Convert<float, S>::vec(raw + d) + load(off + d)) * load(x + d);
    if (d < end) {
      S tail[W];
      memset((void*)tail, 0, sizeof tail);
      memcpy((void*)tail, raw + d, (end - d) * sizeof(S));
      s[1] += (Convert<float, S>::vec(tail) + load(off + d)) * load(x + d);  // x is zero beyond D
      d = end;
    }
    sum += hsum<float>((s[0] + s[1]) + (s[2] + s[3]));
  }
  return sum;
}
#if MK_PAIRS
static double whole_pairs(const Source<float>& src, int64_t n, const WholeQuery& q) {
  const uint8_t* raw = (const uint8_t*)src.rows.data + n * src.rows.stride;
  const int64_t D = src.rows.d;
  int64_t high = 0, low = 0;
  for (int64_t d = 0; d < D;) {
    const int64_t end = imin(D, d + PAIRS);
    __m256i h = _mm256_setzero_si256(), l = h;
    for (; d < end; d += 16) {
      __m128i bytes;
      if (d + 16 <= D) {
        bytes = _mm_loadu_si128((const __m128i*)(raw + d));
      } else {
        uint8_t tail[16] = {};
        memcpy((void*)tail, raw + d, D - d);
        bytes = _mm_loadu_si128((const __m128i*)tail);
      }
      const __m256i v = _mm256_cvtepu8_epi16(bytes);
      h = _mm256_add_epi32(h, _mm256_madd_epi16(v, _mm256_loadu_si256((const __m256i*)(q.hi + d))));
      l = _mm256_add_epi32(l, _mm256_madd_epi16(v, _mm256_loadu_si256((const __m256i*)(q.lo + d))));
    }
    int32_t lanes[16];
    _mm256_storeu_si256((__m256i*)lanes, h);
    _mm256_storeu_si256((__m256i*)(lanes + 8), l);
    for (int i = 0; i < 8; i++) {
      high += lanes[i];
      low += lanes[8 + i];
    }
  }
  return q.q1 * (double)high + q.q2 * (double)low + q.offset;
}
#endif
struct Whole { typedef double (*F)(const Source<float>&, int64_t, const WholeQuery&); };
static Whole::F whole_for(int type) {
  switch (type) {
    case kF32: return whole_typed<float>;
    case kBF16: return whole_typed<BF16>;
    case kF16: return whole_typed<F16>;
#if MK_PAIRS
    case kU8: return whole_pairs;
#else
    case kU8: return whole_typed<uint8_t>;
#endif
    default: return whole_typed<double>;
  }
}

} }  // namespace
