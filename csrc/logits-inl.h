// From products to weights: what is known of a query, its running state, and one tile's step.
//
// A tile's logits are handled as t = (l + |xc|^2 / (2 sigma^2)) / T: the part that all rows share is left out, so that float
// holds what differs; the state's m has it again, so exact logits lose nothing to it. t is approximate; its error is bounded by `err` (below), and every row whose weight that error
// could change by more than THETA is evaluated again by direct differences in double.
#pragma once
#include "tile-inl.h"

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
template <> struct Precision<float> { static constexpr double u = 5.97e-8, theta = 1e-6, tolerance = 2e-5, big = 1e30, safe = 1e37; };
template <> struct Precision<double> { static constexpr double u = 1.12e-16, theta = 1e-13, tolerance = 1e-11, big = 1e280, safe = 1e300; };

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
// so is the scale, which shifts all rows alike. `hit`: a direct difference of 0 need not be one when centred.
template <class R> static void estimate_query(const Plan& pl, const Source<R>& src, Query<R>& q) {
  const double u = Precision<R>::u, c = 4 + 0.5 * __builtin_sqrt((double)pl.depth), x = __builtin_sqrt(q.xx);
  const double hit = 4.5e-16 * __builtin_fabs(q.alpha) * src.pad;
  q.e0 = __builtin_fabs(q.a1) * src.pad * x * (src.rows.scale == 1 ? 0 : 2 * u) + (q.mode == kSoft ? 0 : hit * (x + hit));
  q.e1 = c * u * __builtin_fabs(q.a1) * x;
  q.e2 = 4 * u * q.a2;
  q.e3 = q.mode == kSoft ? 2 * u * q.inv_t : 0;  // the log kernel adds it in double
}
// The same where the nearest row must be found (sigma = 0): an upper bound, for any data. With a = |alpha|:
//   the product: K additions, the product itself, xc, yc, and t's own two roundings: (K + 8) u a |xc||yc|
//   a row: raw * scale + offset, with scale and offset rounded: |d yc| <= 4 u (|yc| + pad), since |raw scale| <= |yc| + pad
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
  return q;
}

// One tile as the steps see it.
template <class R> struct Step {
  const Source<R>* src;
  typename Exact<R>::F exact;
  const Tile<R>* tile;
  int64_t NT, D;
  const double* bias;   // [N] or null
  const R* b;           // [NT] bias of the tile's rows, or null
  const R* b0;          // [NT] the same with 0 for -inf
  double b_max;         // largest finite |bias|
  int* cand;            // [NT] work space: candidates, and
  double* cand_t;       // [NT] their exact logits (kHard: squared distances)
};

// Infinite where a product could overflow: then every row is evaluated exactly.
template <class R> MK_INLINE double error_of(const Query<R>& q, const Step<R>& s) {
  const double y2 = s.tile->sq_max, err = q.e0 + q.e1 * __builtin_sqrt(y2) + q.e2 * y2 + (s.b ? q.e3 * s.b_max : 0);
  return q.xx < Precision<R>::safe && y2 < Precision<R>::safe && err < Precision<R>::big ? err : kInf;
}
// sigma = 0: below which approximate t = (|xc|^2 - r^2) / 2 a row is surely farther than r^2 = key.
template <class R> MK_INLINE double nearness(const Query<R>& q, double key, double err) {
  return 0.5 * (q.xx - key) - err - (key < kInf ? (q.d + 16) * 1.2e-16 * key : 0);
}
template <class R> MK_INLINE double bias_of(const Step<R>& s, int64_t j) { return s.bias ? s.bias[s.tile->n0 + j] : 0; }
template <class R> MK_INLINE double exact_r2(const Query<R>& q, const Step<R>& s, int64_t j) {
  return s.exact(*s.src, s.tile->n0 + j, q.x, q.alpha);
}
// Below which approximate t a row may be left as it is, given a lower bound of log sum e^t.
template <class R> MK_INLINE double threshold(double lower, double err) {
  return lower + __builtin_log(Precision<R>::theta / dmin(1, err)) - err;
}

