// What a sweep knows of a query, and the error of its logits.
#pragma once
#include "cpu/core/tile-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

// How a query weighs the rows: by a softmax of its logits; by the nearest row alone (sigma = 0, or so small
// that logits would overflow); by weighting "log"; or not at all, because one of its numbers is NaN or
// infinite.
enum Mode : int { kSoftmax = 0, kZeroSigma = 1, kLogWeighting = 2, kNotFinite = 3 };

// u: the unit roundoff, rounded up. theta: by how much rounding may change a weight before its row is
// evaluated again; log_theta is its logarithm. tolerance: the error of a logit that the sweep of few features
// may have (small-inl.h). big: the largest factor or error that is computed with; safe: up to which square no
// product overflows; steepest: up to which 1 / (sigma^2 T) no logit of a row overflows in double.
template <class R>
struct Precision;
template <>
struct Precision<float> {
  static constexpr double u = 5.97e-8, theta = 1e-6, log_theta = -13.9, tolerance = 2e-5, big = 1e30,
                          safe = 1e37, steepest = 1e150;
};
template <>
struct Precision<double> {
  static constexpr double u = 1.12e-16, theta = 1e-13, log_theta = -30, tolerance = 1e-11, big = 1e280,
                          safe = 1e300, steepest = 1e280;
};

// A tile's logits are handled as t = (l + |xc|^2 / (2 sigma^2)) / T, which is l / T without the part that all
// rows share, so that a float holds what differs. At sigma = 0, and with weighting "log", t is half of
// |xc|^2 - r^2.
template <class R>
struct Query {
  const R* x;  // [D] as given
  double d;    // D
  Mode mode;
  double alpha, sigma, temperature, inv_t;
  double xx;              // |xc|^2
  double a1, a2;          // t = a1 <xc, yc> - a2 |yc|^2 + b / T
  double shared;          // |xc|^2 / (2 sigma^2 T): l / T = t - shared, or relative to `from`
  double from;            // of a softmax, the squared distance whose logit the others count from, or 0
  double e0, e1, e2, e3;  // the error of t is e0 + e1 |yc| + e2 |yc|^2 + e3 |b|,
  double i0, i1, r1;      // i0 + i1 |yc| more in integers, and r1 instead of e1 where that was refined
  int index, lane;        // in its block, and among the queries that are weighed together
  double b_max;           // where each query has a bias of its own, the largest |b| in the tile
};

// Estimates the error of t where weights are smooth. A product of two centred and rounded vectors, whose
// terms go through K additions, is off by about u |xc||yc| (4 + sqrt(K) / 2): the rounding of both vectors,
// and of partial sums that grow along K as those of coherent vectors do. Roundings are taken as independent
// (Higham and Mary, 2019). The norm and the bias are rounded once. So is the offset, which shifts all rows
// alike. `hit` is for exact hits: two vectors whose direct difference is 0 need not be equal once both are
// centred.
template <class R>
static void estimate_error(const Plan& pl, const Source<R>& src, Query<R>& q) {
  const double u = Precision<R>::u, c = 4 + 0.5 * __builtin_sqrt((double)pl.depth), x = __builtin_sqrt(q.xx);
  const double hit = 4.5e-16 * __builtin_fabs(q.alpha) * src.center_norms;
  // A query at the center sees no rounding of the rows in its logits, but in its residual.
  const double seen = q.mode == kSoftmax ? dmax(x, q.sigma * __builtin_sqrt(q.temperature)) : x;
  q.e0 = __builtin_fabs(q.a1) * src.center_norms * seen * (src.unit == 1 ? 0 : 3 * u) +
         (q.mode == kSoftmax ? 0 : hit * (x + hit));
  q.e1 = c * u * __builtin_fabs(q.a1) * x;
  q.e2 = 4 * u * q.a2;
  q.e3 = q.mode == kSoftmax ? 2 * u * q.inv_t : 0;  // weighting "log" adds the bias in double
}

