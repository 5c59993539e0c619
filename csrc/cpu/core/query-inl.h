// What is known of a query, the error of its logits, and its running state with the merge that joins parts.
#pragma once
#include "cpu/core/direct-inl.h"

namespace memokern { namespace MEMOKERN_ISA_NS {

enum Mode : int { kSoft = 0, kHard = 1, kLogMap = 2, kLost = 3 };  // kHard: sigma = 0; kLost: NaN or inf in the query

// The running state of one query: a monoid under merge(). `key` orders limits: among states only the smallest key
// counts (the squared distance when sigma = 0; in the log kernel 0 for an exact hit, else 1; otherwise always 0).
struct State {
  double key, m, s, st, sb, sw2;  // s = sum e^(t-m), st = sum e^(t-m) (t-m), sb = sum e^(t-m) b, sw2 = sum e^(2(t-m))
};
MK_INLINE State neutral() { State z = {kInf, -kInf, 0, 0, 0, 0}; return z; }
// What the sums of a state must be multiplied by when its largest logit becomes m.
MK_INLINE double rescale(State& a, double m) {
  if (a.s == 0) { a.m = m; return 0; }
  if (a.m == m) return 1;
  const double f = __builtin_exp(a.m - m), shift = a.m - m;
  a.st = f > 0 ? f * (a.st + a.s * shift) : 0;
  a.s *= f;
  a.sb *= f;
  a.sw2 *= f * f;
  a.m = m;
  return f;
}
// a := a (+) b; fa, fb: what their accumulators are multiplied by.
MK_INLINE void merge(State& a, State b, double& fa, double& fb) {
  if (b.s == 0 || a.key < b.key) { fa = 1; fb = 0; return; }
  if (a.s == 0 || b.key < a.key) { a = b; fa = 0; fb = 1; return; }
  const double m = dmax(a.m, b.m);
  fa = rescale(a, m);
  fb = rescale(b, m);
  a.s += b.s;
  a.st += b.st;
  a.sb += b.sb;
  a.sw2 += b.sw2;
}

template <class R> struct Precision;
template <> struct Precision<float> { static constexpr double u = 5.97e-8, theta = 1e-6, log_theta = -13.9, tolerance = 2e-5, big = 1e30, safe = 1e37; };
template <> struct Precision<double> { static constexpr double u = 1.12e-16, theta = 1e-13, log_theta = -30, tolerance = 1e-11, big = 1e280, safe = 1e300; };

template <class R> struct Query {
  const R* x;            // [D] as given
  double d;              // D
  Mode mode;
  double alpha, sigma, temperature, inv_t;
  double xx;             // |xc|^2
  double a1, a2;         // t = a1 <xc, yc> - a2 |yc|^2 + b / T
  double xxt;            // |xc|^2 / (2 sigma^2 T)
  double e0, e1, e2, e3; // err = e0 + e1 |yc| + e2 |yc|^2 + e3 |b|
};

// Error of t where weights are smooth. A product of two centred and rounded vectors, whose terms go through K additions,
// is off by about u |xc||yc| (4 + sqrt(K) / 2): the rounding of the inputs, and partial sums that grow along K (for
// coherent vectors; roundings are taken as independent: Higham & Mary 2019). The norm and the bias are rounded once;
// so is the offset, which shifts all rows alike. `hit`: a direct difference of 0 need not be one when centred.
template <class R> static void estimate_query(const Plan& pl, const Source<R>& src, Query<R>& q) {
  const double u = Precision<R>::u, c = 4 + 0.5 * __builtin_sqrt((double)pl.depth), x = __builtin_sqrt(q.xx);
  const double hit = 4.5e-16 * __builtin_fabs(q.alpha) * src.pad;
  q.e0 = __builtin_fabs(q.a1) * src.pad * x * (src.rows.scale == 1 ? 0 : 2 * u) + (q.mode == kSoft ? 0 : hit * (x + hit));
  q.e1 = c * u * __builtin_fabs(q.a1) * x;
  q.e2 = 4 * u * q.a2;
  q.e3 = q.mode == kSoft ? 2 * u * q.inv_t : 0;  // the log kernel adds it in double
}
// The same where the nearest row must be found (sigma = 0): an upper bound, for any data. With a = |alpha|:
//   the product: K additions, the product itself, xc, scale xc, yc, and t's own two roundings: (K + 8) u a |xc||yc|
//   a row: raw + offset, with raw and offset rounded: |d yc| <= 4 u (|yc| + pad), since |raw scale| <= |yc| + pad
//   its norm: K additions where the tile sums it: (K + 8) u / 2 a^2 |yc|^2, and d yc again
//   double: x - alpha center and x - alpha y (`hit`); |xc|^2 and r^2: (D + 16) 2^-53 of each, the latter in nearness()
// The terms of second order are below a hundredth of these as long as K u < 0.005, that is D < 600,000 in float.
template <class R> static void prove_query(const Plan& pl, const Source<R>& src, Query<R>& q) {
  const double u = 1.01 * Precision<R>::u, a = __builtin_fabs(q.alpha), x = __builtin_sqrt(q.xx), k = pl.depth + 8;
  const double hit = 4.5e-16 * a * src.pad;
  q.e0 = 4 * u * src.pad * a * x + hit * (x + hit) + (pl.D + 16) * 1.2e-16 * q.xx;
  q.e1 = u * a * ((k + 4) * x + 4 * src.pad * a);
  q.e2 = 0.5 * u * a * a * (k + 8);
  q.e3 = 0;
}

// xc [D]: the query, centred.
template <class R>
static Query<R> make_query(const Queries& in, const Source<R>& src, int64_t b, const Plan& pl, R* xc) {
  const int64_t D = pl.D;
  Query<R> q;
  q.x = (const R*)in.x + b * D;
  q.d = (double)D;
  q.alpha = in.alpha[b];
  q.sigma = in.sigma[b];
  q.temperature = in.temperature[b];
  q.inv_t = 1 / q.temperature;
  q.mode = in.kernel == kLog ? kLogMap : kSoft;
  double xx = 0;
  for (int64_t d = 0; d < D; d++) {
    const double v = (double)q.x[d] - q.alpha * src.center[d];
    xc[d] = (R)v;
    xx += v * v;
  }
  q.xx = xx;
  if (!(xx < kInf) || !(q.sigma >= 0) || !(q.inv_t > 0) || !(q.inv_t < kInf)) {
    q.mode = kLost;
    for (int64_t d = 0; d < D; d++) xc[d] = 0;
    q.xx = 0;
  }
  double scale = 1;  // 1 / (sigma^2 T) in the soft mode
  if (q.mode == kSoft) {
    scale = q.inv_t / q.sigma / q.sigma;
    if (!(scale * (xx + 1) < Precision<R>::big)) {  // sigma = 0, or as good as
      q.mode = kHard;
      scale = 1;
    }
  }
  q.a1 = q.alpha * scale;
  q.a2 = 0.5 * q.alpha * q.alpha * scale;
  q.xxt = 0.5 * xx * scale;
  if (q.mode == kHard) prove_query(pl, src, q); else estimate_query(pl, src, q);
  if (!(__builtin_sqrt(xx) * __builtin_fabs(src.rows.scale) < Precision<R>::safe)) q.e0 = kInf;  // scale xc might overflow
  return q;
}

} }  // namespace
