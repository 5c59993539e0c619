// Vectors of the instruction set that a source file is compiled for. Two macros, set by the file that
// includes this one, choose it: MEMOKERN_ISA_NS is the namespace of its kernels, MEMOKERN_VBYTES the bytes of
// a vector.
//
// The vectors are those of GCC and Clang. Nothing here, nor in any file that includes this one, comes from
// the C++ library, and every function is `static` or in the namespace of its instruction set. The reason is
// that the linker keeps one copy of an inline function for all source files that have it, and that could be
// the copy compiled for AVX-512.
#pragma once
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include "memokern/abi.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

#define MK_INLINE static inline __attribute__((always_inline))

// R is the compute type, float or double. T is a vector of it, U the same at any address, I a vector of
// integers of the same width, Bits the same without a sign, whose sums may wrap, W how many numbers a vector
// has.
template <class R>
struct Vec;
template <>
struct Vec<float> {
  typedef float T __attribute__((vector_size(MEMOKERN_VBYTES)));
  typedef float U __attribute__((vector_size(MEMOKERN_VBYTES), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(MEMOKERN_VBYTES)));
  typedef uint32_t Bits __attribute__((vector_size(MEMOKERN_VBYTES)));
  enum { W = MEMOKERN_VBYTES / 4 };
};
template <>
struct Vec<double> {
  typedef double T __attribute__((vector_size(MEMOKERN_VBYTES)));
  typedef double U __attribute__((vector_size(MEMOKERN_VBYTES), aligned(8), may_alias));
  typedef int64_t I __attribute__((vector_size(MEMOKERN_VBYTES)));
  typedef uint64_t Bits __attribute__((vector_size(MEMOKERN_VBYTES)));
  enum { W = MEMOKERN_VBYTES / 8 };
};

template <class R>
MK_INLINE typename Vec<R>::T load(const R* p) {
  return *(const typename Vec<R>::U*)p;
}
template <class R>
MK_INLINE void store(R* p, typename Vec<R>::T v) {
  *(typename Vec<R>::U*)p = v;
}
template <class R>
MK_INLINE typename Vec<R>::T splat(R a) {
  return a - (typename Vec<R>::T){};
}

// a > b ? a : b, which is b where a is NaN. The processor has an instruction for it that GCC does not find by
// itself.
template <class V>
MK_INLINE V vmax(V a, V b) {
  return a > b ? a : b;
}
template <class V>
MK_INLINE V vmin(V a, V b) {
  return a < b ? a : b;
}
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

// The sum of all lanes, added up in double.
template <class R>
MK_INLINE double hsum(typename Vec<R>::T v) {
  double s = 0;
  for (int i = 0; i < Vec<R>::W; i++) s += v[i];
  return s;
}

// Rounds v at this point: without it the compiler may fuse a product into the next sum, and then the distance
// of an exact hit would not be 0. It also keeps v in a register, where GCC would load it again for each use.
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

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