// dots to t (they may be the same array); the largest returned. Columns beyond cnt become -inf.
template <class R> MK_INLINE R logits(const Query<R>& q, const Step<R>& s, const R* dot, R* p) {
  enum { W = Vec<R>::W };
  typedef typename Vec<R>::T V;
  const V a1 = splat<R>((R)q.a1), a2 = splat<R>((R)q.a2), it = splat<R>((R)q.inv_t);
  V top = splat<R>((R)-kInf);
  const int64_t full = s.tile->cnt / W * W;
  const bool with_bias = s.b && q.mode != kHard;
  for (int64_t j = 0; j < full; j += W) {
    V t = load(dot + j) * a1 - load(s.tile->sq + j) * a2;
    if (with_bias) t += load(s.b + j) * it;
    store(p + j, t);
    top = vmax(t, top);
  }
  R best = hmax<R>(top);
  for (int64_t j = full; j < s.NT; j++) {
    R t = (R)-kInf;
    if (j < s.tile->cnt) {
      t = dot[j] * (R)q.a1 - s.tile->sq[j] * (R)q.a2;
      if (with_bias) t += s.b[j] * (R)q.inv_t;
    }
    p[j] = t;
    best = t > best ? t : best;
  }
  return best;
}

// p: t in, e^(t - xxt - st.m) out, added to the state. st.m is already the largest.
template <class R> MK_INLINE void exponentials(const Query<R>& q, const Step<R>& s, State& st, R* p) {
  enum { W = Vec<R>::W };
  typedef typename Vec<R>::T V;
  const V m = splat<R>((R)(st.m + q.xxt)), lo = splat<R>(floor_of(R(0)));
  V sum = {}, st_ = {}, sb = {}, sw = {};
  for (int64_t j = 0; j < s.NT; j += W) {  // beyond cnt: t = -inf, weight 0
    V d = load(p + j) - m;
    d = d > lo ? d : lo;  // also where both are -inf
    V w = vexp(d);
    store(p + j, w);
    sum += w;
    st_ += w * d;
    sw += w * w;
    if (s.b0) sb += w * load(s.b0 + j);
  }
  st.s += hsum<R>(sum);
  st.st += hsum<R>(st_);
  st.sw2 += hsum<R>(sw);
  if (s.b0) st.sb += hsum<R>(sb);
}
template <class R> MK_INLINE void add_exact(const Step<R>& s, State& st, R* p, int count) {
  for (int i = 0; i < count; i++) {
    const double d = s.cand_t[i] - st.m, w = __builtin_exp(d);
    p[s.cand[i]] = (R)w;
    if (w == 0) continue;
    st.s += w;
    st.st += w * d;
    st.sw2 += w * w;
    if (s.b0) st.sb += w * (double)bias_of(s, s.cand[i]);
  }
}

// One tile for one query: p [NT] holds dots and becomes weights relative to st.m. Returns the factor for acc.
template <class R> static double step_soft(const Query<R>& q, const Step<R>& s, State& st, R* p) {
  const double top = logits(q, s, p, p);
  const double err = error_of(q, s);
  const bool all = err == kInf;
  st.key = 0;
  if (top == -kInf && !all) {
    for (int64_t j = 0; j < s.NT; j++) p[j] = 0;
    return 1;
  }
  int count = 0;
  double m = dmax(st.m, top - q.xxt);
  if (err > Precision<R>::theta) {
    const double lower = dmax(st.s > 0 ? st.m + q.xxt + __builtin_log(st.s) : -kInf, top - err), lo = threshold<R>(lower, err);
    if (all || top > lo) {
      double rest = -kInf;
      m = st.m;
      for (int64_t j = 0; j < s.tile->cnt; j++) {
        if (all ? bias_of(s, j) == -kInf : !((double)p[j] > lo)) {
          if (all) p[j] = (R)-kInf;
          rest = dmax(rest, p[j]);
          continue;
        }
        s.cand[count] = (int)j;
        s.cand_t[count] = -0.5 * (exact_r2(q, s, j) / q.sigma) / q.sigma * q.inv_t + bias_of(s, j) * q.inv_t;
        m = dmax(m, s.cand_t[count]);
        p[j] = (R)-kInf;
        count++;
      }
      m = dmax(m, rest - q.xxt);
    }
  }
  const double f = st.s > 0 ? rescale(st, m) : (st.m = m, 1.0);
  exponentials(q, s, st, p);
  add_exact(s, st, p, count);
  return f;
}

