// Exponentials of vectors, with bounds on their errors that tests/ checks over the whole range.
#pragma once
#include "cpu/core/vec-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

// p 2^n with n in the low bits of z. Where n is out of range the sum wraps, and the caller takes 0 instead.
template <class R>
MK_INLINE typename Vec<R>::T times_power(typename Vec<R>::T p, typename Vec<R>::T z) {
  typedef typename Vec<R>::Bits B;
  return (typename Vec<R>::T)((B)p + ((B)z << (sizeof(R) == 4 ? 23 : 52)));
}

// 2^n e^r for |r| <= ln(2) / 2 with n in the low bits of z; 0 where `zero`. In float the polynomial is the
// best one of degree 6 that begins with 1 + r, and off by 3e-9; in double it is Taylor's of degree 13. Terms
// are added in pairs, because the loops that call this wait for its latency and not for its operations.
MK_INLINE Vec<float>::T exp_of_remainder(Vec<float>::T r, Vec<float>::T z, Vec<float>::I zero) {
  typedef Vec<float>::T V;
  V r2 = r * r;
  V p = (r2 * 1.38146e-3f + (r * 8.36871e-3f + 4.166839e-2f)) * r2 + (r * 1.6666521e-1f + 4.9999993e-1f);
  p = p * r2 + (r + 1.0f);
  return (V)((Vec<float>::I)times_power<float>(p, z) & ~zero);
}
MK_INLINE Vec<double>::T exp_of_remainder(Vec<double>::T r, Vec<double>::T z, Vec<double>::I zero) {
  typedef Vec<double>::T V;
  V r2 = r * r, r4 = r2 * r2;
  V low = (r * (1.0 / 120.0) + (1.0 / 24.0)) * r2 + (r * (1.0 / 6.0) + 0.5);
  V mid = (r * (1.0 / 362880.0) + (1.0 / 40320.0)) * r2 + (r * (1.0 / 5040.0) + (1.0 / 720.0));
  V high =
      (r * (1.0 / 6227020800.0) + (1.0 / 479001600.0)) * r2 + (r * (1.0 / 39916800.0) + (1.0 / 3628800.0));
  V p = ((high * r4 + mid) * r4 + low) * r2 + r + 1.0;
  return (V)((Vec<double>::I)times_power<double>(p, z) & ~zero);
}

// exp(x) for x <= 88, with a relative error below 2e-7; 0 where x is below `least`, which is -87 or more.
MK_INLINE Vec<float>::T vexp(Vec<float>::T x, float least = -87.0f) {
  typedef Vec<float>::T V;
  const float magic = 12582912.0f;  // 1.5 * 2^23: a sum with it is an integer, left in the low bits
  V z = x * 1.44269504088896341f + magic;
  V n = z - magic;
  V r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  return exp_of_remainder(r, z, x < least);
}
// The same in double, with a relative error below 1e-15; `least` must be -708 or more.
MK_INLINE Vec<double>::T vexp(Vec<double>::T x, double least = -708.0) {
  typedef Vec<double>::T V;
  const double magic = 6755399441055744.0;  // 1.5 * 2^52
  V z = x * 1.4426950408889634074 + magic;
  V n = z - magic;
  V r = x - n * 6.93147180369123816490e-1;
  r = r - n * 1.90821492927058770002e-10;
  return exp_of_remainder(r, z, x < least);
}

// 2^x for lowest_power <= x <= 0. Its reduction is exact and cheaper than that of vexp. In float the
// polynomial is the best one of degree 5 that is 1 at 0, off by 9.2e-8; with three roundings the relative
// error is below 2.7e-7. In double it is below 1e-15.
MK_INLINE float lowest_power(float) { return -126.0f; }
MK_INLINE double lowest_power(double) { return -1022.0; }
MK_INLINE Vec<float>::T vexp2(Vec<float>::T x) {
  typedef Vec<float>::T V;
  const float magic = 12582912.0f;
  V z = x + magic, r = x - (z - magic), r2 = r * r;
  V p = (r * 1.32647e-3f + 9.67151e-3f) * r2 + (r * 5.550734e-2f + 2.4022242e-1f);
  p = p * r2 + (r * 6.9314698e-1f + 1.0f);
  return times_power<float>(p, z);
}
MK_INLINE Vec<double>::T vexp2(Vec<double>::T x) {
  const double magic = 6755399441055744.0;
  Vec<double>::T z = x + magic;
  return exp_of_remainder((x - (z - magic)) * 0.6931471805599453094, z, Vec<double>::I{});
}

// A row whose logit is farther below the largest than this has weight 0. Differences are clamped to it, so
// that 0 * (l - m) stays finite where l is -inf.
MK_INLINE float least_difference(float) { return -100.0f; }
MK_INLINE double least_difference(double) { return -800.0; }

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
