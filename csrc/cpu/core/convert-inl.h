// From stored numbers to vectors of the compute type: Convert<R, S>::vec(p) reads W numbers of type S as a
// vector of R.
#pragma once
#include "cpu/core/vec-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

template <class R, class S, int W>
struct RawVec {
  typedef S T __attribute__((vector_size(W * sizeof(S)), aligned(1), may_alias));
};

template <class R, class S>
struct Convert {  // float and double
  MK_INLINE typename Vec<R>::T vec(const S* p) {
    typedef typename RawVec<R, S, Vec<R>::W>::T Raw;
    return __builtin_convertvector(*(const Raw*)p, typename Vec<R>::T);
  }
};

// Unsigned integers to W lanes of 32 bits. The intrinsics are there because GCC 12 takes the generic form
// apart into scalars, at eight times the cost.
template <class R>
struct Wide {
  typedef uint32_t T __attribute__((vector_size(Vec<R>::W * 4)));
};
template <class R, class S>
MK_INLINE typename Wide<R>::T widen(const S* p) {
  typedef typename RawVec<R, S, Vec<R>::W>::T Raw;
  return __builtin_convertvector(*(const Raw*)p, typename Wide<R>::T);
}
#define MK_INLINE_SPECIAL \
  template <>             \
  inline __attribute__((always_inline))
#if defined(__AVX2__) && MEMOKERN_VBYTES == 32
MK_INLINE_SPECIAL Wide<float>::T widen<float>(const uint8_t* p) {
  return (Wide<float>::T)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
}
MK_INLINE_SPECIAL Wide<float>::T widen<float>(const uint16_t* p) {
  return (Wide<float>::T)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
}
MK_INLINE_SPECIAL Wide<double>::T widen<double>(const uint8_t* p) {
  int32_t four;
  memcpy(&four, p, sizeof four);
  return (Wide<double>::T)_mm_cvtepu8_epi32(_mm_cvtsi32_si128(four));
}
MK_INLINE_SPECIAL Wide<double>::T widen<double>(const uint16_t* p) {
  return (Wide<double>::T)_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)p));
}
#elif defined(__AVX512F__) && MEMOKERN_VBYTES == 64
// The masked forms stand here because GCC warns of an undefined operand inside the plain ones.
MK_INLINE_SPECIAL Wide<float>::T widen<float>(const uint8_t* p) {
  return (Wide<float>::T)_mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128((const __m128i*)p));
}
MK_INLINE_SPECIAL Wide<float>::T widen<float>(const uint16_t* p) {
  return (Wide<float>::T)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i*)p));
}
MK_INLINE_SPECIAL Wide<double>::T widen<double>(const uint8_t* p) {
  return (Wide<double>::T)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
}
MK_INLINE_SPECIAL Wide<double>::T widen<double>(const uint16_t* p) {
  return (Wide<double>::T)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
}
#endif
#undef MK_INLINE_SPECIAL

// Floats, as many as a vector of R has numbers.
template <class R>
struct Floats {
  typedef float T __attribute__((vector_size(Vec<R>::W * 4)));
};
template <class R>
MK_INLINE typename Floats<R>::T floats(const float* p) {
  return *(const typename RawVec<R, float, Vec<R>::W>::T*)p;
}
template <class R>
MK_INLINE typename Floats<R>::T floats(const uint8_t* p) {
  // As signed integers, because x86 has an instruction that makes floats of those.
  typedef int32_t I32 __attribute__((vector_size(Vec<R>::W * 4)));
  return __builtin_convertvector((I32)widen<R>(p), typename Floats<R>::T);
}
template <class R>
MK_INLINE typename Floats<R>::T floats(const BF16* p) {
  return (typename Floats<R>::T)(widen<R>((const uint16_t*)p) << 16);
}
// Half precision is taken apart bit by bit where the instruction set cannot convert it.
template <class R>
MK_INLINE typename Floats<R>::T floats(const F16* p) {
  typedef typename Wide<R>::T U32;
  typedef typename Floats<R>::T F;
  U32 h = widen<R>((const uint16_t*)p);
  U32 mag = (h & 0x7fffu) << 13;
  // 2^112 moves the exponent's bias, and makes subnormals come out right.
  F f = (F)mag * 5.192296858534828e33f;
  U32 bits = (U32)f | ((h & 0x8000u) << 16);
  U32 special = (U32)(mag >= 0x0f800000u);  // inf and NaN keep an exponent of all ones
  bits |= special & 0x7f800000u;
  return (F)bits;
}

template <class R>
struct Convert<R, uint8_t> {
  MK_INLINE typename Vec<R>::T vec(const uint8_t* p) {
    return __builtin_convertvector(floats<R>(p), typename Vec<R>::T);
  }
};
template <class R>
struct Convert<R, BF16> {
  MK_INLINE typename Vec<R>::T vec(const BF16* p) {
    return __builtin_convertvector(floats<R>(p), typename Vec<R>::T);
  }
};
template <class R>
struct Convert<R, F16> {
  MK_INLINE typename Vec<R>::T vec(const F16* p) {
    return __builtin_convertvector(floats<R>(p), typename Vec<R>::T);
  }
};
#if defined(__F16C__) && MEMOKERN_VBYTES == 32
template <>
struct Convert<float, F16> {
  MK_INLINE Vec<float>::T vec(const F16* p) {
    return (Vec<float>::T)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  }
};
#elif defined(__AVX512F__) && MEMOKERN_VBYTES == 64
template <>
struct Convert<float, F16> {
  MK_INLINE Vec<float>::T vec(const F16* p) {
    return (Vec<float>::T)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
  }
};
#endif

// Stored numbers as the values that they stand for, data * scale + shift: one definition, that of
// `dequantized` in memokern/calls/values.py. Each operation is rounded, to float unless the rows are double.
template <class S>
struct Value {
  MK_INLINE Vec<double>::T vec(const S* p, double scale, double shift) {
    Floats<double>::T y = floats<double>(p) * (float)scale;
    MK_ROUND(y);
    y += (float)shift;
    MK_ROUND(y);
    return __builtin_convertvector(y, Vec<double>::T);
  }
};
template <>
struct Value<double> {
  MK_INLINE Vec<double>::T vec(const double* p, double scale, double shift) {
    Vec<double>::T y = load(p) * scale;
    MK_ROUND(y);
    y += shift;
    MK_ROUND(y);
    return y;
  }
};
// The same in the compute type.
template <class R, class S>
struct ValueIn {
  MK_INLINE typename Vec<R>::T vec(const S* p, double scale, double shift) {
    typename Vec<R>::T y = Convert<R, S>::vec(p) * (R)scale;
    MK_ROUND(y);
    y += (R)shift;
    MK_ROUND(y);
    return y;
  }
};
template <class S>
struct ValueIn<double, S> {
  MK_INLINE Vec<double>::T vec(const S* p, double scale, double shift) {
    return Value<S>::vec(p, scale, shift);
  }
};

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
