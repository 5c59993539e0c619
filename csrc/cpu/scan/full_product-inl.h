// <xc, yc> over all features of one row and one query, with a proven error: the last bound of a scan.
//
// With x = scale xc and u = 2^-24, the parts of the error in float are: x is rounded once, raw + offset four
// times (raw, as its part of |yc| + center_norms; the offset; their sum), and a sum goes through FULL_SUM /
// 4W additions and a few more before it becomes double. A value of a scaled row is rounded to float, four
// times at most: scale, shift, product and sum, which is `given` together.
//
// Rows of uint8 are multiplied as integers where the instruction set multiplies pairs of 16 bits: x = q1 hi +
// rest with |rest| <= q1 / 2, so that <x, raw> is a sum of integers and the part of the offset a number per
// query. Where that is not sharp enough the rest is q2 lo + less, |less| <= q2 / 2: twice the work, and still
// faster and sharper than float.
#pragma once
#include "cpu/core/source-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

#ifdef __AVX2__
#define MK_PAIRS 1
#else
#define MK_PAIRS 0
#endif

enum {
  FULL_SUM = 2048,  // features of a product that are added up in float
  PAIR_SUM = 1024   // features of a sum of 32-bit integers: a lane adds up 64 of at most 2 * 255 * 2^15
};

struct FullProductQuery {
  float* x;          // [D, padded with zeros] scale xc
  int16_t *hi, *lo;  // [D, padded with zeros]; lo is null where hi is enough
  double q1, q2;
  double offset;  // <x, (shift - center) / scale>
  double error;   // of the product
  Arena arena;

  // from: the query; size: |xc|, at most; enough: an error that is as good as none. Returns false without
  // memory.
  template <class X>
  bool prepare(const Source<float>& src, const X* from, double alpha, double size, double y_max,
               double enough) {
    const int64_t D = src.rows.d, Dp = round_up(D, (int64_t)64);
    const bool integers = MK_PAIRS && src.rows.type == kU8;
    if (!arena.reserve(Arena::bytes<float>(Dp) + 2 * Arena::bytes<int16_t>(integers ? Dp : 0))) return false;
    x = arena.take<float>(Dp);
    enum { L = 8 };
    double largest[L] = {}, sums[L] = {};
    int64_t d = 0;
    const auto take = [&](int64_t i) {
      const double v = src.rows.scale * ((double)from[d + i] - alpha * src.center[d + i]);
      const double size_v = __builtin_fabs(v);
      x[d + i] = (float)v;
      largest[i] = size_v > largest[i] ? size_v : largest[i];
      sums[i] += v * (src.rows.shift - src.center[d + i]);
    };
    for (; d + L <= D; d += L)
#pragma GCC unroll 8
      for (int i = 0; i < L; i++) take(i);
    for (int i = 0; d + i < D; i++) take(i);
    const double u = 1.01 * 0x1p-24, C = src.center_norms;
    const double given = src.rows.scale == 1 && src.rows.shift == 0 ? 0 : 4 * u * size * (y_max + C);
    error = u * size * ((FULL_SUM / (4 * Vec<float>::W) + 16) * y_max + 4 * C) + given +
            1e-12 * size * (y_max + C);
    if (!integers) return true;
    hi = arena.take<int16_t>(Dp);
    lo = nullptr;
    double most = offset = 0;
    for (int i = 0; i < L; i++) {
      most = dmax(most, largest[i]);
      offset += sums[i] / src.rows.scale;
    }
    // No row of raw numbers is longer than `raw`.
    const double raw = (y_max + C) / __builtin_fabs(src.rows.scale), root = __builtin_sqrt((double)D);
    const double rounded = u * size * y_max + given + 1e-12 * size * (y_max + C);
    q1 = most / 32760.0 + 1e-30;
    const float r1 = (float)(1 / q1);
    // The rounding of the quotient to float moves the integer by less than 0.01.
    for (int64_t d = 0; d < D; d++) hi[d] = (int16_t)nearest_integer(x[d] * r1);
    error = rounded + 0.51 * q1 * root * raw;
    if (error <= enough) return true;
    lo = arena.take<int16_t>(Dp);
    q2 = q1 / 64000;
    for (int64_t d = 0; d < D; d++) lo[d] = (int16_t)nearest_integer((float)((x[d] - q1 * hi[d]) / q2));
    error = rounded + 0.51 * q2 * root * raw;
    return true;
  }
  static int nearest_integer(float v) { return (int)(v + (v < 0 ? -0.5f : 0.5f)); }
};

