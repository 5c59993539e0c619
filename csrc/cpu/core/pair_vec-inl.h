// Vectors of 16-bit integers in pairs: what the products of pairs-inl.h and pair_dots-inl.h need of an
// instruction set.
//
// With AVX2 an instruction multiplies and another adds to the sum, on a pipe that does not multiply. With
// AVX-512 products and sums share two pipes: the two instructions take as long as the two multiply-adds of
// floats that they stand for, and nothing is gained. VNNI has one instruction for both, vpdpwssd. It is an
// extension of either set, which not every processor has.
#pragma once
#include "cpu/core/vec-inl.h"
#if defined(__AVX2__)
#include <cpuid.h>
#endif

#if defined(__AVX2__) && MEMOKERN_VBYTES >= 32
#define MK_WHOLE_ROWS 1
#else
#define MK_WHOLE_ROWS 0
#endif

namespace memokern {
namespace MEMOKERN_ISA_NS {

// GNU's assembler knows vpdpwssd with AVX2 since binutils 2.36; an older one takes `other` instead. Clang has
// an assembler of its own, which is as new as Clang.
#if defined(__clang__)
#define MK_VEX_VNNI(code, other) code
#else
#define MK_VEX_VNNI(code, other) ".if .gasversion. >= 23600\n\t" code "\n\t.else\n\t" other "\n\t.endif"
#endif

// Whether this processor has VNNI in the width of this source.
static inline bool has_vnni() {
#if defined(__AVX512F__) && MEMOKERN_VBYTES == 64
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512vnni");
#elif defined(__AVX2__) && MEMOKERN_VBYTES == 32
  // Not every compiler has a name for it. It is asked once because a virtual machine takes long to answer.
  static const bool found = [] {
    unsigned a, b, c, d, known;
    __asm__(MK_VEX_VNNI("movl $1, %[known]", "movl $0, %[known]") : [known] "=r"(known));
    if (!known || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || a < 1) return false;
    __cpuid_count(7, 1, a, b, c, d);
    return (a >> 4 & 1) != 0;
  }();
  return found;
#else
  return false;
#endif
}
// Whether products of integers pay on this processor.
MK_INLINE bool has_pairs() {
#if defined(__AVX512F__) && MEMOKERN_VBYTES == 64
  return has_vnni();
#else
  return MK_WHOLE_ROWS;
#endif
}

#if MK_WHOLE_ROWS
// As those of float: T the vector, U the same at any address.
template <>
struct Vec<int16_t> {
  typedef int16_t T __attribute__((vector_size(MEMOKERN_VBYTES)));
  typedef int16_t U __attribute__((vector_size(MEMOKERN_VBYTES), aligned(2), may_alias));
  enum { W = MEMOKERN_VBYTES / 2 };
};
template <>
struct Vec<int32_t> {
  typedef int32_t T __attribute__((vector_size(MEMOKERN_VBYTES)));
  typedef int32_t U __attribute__((vector_size(MEMOKERN_VBYTES), aligned(4), may_alias));
  enum { W = MEMOKERN_VBYTES / 4 };
};
typedef Vec<int16_t>::T Shorts;
typedef Vec<int32_t>::T Pairs;  // of 16 bits each, or sums of their products

// Of these an instruction set has its own:
//   shorts_of(p)  bytes as numbers of 16 bits
//   wide_of(p)    numbers of 16 bits as such of 32
//   floor_of(x)   floats rounded down
// and how sums are made, Plain on every processor with products of integers, Vnni where has_vnni():
//   add(a, b, sum)              sum += a b: of each pair both products
//   add(a, b0, b1, sum0, sum1)  the same with two vectors, whose sums are apart
#if defined(__AVX512F__) && MEMOKERN_VBYTES == 64
// As in convert-inl.h, GCC takes the generic conversions apart, and warns of the plain intrinsics.
MK_INLINE Shorts shorts_of(const uint8_t* p) {
  return (Shorts)_mm512_maskz_cvtepu8_epi16(0xffffffff, _mm256_loadu_si256((const __m256i*)p));
}
MK_INLINE Pairs wide_of(const int16_t* p) {
  return (Pairs)_mm512_maskz_cvtepi16_epi32(0xffff, _mm256_loadu_si256((const __m256i*)p));
}
MK_INLINE Vec<float>::T floor_of(Vec<float>::T x) { return _mm512_floor_ps(x); }
#define MK_VPDPWSSD "vpdpwssd %[b], %[a], %[sum]"
struct Vnni;
typedef Vnni Plain;  // as there is no product of integers without it
#elif MEMOKERN_VBYTES == 32
MK_INLINE Shorts shorts_of(const uint8_t* p) {
  return (Shorts)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
}
MK_INLINE Pairs wide_of(const int16_t* p) {
  return (Pairs)_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)p));
}
MK_INLINE Vec<float>::T floor_of(Vec<float>::T x) { return _mm256_floor_ps(x); }
// The instructions stand here as they are because GCC, which would order them by itself, keeps half of the
// sums in memory.
struct Plain {
  MK_INLINE void add(Pairs a, Pairs b0, Pairs b1, Pairs& sum0, Pairs& sum1) {
    Pairs t;
    __asm__ volatile(
        "vpmaddwd %[b0], %[a], %[t]\n\t"
        "vpmaddwd %[b1], %[a], %[a]\n\t"
        "vpaddd %[t], %[sum0], %[sum0]\n\t"
        "vpaddd %[a], %[sum1], %[sum1]"
        : [sum0] "+x"(sum0), [sum1] "+x"(sum1), [a] "+x"(a), [t] "=&x"(t)
        : [b0] "x"(b0), [b1] "x"(b1));
  }
  MK_INLINE void add(Pairs a, Pairs b, Pairs& sum) {
    __asm__ volatile(
        "vpmaddwd %[b], %[a], %[a]\n\t"
        "vpaddd %[a], %[sum], %[sum]"
        : [sum] "+x"(sum), [a] "+x"(a)
        : [b] "x"(b));
  }
};
// Without {vex} the assembler takes it for an instruction of AVX-512.
#define MK_VPDPWSSD MK_VEX_VNNI("%{vex%} vpdpwssd %[b], %[a], %[sum]", "ud2")
#else  // the width of AVX-512 with the instructions of AVX2, for tests
struct Halves {
  __m256i v[2];
};
MK_INLINE Shorts shorts_of(const uint8_t* p) {
  typedef uint8_t Bytes __attribute__((vector_size(MEMOKERN_VBYTES / 2), aligned(1), may_alias));
  return __builtin_convertvector(*(const Bytes*)p, Shorts);
}
MK_INLINE Pairs wide_of(const int16_t* p) {
  typedef int16_t Half __attribute__((vector_size(MEMOKERN_VBYTES / 2), aligned(2), may_alias));
  return __builtin_convertvector(*(const Half*)p, Pairs);
}
MK_INLINE Vec<float>::T floor_of(Vec<float>::T x) {
  for (int i = 0; i < Vec<float>::W; i++) x[i] = __builtin_floorf(x[i]);
  return x;
}
struct Plain {
  MK_INLINE void add(Pairs a, Pairs b, Pairs& sum) {
    Halves x, y, s;
    memcpy(&x, &a, sizeof x);
    memcpy(&y, &b, sizeof y);
    memcpy(&s, &sum, sizeof s);
    for (int i = 0; i < 2; i++) s.v[i] = _mm256_add_epi32(s.v[i], _mm256_madd_epi16(x.v[i], y.v[i]));
    memcpy(&sum, &s, sizeof s);
  }
  MK_INLINE void add(Pairs a, Pairs b0, Pairs b1, Pairs& sum0, Pairs& sum1) {
    add(a, b0, sum0);
    add(a, b1, sum1);
  }
};
#endif

#ifdef MK_VPDPWSSD
// The instruction stands here as it is because not every processor that this source is compiled for has it.
struct Vnni {
  MK_INLINE void add(Pairs a, Pairs b, Pairs& sum) {
    __asm__ volatile(MK_VPDPWSSD : [sum] "+v"(sum) : [a] "v"(a), [b] "v"(b));
  }
  MK_INLINE void add(Pairs a, Pairs b0, Pairs b1, Pairs& sum0, Pairs& sum1) {
    add(a, b0, sum0);
    add(a, b1, sum1);
  }
};
#else
typedef Plain Vnni;
#endif

MK_INLINE Vec<float>::T floats_of(Pairs v) { return __builtin_convertvector(v, Vec<float>::T); }
// Whole numbers that 16 bits hold.
MK_INLINE void store_whole(int16_t* p, Vec<float>::T v) {
  typedef int16_t Half __attribute__((vector_size(MEMOKERN_VBYTES / 2), aligned(2), may_alias));
  *(Half*)p = __builtin_convertvector(__builtin_convertvector(v, Pairs), Half);
}
#endif

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
