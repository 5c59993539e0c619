// From products to weights: one tile's step.
//
// A tile's logits are handled as t = (l + |xc|^2 / (2 sigma^2)) / T: the part that all rows share is left out, so that float
// holds what differs; the state's m has it again, so exact logits lose nothing to it. t is approximate; its error is
// `err` (query-inl.h), and every row whose weight that error could change by more than THETA is evaluated again by direct
// differences in double. Queries lie side by side in P [NT][Ps], W to a vector.
#pragma once
#include "cpu/core/query-inl.h"

namespace memokern { namespace MEMOKERN_ISA_NS {

// One tile as the steps see it.
template <class R> struct Step {
  const Source<R>* src;
  typename Exact<R>::F exact;
  const Tile<R>* tile;
  int64_t NT, D, Ps;
  const double* bias;   // [N] or null
  const R* b;           // [NT] bias of the tile's rows, or null
  const R* b0;          // [NT] the same with 0 for -inf
  double b_max;         // largest finite |bias|
  R least;              // below it, e^(t-m) is 0: all N rows at it would not move the sum, at least 1, by a tenth of THETA
  int* cand;            // [W][NT] work space: candidates, and
  double* cand_t;       // [W][NT] their exact logits (kHard: squared distances)
  R* columns;           // [W][NT] work space: the products of a query, side by side
};

// Infinite where a product could overflow: then every row is evaluated exactly.
template <class R> MK_INLINE double error_of(const Query<R>& q, const Step<R>& s) {
  const double y2 = s.tile->sq_max, err = q.e0 + q.e1 * s.tile->y_max + q.e2 * y2 + (s.b ? q.e3 * s.b_max : 0);
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
// At most ln x, and at least ln x - 0.06, for a normal x > 0, without a call: log2 of (1 + f) 2^k is at least k + f.
MK_INLINE double log_below(double x) {
  int64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return ((double)bits * 0x1p-52 - 1023.001) * 0.6931471805599453;
}
// Below which approximate t a row may be left as it is, given a lower bound of log sum e^t.
template <class R> MK_INLINE double threshold(double lower, double err) {
  return lower + log_below(Precision<R>::theta / dmin(1, err)) - err;
}

// dots to t (they may be the same array); the largest returned.
template <class R> MK_INLINE R logits(const Query<R>& q, const Step<R>& s, const R* dot, R* p) {
  R best = (R)-kInf;
  for (int64_t j = 0; j < s.tile->cnt; j++) {
    R t = dot[j] * (R)q.a1 - s.tile->sq[j] * (R)q.a2;
    if (s.b && q.mode != kHard) t += s.b[j] * (R)q.inv_t;
    p[j] = t;
    best = t > best ? t : best;
  }
  return best;
}

// W queries side by side, as the lanes see them.
template <class R> struct Group {
  typename Vec<R>::T a1, a2, inv_t, m;  // t = a1 dot - a2 |yc|^2 + inv_t b; m: the largest t seen
};
template <class R> MK_INLINE void set_lane(Group<R>& g, int e, const Query<R>& q) {
  g.a1[e] = (R)q.a1;
  g.a2[e] = (R)q.a2;
  g.inv_t[e] = (R)q.inv_t;
}
// (Copies of what the loops read: as far as the compiler knows, a vector's store may change anything.)
template <class R> MK_INLINE typename Vec<R>::T logits(const Group<R>& g, const Step<R>& s, R* p) {
  typedef typename Vec<R>::T V;
  const V a1 = g.a1, a2 = g.a2, inv_t = g.inv_t;
  const R *sq = s.tile->sq, *b = s.b;
  const int64_t cnt = s.tile->cnt, Ps = s.Ps;
  V top = splat<R>((R)-kInf);
  for (int64_t j = 0; j < cnt; j++, p += Ps) {
    V t = load(p) * a1 - splat<R>(sq[j]) * a2;
    if (b) t += splat<R>(b[j]) * inv_t;
    store(p, t);
    top = vmax(t, top);
  }
  return top;
}

template <class R> MK_INLINE void add_exact(const Step<R>& s, State& st, R* p, int64_t stride, const int* cand, const double* t, int count) {
  for (int i = 0; i < count; i++) {
    const double d = t[i] - st.m, w = __builtin_exp(d);
    p[cand[i] * stride] = (R)w;
    if (w == 0) continue;
    st.s += w;
    st.st += w * d;
    st.sw2 += w * w;
    if (s.b0) st.sb += w * (double)bias_of(s, cand[i]);
  }
}

// The rows of a column (of t, `stride` apart) that must be evaluated exactly, given the largest t; they are taken out of
// it. m: raised to the largest logit, exact or not, that is left. Returns their number.
template <class R>
static int candidates(const Query<R>& q, const Step<R>& s, const State& st, R* p, int64_t stride, double top, double err, int* cand, double* cand_t, double& m) {
  const bool all = err == kInf;
  const double known = st.s > 0 ? st.m + q.xxt : -kInf, least = dmax(known, top - err);
  if (!all && top <= least + Precision<R>::log_theta - err) return 0;  // what follows can only be stricter
  const double lo = threshold<R>(dmax(known + (st.s > 1e-300 ? log_below(st.s) : 0), top - err), err);
  if (!all && top <= lo) return 0;
  double rest = -kInf;
  int count = 0;
  m = st.m;
  for (int64_t j = 0; j < s.tile->cnt; j++) {
    R& t = p[j * stride];
    const double b = bias_of(s, j);
    if (all ? b == -kInf : !((double)t > lo)) {
      if (all) t = (R)-kInf;
      rest = dmax(rest, t);
      continue;
    }
    cand[count] = (int)j;
    cand_t[count] = -0.5 * (exact_r2(q, s, j) / q.sigma) / q.sigma * q.inv_t + b * q.inv_t;
    m = dmax(m, cand_t[count++]);
    t = (R)-kInf;
  }
  m = dmax(m, rest - q.xxt);
  return count;
}

// One tile for the first `lanes` queries of a group: p, columns of [NT][Ps], holds dots and becomes weights relative to
// the states' m. f[e]: the factor for acc.
template <class R>
static void step_soft(const Query<R>* q, Group<R>& g, int lanes, const Step<R>& s, State* st, R* p, double* f) {
  enum { W = Vec<R>::W };
  typedef typename Vec<R>::T V;
  const V top = logits(g, s, p);
  int count[W];
  for (int e = 0; e < lanes; e++) {
    count[e] = 0;
    if (q[e].mode != kSoft) continue;
    const double err = error_of(q[e], s);
    double m = dmax(st[e].m, top[e] - q[e].xxt);
    if (err > Precision<R>::theta)
      count[e] = candidates(q[e], s, st[e], p + e, s.Ps, top[e], err, s.cand + e * s.NT, s.cand_t + e * s.NT, m);
    st[e].key = 0;
    f[e] = st[e].s > 0 ? rescale(st[e], m) : (st[e].m = m, 1.0);
    g.m[e] = (R)(m + q[e].xxt);
  }
  const V lo = splat<R>(floor_of(R(0))), m = g.m;
  const R *b0 = s.b0, least = s.least;
  const int64_t cnt = s.tile->cnt, Ps = s.Ps;
  V sum = {}, st_ = {}, sb = {}, sw = {};
  R* column = p;
  for (int64_t j = 0; j < cnt; j++, column += Ps) {
    V d = load(column) - m;
    d = vmax(d, lo);  // lo also where both are -inf
    const V w = vexp(d, least);
    store(column, w);
    sum += w;
    st_ += w * d;
    sw += w * w;
    if (b0) sb += w * splat<R>(b0[j]);
  }
  for (int e = 0; e < lanes; e++) {
    if (q[e].mode != kSoft) continue;
    st[e].s += sum[e];
    st[e].st += st_[e];
    st[e].sw2 += sw[e];
    st[e].sb += sb[e];
    add_exact(s, st[e], p + e, s.Ps, s.cand + e * s.NT, s.cand_t + e * s.NT, count[e]);
  }
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
  for (int64_t j = 0; j < s.tile->cnt; j++) p[j] = 0;
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
  add_exact(s, st, p, 1, s.cand, s.cand_t, kept);
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
  add_exact(s, st, p, 1, s.cand, s.cand_t, count);
  return f;
}

// One tile for the first `lanes` queries of a group, whatever their modes. Returns whether any row has weight.
template <class R>
static bool step(const Query<R>* q, Group<R>& g, int lanes, const Step<R>& s, State* st, R* p, double* f) {
  double before[Vec<R>::W];
  bool soft = false, any = false;
  for (int e = 0; e < lanes; e++) {
    before[e] = st[e].s;
    f[e] = 1;
    if (q[e].mode == kSoft) { soft = true; continue; }
    R* column = s.columns + e * s.NT;
    for (int64_t j = 0; j < s.tile->cnt; j++) column[j] = p[j * s.Ps + e];
    if (q[e].mode == kHard) f[e] = step_hard(q[e], s, st[e], column);
    else if (q[e].mode == kLogMap) f[e] = step_log(q[e], s, st[e], column);
    else memset((void*)column, 0, s.tile->cnt * sizeof(R));
  }
  if (soft) step_soft(q, g, lanes, s, st, p, f);
  for (int e = 0; e < lanes; e++) {
    any |= f[e] != 1 || st[e].s != before[e];
    if (q[e].mode == kSoft) continue;
    for (int64_t j = 0; j < s.tile->cnt; j++) p[j * s.Ps + e] = s.columns[e * s.NT + j];
  }
  return any;
}

} }  // namespace
