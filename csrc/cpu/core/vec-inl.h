// Vectors of the instruction set this translation unit is compiled for. MEMOKERN_ISA_NS names the namespace and
// MEMOKERN_VBYTES the bytes of one vector; both are defined by the isa_*.cpp that includes this file.
// GCC / Clang vector extensions only. Nothing from the C++ library: an inline function of it compiled here for
// AVX-512 might be the copy that the linker keeps for everybody.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include "memokern/abi.h"

namespace memokern { namespace MEMOKERN_ISA_NS {

#define MK_INLINE static inline __attribute__((always_inline))

template <class R> struct Vec;
template <> struct Vec<float> {
  typedef float T __attribute__((vector_size(MEMOKERN_VBYTES)));
  typedef float U __attribute__((vector_size(MEMOKERN_VBYTES), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(MEMOKERN_VBYTES)));
  typedef uint32_t Bits __attribute__((vector_size(MEMOKERN_VBYTES)));
  enum { W = MEMOKERN_VBYTES / 4 };
};
template <> struct Vec<double> {
  typedef double T __attribute__((vector_size(MEMOKERN_VBYTES)));
  typedef double U __attribute__((vector_size(MEMOKERN_VBYTES), aligned(8), may_alias));
  typedef int64_t I __attribute__((vector_size(MEMOKERN_VBYTES)));
  enum { W = MEMOKERN_VBYTES / 8 };
};

template <class R> MK_INLINE typename Vec<R>::T load(const R* p) { return *(const typename Vec<R>::U*)p; }
template <class R> MK_INLINE void store(R* p, typename Vec<R>::T v) { *(typename Vec<R>::U*)p = v; }
template <class R> MK_INLINE typename Vec<R>::T splat(R a) { return a - (typename Vec<R>::T){}; }
// a > b ? a : b, so b where a is NaN: one instruction, which GCC does not find by itself.
template <class V> MK_INLINE V vmax(V a, V b) { return a > b ? a : b; }
template <class V> MK_INLINE V vmin(V a, V b) { return a < b ? a : b; }
#if defined(__AVX2__) && MEMOKERN_VBYTES == 32
MK_INLINE Vec<float>::T vmax(Vec<float>::T a, Vec<float>::T b) { return _mm256_max_ps(a, b); }
MK_INLINE Vec<double>::T vmax(Vec<double>::T a, Vec<double>::T b) { return _mm256_max_pd(a, b); }
MK_INLINE Vec<float>::T vmin(Vec<float>::T a, Vec<float>::T b) { return _mm256_min_ps(a, b); }
MK_INLINE Vec<double>::T vmin(Vec<double>::T a, Vec<double>::T b) { return _mm256_min_pd(a, b); }
#elif defined(__AVX512F__) && MEMOKERN_VBYTES == 64
MK_INLINE Vec<float>::T vmax(Vec<float>::T a, Vec<float>::T b) { return _mm512_maskz_max_ps(0xffff, a, b); }
MK_INLINE Vec<double>::T vmax(Vec<double>::T a, Vec<double>::T b) { return _mm512_maskz_max_pd(0xff, a, b); }
MK_INLINE Vec<float>::T vmin(Vec<float>::T a, Vec<float>::T b) { return _mm512_maskz_min_ps(0xffff, a, b); }
MK_INLINE Vec<double>::T vmin(Vec<double>::T a, Vec<double>::T b) { return _mm512_maskz_min_pd(0xff, a, b); }
#endif
template <class R> MK_INLINE double hsum(typename Vec<R>::T v) {
  double s = 0;
  for (int i = 0; i < Vec<R>::W; i++) s += v[i];
  return s;
}

// 2^n e^r for |r| <= ln(2)/2, n in the low bits of z; 0 where `zero`. float: the best of degree 6 that begins with 1 + r, off by
// 3e-9; double: Taylor of degree 13. In pairs of terms: the loops that call it wait for its latency, not for its operations.
MK_INLINE Vec<float>::T exp_rest(Vec<float>::T r, Vec<float>::T z, Vec<float>::I zero) {
  typedef Vec<float>::T V;
  V r2 = r * r;
  V p = (r2 * 1.38146e-3f + (r * 8.36871e-3f + 4.166839e-2f)) * r2 + (r * 1.6666521e-1f + 4.9999993e-1f);
  p = p * r2 + (r + 1.0f);
  return (V)(((Vec<float>::I)p + ((Vec<float>::I)z << 23)) & ~zero);
}
MK_INLINE Vec<double>::T exp_rest(Vec<double>::T r, Vec<double>::T z, Vec<double>::I zero) {
  typedef Vec<double>::T V;
  V r2 = r * r, r4 = r2 * r2;
  V low = (r * (1.0 / 120.0) + (1.0 / 24.0)) * r2 + (r * (1.0 / 6.0) + 0.5);
  V mid = (r * (1.0 / 362880.0) + (1.0 / 40320.0)) * r2 + (r * (1.0 / 5040.0) + (1.0 / 720.0));
  V high = (r * (1.0 / 6227020800.0) + (1.0 / 479001600.0)) * r2 + (r * (1.0 / 39916800.0) + (1.0 / 3628800.0));
  V p = ((high * r4 + mid) * r4 + low) * r2 + r + 1.0;
  V y = (V)((Vec<double>::I)p + ((Vec<double>::I)z << 52));
  return (V)((Vec<double>::I)y & ~zero);
}
// exp(x) for x <= 88: relative error below 2e-7 (tested), 0 below `least`, which is -87 or more.
MK_INLINE Vec<float>::T vexp(Vec<float>::T x, float least = -87.0f) {
  typedef Vec<float>::T V;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer, left in the low bits
  V z = x * 1.44269504088896341f + magic;
  V n = z - magic;
  V r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  return exp_rest(r, z, x < least);
}
// 2^x for lowest_power <= x <= 0: the reduction is exact and cheaper. float: the best of degree 5 that is 1 at 0, off by 9.2e-8, and
// three roundings: relative error below 2.7e-7 (tested); double: below 1e-15.
MK_INLINE float lowest_power(float) { return -126.0f; }
MK_INLINE double lowest_power(double) { return -1022.0; }
MK_INLINE Vec<float>::T vexp2(Vec<float>::T x) {
  typedef Vec<float>::T V;
  const float magic = 12582912.0f;
  V z = x + magic, r = x - (z - magic), r2 = r * r;
  V p = (r * 1.32647e-3f + 9.67151e-3f) * r2 + (r * 5.550734e-2f + 2.4022242e-1f);
  p = p * r2 + (r * 6.9314698e-1f + 1.0f);
  return (V)((Vec<float>::I)p + ((Vec<float>::I)z << 23));
}
// The same in double: relative error below 1e-15 (tested); `least` is -708 or more.
MK_INLINE Vec<double>::T vexp(Vec<double>::T x, double least = -708.0) {
  typedef Vec<double>::T V;
  const double magic = 6755399441055744.0;  // 1.5 * 2^52
  V z = x * 1.4426950408889634074 + magic;
  V n = z - magic;
  V r = x - n * 6.93147180369123816490e-1;
  r = r - n * 1.90821492927058770002e-10;
  return exp_rest(r, z, x < least);
}
MK_INLINE Vec<double>::T vexp2(Vec<double>::T x) {
  const double magic = 6755399441055744.0;
  Vec<double>::T z = x + magic;
  return exp_rest((x - (z - magic)) * 0.6931471805599453094, z, Vec<double>::I{});
}
// Differences below this have weight zero; clamping to it keeps 0 * (l - m) finite for l = -inf.
MK_INLINE float floor_of(float) { return -100.0f; }
MK_INLINE double floor_of(double) { return -800.0; }

// Raw elements to one vector of compute type. Half precision by bits, so that no ISA needs f16c.
template <class R, class S, int W> struct RawVec { typedef S T __attribute__((vector_size(W * sizeof(S)), aligned(1), may_alias)); };
struct BF16 { uint16_t bits; };
struct F16 { uint16_t bits; };

template <class R, class S> struct Convert {  // float, double, uint8_t
  MK_INLINE typename Vec<R>::T vec(const S* p) {
    typedef typename RawVec<R, S, Vec<R>::W>::T Raw;
    return __builtin_convertvector(*(const Raw*)p, typename Vec<R>::T);
  }
};
// Unsigned integers to W lanes of 32 bits. GCC 12 takes the generic form apart into scalars, at eight times the cost.
template <class R> struct Wide { typedef uint32_t T __attribute__((vector_size(Vec<R>::W * 4))); };
template <class R, class S> MK_INLINE typename Wide<R>::T widen(const S* p) {
  typedef typename RawVec<R, S, Vec<R>::W>::T Raw;
  return __builtin_convertvector(*(const Raw*)p, typename Wide<R>::T);
}
#if defined(__AVX2__) && MEMOKERN_VBYTES == 32
template <> inline __attribute__((always_inline)) Wide<float>::T widen<float>(const uint8_t* p) { return (Wide<float>::T)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
template <> inline __attribute__((always_inline)) Wide<float>::T widen<float>(const uint16_t* p) { return (Wide<float>::T)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
template <> inline __attribute__((always_inline)) Wide<double>::T widen<double>(const uint8_t* p) {
  int32_t four;
  memcpy(&four, p, sizeof four);
  return (Wide<double>::T)_mm_cvtepu8_epi32(_mm_cvtsi32_si128(four));
}
template <> inline __attribute__((always_inline)) Wide<double>::T widen<double>(const uint16_t* p) { return (Wide<double>::T)_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)p)); }
#elif defined(__AVX512F__) && MEMOKERN_VBYTES == 64  // masked: the plain ones warn of their own undefined operand
template <> inline __attribute__((always_inline)) Wide<float>::T widen<float>(const uint8_t* p) { return (Wide<float>::T)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128((const __m128i*)p)); }
template <> inline __attribute__((always_inline)) Wide<float>::T widen<float>(const uint16_t* p) { return (Wide<float>::T)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i*)p)); }
template <> inline __attribute__((always_inline)) Wide<double>::T widen<double>(const uint8_t* p) { return (Wide<double>::T)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
template <> inline __attribute__((always_inline)) Wide<double>::T widen<double>(const uint16_t* p) { return (Wide<double>::T)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
#endif
template <class R> struct Convert<R, uint8_t> {  // signed: the ISA has that conversion to float
  MK_INLINE typename Vec<R>::T vec(const uint8_t* p) {
    typedef int32_t I32 __attribute__((vector_size(Vec<R>::W * 4)));
    return __builtin_convertvector((I32)widen<R>(p), typename Vec<R>::T);
  }
};
template <class R> struct Convert<R, BF16> {
  MK_INLINE typename Vec<R>::T vec(const BF16* p) {
    typedef float F __attribute__((vector_size(Vec<R>::W * 4)));
    return __builtin_convertvector((F)(widen<R>((const uint16_t*)p) << 16), typename Vec<R>::T);
  }
};
template <class R> struct Convert<R, F16> {
  MK_INLINE typename Vec<R>::T vec(const F16* p) {
    typedef typename Wide<R>::T U32;
    typedef float F __attribute__((vector_size(Vec<R>::W * 4)));
    U32 h = widen<R>((const uint16_t*)p);
    U32 mag = (h & 0x7fffu) << 13;
    F f = (F)mag * 5.192296858534828e33f;  // 2^112 moves the exponent bias; subnormals come out right
    U32 bits = (U32)f | ((h & 0x8000u) << 16);
    U32 special = (U32)(mag >= 0x0f800000u);  // inf and NaN keep an exponent of all ones
    bits |= special & 0x7f800000u;
    return __builtin_convertvector((F)bits, typename Vec<R>::T);
  }
};
#if defined(__F16C__) && MEMOKERN_VBYTES == 32
template <> struct Convert<float, F16> {
  MK_INLINE Vec<float>::T vec(const F16* p) { return (Vec<float>::T)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
};
#elif defined(__AVX512F__) && MEMOKERN_VBYTES == 64
template <> struct Convert<float, F16> {
  MK_INLINE Vec<float>::T vec(const F16* p) { return (Vec<float>::T)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p)); }
};
#endif

// Rounds v here: without it the compiler may fuse a product into the next sum, and an exact hit would not be exact.
#if defined(__x86_64__) && (MEMOKERN_VBYTES < 64 || defined(__AVX512F__))
#define MK_ROUND(v) __asm__("" : "+x"(v))
#elif defined(__aarch64__)
#define MK_ROUND(v) __asm__("" : "+w"(v))
#else
#define MK_ROUND(v) __asm__("" : "+m"(v))
#endif

MK_INLINE int64_t imin(int64_t a, int64_t b) { return a < b ? a : b; }
MK_INLINE int64_t imax(int64_t a, int64_t b) { return a > b ? a : b; }
MK_INLINE int64_t round_up(int64_t a, int64_t m) { return (a + m - 1) / m * m; }
MK_INLINE double dmax(double a, double b) { return a > b ? a : b; }
MK_INLINE double dmin(double a, double b) { return a < b ? a : b; }
static const double kInf = __builtin_inf();

// A few zeroed arrays in one aligned block; freed together. ok() tells whether the memory was there.
class Arena {
 public:
  Arena() : base_(nullptr), size_(0), used_(0) {}
  ~Arena() { free(base_); }
  template <class T> static int64_t bytes(int64_t n) { return round_up(n * (int64_t)sizeof(T), 64) + 64; }
  bool reserve(int64_t size) {
    size_ = round_up(size, 64) + 64;
    if (posix_memalign(&base_, 64, size_) != 0) base_ = nullptr;
    return base_ != nullptr;
  }
  template <class T> T* take(int64_t n) {
    T* p = (T*)((char*)base_ + used_);
    used_ += bytes<T>(n);
    memset(p, 0, n * sizeof(T));
    return p;
  }
 private:
  Arena(const Arena&);
  void* base_;
  int64_t size_, used_;
};

} }  // namespace