// Bounds the error of t where the nearest row must be found (nearest, and sigma = 0), for any data. With
// a = |alpha| and C = center_norms, the parts of the bound are:
// - the product: K additions, the product itself, xc, scale xc, yc and the two roundings of t, which are
//   (K + 8) u a |xc||yc|;
// - a row, raw + offset with both rounded, and its value, rounded to float: |d yc| <= 4 u (|yc| + C), since
//   |raw scale| <= |yc| + C;
// - its norm: K additions where the tile adds it up, (K + 8) u / 2 a^2 |yc|^2, and d yc again;
// - in double: x - alpha center and x - alpha y (`hit`), and (D + 16) 2^-53 of |xc|^2 and of r^2, of which
//   nearness() takes the latter.
//
// Terms of second order are below a hundredth of these as long as K u < 0.005, that is D < 600,000 in float.
template <class R>
static void bound_error(const Plan& pl, const Source<R>& src, Query<R>& q) {
  const double u = 1.01 * Precision<R>::u, a = __builtin_fabs(q.alpha), x = __builtin_sqrt(q.xx),
               k = pl.depth + 8;
  const double hit = 4.5e-16 * a * src.center_norms;
  q.e0 = 4 * u * src.center_norms * a * x + hit * (x + hit) + (pl.D + 16) * 1.2e-16 * q.xx;
  q.e1 = u * a * ((k + 4) * x + 4 * src.center_norms * a);
  q.e2 = 0.5 * u * a * a * (k + 8);
  q.e3 = 0;
}

// Whether what query b asks of conditions, if anything, is finite.
static bool has_condition(const Queries& in, int64_t b) {
  const Conditions& c = in.conditions;
  double all = 0;
  for (int64_t i = b * c.k; c.rows && i < (b + 1) * c.k; i++) all += 0 * c.c[i] + 0 * c.a[i];
  return all == 0 && (!c.rows || (c.h[b] >= 0 && c.h[b] < kInf));
}

// Query b; xc [D] receives its vector, centred.
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
  q.mode = in.weighting == kLog ? kLogWeighting : kSoftmax;
  double xx = 0;
  for (int64_t d = 0; d < D; d++) {
    const double v = (double)q.x[d] - q.alpha * src.center[d];
    xc[d] = (R)v;
    xx += v * v;
  }
  q.xx = xx;
  if (!(xx < kInf) || !has_condition(in, b) || !(q.sigma >= 0) || !(q.inv_t > 0) || !(q.inv_t < kInf)) {
    q.mode = kNotFinite;
    for (int64_t d = 0; d < D; d++) xc[d] = 0;
    q.xx = 0;
  }
  double scale = 1;  // 1 / (sigma^2 T) for a softmax
  bool fits = true;  // in the compute type
  if (q.mode == kSoftmax) {
    scale = q.inv_t / q.sigma / q.sigma;
    fits = scale < Precision<R>::big;
    if (!(scale * xx < Precision<R>::big && scale < Precision<R>::steepest)) {
      q.mode = kZeroSigma;
      scale = 1;
      fits = true;
    }
  }
  q.a1 = q.alpha * scale;
  q.a2 = 0.5 * q.alpha * q.alpha * scale;
  q.shared = 0.5 * xx * scale;
  q.from = 0;
  if (q.mode == kZeroSigma)
    bound_error(pl, src, q);
  else
    estimate_error(pl, src, q);
  // Where unit xc might overflow nothing is known, and every row is evaluated exactly. So it is in units in
  // which sigma is very small, and no distance is large beside it.
  if (!fits) q.a1 = q.a2 = 0;
  if (!fits || !(__builtin_sqrt(xx) * __builtin_fabs(src.unit) < Precision<R>::safe)) q.e0 = kInf;
  q.i0 = q.i1 = q.r1 = 0;
  return q;
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