// One row and one query.
template <class S>
static double full_product_of(const Source<float>& src, int64_t n, const FullProductQuery& q) {
  enum { W = Vec<float>::W };
  typedef Vec<float>::T V;
  const S* raw = (const S*)src.rows.data + n * src.rows.stride;
  const float *x = q.x, *off = src.offset;
  const int64_t D = src.rows.d;
  double sum = 0;
  for (int64_t d = 0; d < D;) {
    const int64_t end = imin(D, d + FULL_SUM);
    V s[4] = {};
    for (; d + 4 * W <= end; d += 4 * W)
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++)
        s[i] += (Convert<float, S>::vec(raw + d + i * W) + load(off + d + i * W)) * load(x + d + i * W);
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

// One row and `count` queries.
template <class S>
static void full_product_typed(const Source<float>& src, int64_t n, const FullProductQuery* const* qs,
                               int64_t count, double* out) {
  for (int64_t i = 0; i < count; i++) out[i] = full_product_of<S>(src, n, *qs[i]);
}
#if MK_PAIRS
// One row of uint8 and Q queries. LOW: their `lo` is there too.
template <bool LOW, int Q>
static void pairs(const Source<float>& src, int64_t n, const FullProductQuery* const* qs, double* out) {
  enum { STEP = 16, P = LOW ? 2 : 1 };
  const uint8_t* raw = (const uint8_t*)src.rows.data + n * src.rows.stride;
  const int64_t D = src.rows.d;
  const int16_t* x[Q][P];
  for (int i = 0; i < Q; i++) {
    x[i][0] = qs[i]->hi;
    if (LOW) x[i][P - 1] = qs[i]->lo;
  }
  __m256i sum[Q][P] = {};  // of 64 bits
  for (int64_t d = 0; d < D;) {
    const int64_t end = imin(D, d + PAIR_SUM);
    __m256i part[Q][P] = {};
    const auto add = [&](__m128i bytes, int64_t at) {
      const __m256i v = _mm256_cvtepu8_epi16(bytes);
#pragma GCC unroll 4
      for (int i = 0; i < Q; i++)
#pragma GCC unroll 2
        for (int j = 0; j < P; j++) {
          const __m256i w = _mm256_loadu_si256((const __m256i*)(x[i][j] + at));
          part[i][j] = _mm256_add_epi32(part[i][j], _mm256_madd_epi16(v, w));
        }
    };
    for (; d + 2 * STEP <= end; d += 2 * STEP) {
      add(_mm_loadu_si128((const __m128i*)(raw + d)), d);
      add(_mm_loadu_si128((const __m128i*)(raw + d + STEP)), d + STEP);
    }
    for (; d < end; d += STEP) {
      uint8_t tail[STEP] = {};
      memcpy((void*)tail, raw + d, imin(STEP, D - d));
      add(_mm_loadu_si128((const __m128i*)tail), d);
    }
#pragma GCC unroll 4
    for (int i = 0; i < Q; i++)
#pragma GCC unroll 2
      for (int j = 0; j < P; j++) {
        const __m256i low = _mm256_cvtepi32_epi64(_mm256_castsi256_si128(part[i][j]));
        const __m256i high = _mm256_cvtepi32_epi64(_mm256_extracti128_si256(part[i][j], 1));
        sum[i][j] = _mm256_add_epi64(sum[i][j], _mm256_add_epi64(low, high));
      }
  }
  for (int i = 0; i < Q; i++) {
    int64_t lanes[2][4] = {};
    for (int j = 0; j < P; j++) _mm256_storeu_si256((__m256i*)lanes[j], sum[i][j]);
    const int64_t *h = lanes[0], *l = lanes[1];
    out[i] = qs[i]->q1 * (double)(h[0] + h[1] + h[2] + h[3]) +
             (LOW ? qs[i]->q2 * (double)(l[0] + l[1] + l[2] + l[3]) : 0) + qs[i]->offset;
  }
}
static void full_product_pairs(const Source<float>& src, int64_t n, const FullProductQuery* const* qs,
                               int64_t count, double* out) {
  int64_t i = 0;
  const auto high_only = [&](int64_t to) {
    for (int64_t j = i; j < to; j++)
      if (qs[j]->lo) return false;
    return true;
  };
  for (; i + 4 <= count && high_only(i + 4); i += 4) pairs<false, 4>(src, n, qs + i, out + i);
  for (; i + 2 <= count && high_only(i + 2); i += 2) pairs<false, 2>(src, n, qs + i, out + i);
  for (; i < count; i++)
    if (qs[i]->lo)
      pairs<true, 1>(src, n, qs + i, out + i);
    else
      pairs<false, 1>(src, n, qs + i, out + i);
}
#endif
struct FullProduct {
  typedef void (*F)(const Source<float>&, int64_t, const FullProductQuery* const*, int64_t, double*);
};
static FullProduct::F full_product_for(int type) {
  switch (type) {
    case kF32: return full_product_typed<float>;
    case kBF16: return full_product_typed<BF16>;
    case kF16: return full_product_typed<F16>;
#if MK_PAIRS
    case kU8: return full_product_pairs;
#else
    case kU8: return full_product_typed<uint8_t>;
#endif
    default: return full_product_typed<double>;
  }
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