// sigma = 0: only the nearest row counts, by its exact distance; ties share by their bias.
template <class R> static double step_hard(const Query<R>& q, const Step<R>& s, State& st, R* p) {
  const double top = logits(q, s, p, p), err = error_of(q, s);
  double best = st.key;
  int count = 0;
  // t = (|xc|^2 - r^2) / 2: the approximate top may be an excluded row, so it only bounds when there is no bias.
  const double lo = dmax(nearness(q, st.key, err), s.bias ? -kInf : nearness(q, dmax(0, q.xx - 2 * (top - err)), err));
  for (int64_t j = 0; j < s.tile->cnt; j++) {
    if ((double)p[j] < lo || bias_of(s, j) == -kInf) continue;
    s.cand[count] = (int)j;
    s.cand_t[count] = exact_r2(q, s, j);
    best = dmin(best, s.cand_t[count]);
    count++;
  }
  double f = 1;
  if (best < st.key) {
    st = neutral();
    st.key = best;
    f = 0;
  }
  for (int64_t j = 0; j < s.NT; j++) p[j] = 0;
  int kept = 0;
  double m = st.m;
  for (int i = 0; i < count; i++) {
    if (s.cand_t[i] != best) continue;
    s.cand[kept] = s.cand[i];
    s.cand_t[kept] = bias_of(s, s.cand[i]) * q.inv_t;
    m = dmax(m, s.cand_t[kept]);
    kept++;
  }
  if (kept == 0) return f;
  if (st.s > 0) f *= rescale(st, m); else st.m = m;
  add_exact(s, st, p, kept);
  return f;
}

// The log kernel: error of r^2.
template <class R> MK_INLINE double delta_of(const Query<R>& q, const Step<R>& s) {
  return 2 * error_of(q, s) + 4e-6 * Precision<R>::u * q.xx;
}
// The log kernel: l = -(D/2) log(r^2 / D) + b; an exact hit outweighs everything.
template <class R> static double step_log(const Query<R>& q, const Step<R>& s, State& st, R* p) {
  const double half = 0.5 * (double)s.D, delta = delta_of(q, s);
  double lower = st.s > 0 ? st.m + __builtin_log(st.s) : -kInf;
  for (int64_t j = 0; j < s.tile->cnt; j++) {  // a lower bound from this tile's best row
    const double r2 = q.xx - 2 * ((double)p[j] * q.a1 - (double)s.tile->sq[j] * q.a2) + delta;
    if (st.key != 0 && r2 < kInf) lower = dmax(lower, (bias_of(s, j) - half * __builtin_log(r2 / s.D)) * q.inv_t);
  }
  for (int64_t j = s.tile->cnt; j < s.NT; j++) p[j] = 0;
  int count = 0, hits = 0;
  double m = st.m;
  for (int64_t j = 0; j < s.tile->cnt; j++) {
    const double b = bias_of(s, j);
    double r2 = q.xx - 2 * ((double)p[j] * q.a1 - (double)s.tile->sq[j] * q.a2);
    const double near = r2 - delta;
    p[j] = 0;
    if (b == -kInf) continue;
    const double err = near > 0 ? half * q.inv_t * delta / near : kInf;
    const double high = near > 0 ? (b - half * __builtin_log(near / s.D)) * q.inv_t : kInf;
    if (err > Precision<R>::theta && high > lower + __builtin_log(Precision<R>::theta / dmin(1, err))) r2 = exact_r2(q, s, j);
    if (!(r2 > 0)) {
      if (r2 == 0) hits++;
    }
    if (high < lower - 100) continue;
    s.cand[count] = (int)j;
    s.cand_t[count] = r2 > 0 ? (b - half * __builtin_log(r2 / s.D)) * q.inv_t : kInf;
    m = dmax(m, s.cand_t[count]);
    count++;
  }
  double f = 1;
  if (hits > 0 || st.key == 0) {
    if (st.key != 0) {
      st = neutral();
      st.key = 0;
      f = 0;
    }
    int kept = 0;
    m = st.m;
    for (int i = 0; i < count; i++) {
      if (s.cand_t[i] != kInf) continue;
      s.cand[kept] = s.cand[i];
      s.cand_t[kept] = bias_of(s, s.cand[i]) * q.inv_t;
      m = dmax(m, s.cand_t[kept++]);
    }
    count = kept;
  } else {
    st.key = 1;
  }
  if (count == 0) return f;
  if (st.s > 0) f *= rescale(st, m); else st.m = m;
  add_exact(s, st, p, count);
  return f;
}

} }  // namespace
