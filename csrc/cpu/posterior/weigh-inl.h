// From products to weights: one tile's step.
//
// Each function takes the products of a tile's rows with some queries, makes weights e^(v - m) of them in
// place, adds these to the queries' states, and says what the accumulators must be multiplied by because m
// has changed.
#pragma once
#include "cpu/posterior/logits-inl.h"
#include "memokern/state.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

// Adds rows whose logits v are exact; p, whose numbers lie `stride` apart, receives the weights of those that
// the accumulator takes.
template <class R>
MK_INLINE void add_exact(const Query<R>& q, const TileContext<R>& s, State& st, Near<R>& close, R* p,
                         int64_t stride, const int* row, const double* v, const bool* near, int count) {
  for (int i = 0; i < count; i++) {
    const double d = v[i] - st.m, w = __builtin_exp(d);
    p[row[i] * stride] = near[i] ? R(0) : (R)w;
    if (w == 0) continue;
    if (near[i]) {
      if (close.s == 0) memset((void*)close.sum, 0, s.D * sizeof(R));
      close.s += w;
      s.add_difference(*s.src, s.tile->n0 + row[i], q.x, q.alpha, w, close.sum);
    }
    st.s += w;
    st.s_v += w * d;
    st.s_sq += w * w;
    if (s.finite_bias) st.s_bias += w * (double)bias_of(q, s, row[i]);
  }
}

enum { MANY_FEATURES = 512 };

// The sum of e^(t - top) over a tile for each query of a group, whose t without the bias are in p; less in
// float than it is by its rounding.
template <class R>
static typename Vec<R>::T tile_sum(const QueryGroup<R>& g, const TileContext<R>& s, const R* p,
                                   typename Vec<R>::T top) {
  typedef typename Vec<R>::T V;
  const V lo = splat<R>(least_difference(R(0))), inv_t = g.inv_t;
  const R* b = s.tile_bias;
  const int64_t cnt = s.tile->cnt, Ps = s.Ps;
  const bool own = s.own_bias;
  V sum = {};
  for (int64_t j = 0; j < cnt; j++, p += Ps) {
    V t = load(p);
    if (b) t += (own ? load(b + j * Vec<R>::W) : splat<R>(b[j])) * inv_t;
    sum += vexp(vmax(t - top, lo));
  }
  return sum * (R)0.999;
}

// A softmax, for the first `lanes` queries of a group. p holds their columns of [NT][Ps]; f[e] is the factor
// of the accumulator of query e.
template <class R>
static void weigh_softmax(Query<R>* q, QueryGroup<R>& g, int lanes, const TileContext<R>& s, State* st,
                          Near<R>* close, R* p, double* f) {
  enum { W = Vec<R>::W };
  typedef typename Vec<R>::T V;
  const V top = logits(g, s, p);
  // What the tile's rows have together spares most of a query's first tile. Later it may do so where they
  // weigh as much as all rows before, and is worth its exponentials where exact rows cost much.
  bool any = false, worth = false;
  for (int e = 0; e < lanes; e++) {
    if (q[e].mode != kSoftmax || !has_inexact(q[e], s, st[e], top[e], g.top[e], error_of(q[e], s), 1))
      continue;
    any = true;
    worth |= !(st[e].s > 0) || (s.D >= MANY_FEATURES && top[e] - q[e].shared > st[e].m - 5);
  }
  const V together = worth ? tile_sum(g, s, p, top) : splat<R>(1);
  int count[W];
  for (int e = 0; e < lanes; e++) {
    count[e] = 0;
    if (q[e].mode != kSoftmax) continue;
    const double err = error_of(q[e], s), sum = dmax(together[e], 1);
    double m = dmax(st[e].m, top[e] - q[e].shared);
    if (any && has_inexact(q[e], s, st[e], top[e], g.top[e], err, sum))
      count[e] = take_inexact(q[e], s, st[e], p + e, s.Ps, top[e], g.top[e], err, sum, s.exact_row + e * s.NT,
                              s.exact_value + e * s.NT, s.exact_near + e * s.NT, m);
    st[e].key = 0;
    f[e] = st[e].s > 0 ? rescale(st[e], m) : (st[e].m = m, 1.0);
    rescale(close[e], f[e], s.D);
    g.m[e] = (R)(m + q[e].shared);
  }
  const V lo = splat<R>(least_difference(R(0))), m = g.m;
  const R *b = s.finite_bias, *whole = s.tile_bias, least = s.least;
  const int64_t cnt = s.tile->cnt, Ps = s.Ps;
  const bool own = s.own_bias;
  V sum = {}, sum_v = {}, sum_bias = {}, sum_sq = {};
  R* column = p;
  for (int64_t j = 0; !b && j < cnt; j++, column += Ps) {
    V d = load(column) - m;
    d = vmax(d, lo);  // lo also where both are -inf
    const V w = vexp(d, least);
    store(column, w);
    sum += w;
    sum_v += w * d;
    sum_sq += w * w;
  }
  // With a bias, sum_v is of t without it, less its largest: s_v follows in double, and sum w r^2 from s_v
  // and s_bias, with nothing lost to a bias that is large beside r^2 / sigma^2.
  const V inv_t = g.inv_t, distances = g.top, none = splat<R>((R)-Precision<R>::big);
  for (int64_t j = 0; b && j < cnt; j++, column += Ps) {
    const V apart = load(column);
    V d = apart + (own ? load(whole + j * W) : splat<R>(whole[j])) * inv_t - m;
    d = vmax(d, lo);
    const V w = vexp(d, least);
    store(column, w);
    sum += w;
    sum_v += w * vmax(apart - distances, none);
    sum_sq += w * w;
    sum_bias += w * (own ? load(b + j * W) : splat<R>(b[j]));
  }
  for (int e = 0; e < lanes; e++) {
    if (q[e].mode != kSoftmax) continue;
    st[e].s += sum[e];
    const double apart = sum[e] > 0 ? ((double)distances[e] - (st[e].m + q[e].shared)) * (double)sum[e] : 0;
    st[e].s_v += b ? (double)sum_v[e] + apart + q[e].inv_t * (double)sum_bias[e] : (double)sum_v[e];
    st[e].s_sq += sum_sq[e];
    st[e].s_bias += sum_bias[e];
    add_exact(q[e], s, st[e], close[e], p + e, s.Ps, s.exact_row + e * s.NT, s.exact_value + e * s.NT,
              s.exact_near + e * s.NT, count[e]);
  }
}

// sigma = 0: only the nearest row counts, by its exact distance; ties share by their bias.
template <class R>
static double weigh_zero_sigma(const Query<R>& q, const TileContext<R>& s, State& st, Near<R>& close, R* p) {
  const double top = logits(q, s, p, p), err = error_of(q, s);
  double best = st.key;
  int count = 0;
  // The row of the largest t may be one that the bias leaves out, so t bounds the distance only where there
  // is no bias.
  const double lo =
      dmax(nearness(q, st.key, err), s.tile_bias ? -kInf : nearness(q, dmax(0, q.xx - 2 * (top - err)), err));
  for (int64_t j = 0; j < s.tile->cnt; j++) {
    if ((double)p[j] < lo || bias_of(q, s, j) == -kInf) continue;
    s.exact_row[count] = (int)j;
    s.exact_value[count] = exact_r2(q, s, j);
    best = dmin(best, s.exact_value[count]);
    count++;
  }
  double f = 1;
  if (best < st.key) {
    st = empty_state();
    st.key = best;
    f = 0;
  }
  for (int64_t j = 0; j < s.tile->cnt; j++) p[j] = 0;
  int kept = 0;
  double m = st.m;
  for (int i = 0; i < count; i++) {
    if (s.exact_value[i] != best) continue;
    s.exact_row[kept] = s.exact_row[i];
    s.exact_near[kept] = is_near(q, s, s.exact_row[i], best);
    s.exact_value[kept] = bias_of(q, s, s.exact_row[i]) * q.inv_t;
    m = dmax(m, s.exact_value[kept]);
    kept++;
  }
  if (kept > 0 && st.s > 0)
    f *= rescale(st, m);
  else if (kept > 0)
    st.m = m;
  rescale(close, f, s.D);
  add_exact(q, s, st, close, p, 1, s.exact_row, s.exact_value, s.exact_near, kept);
  return f;
}

// Weighting "log": l = -(D / 2) log(r^2 / D) + b. A row that the query hits exactly outweighs all others.
template <class R>
static double weigh_log(const Query<R>& q, const TileContext<R>& s, State& st, Near<R>& close, R* p) {
  const double half = 0.5 * (double)s.D, delta = error_of_r2(q, s);
  double lower = st.s > 0 ? st.m + __builtin_log(st.s) : -kInf;
  for (int64_t j = 0; j < s.tile->cnt; j++) {  // a lower bound of log sum e^v, from this tile's best row
    const double r2 = q.xx - 2 * ((double)p[j] * q.a1 - (double)s.tile->sq[j] * q.a2) + delta;
    if (st.key != 0 && r2 < kInf)
      lower = dmax(lower, (bias_of(q, s, j) - half * __builtin_log(r2 / s.D)) * q.inv_t);
  }
  int count = 0, hits = 0;
  double m = st.m;
  for (int64_t j = 0; j < s.tile->cnt; j++) {
    const double b = bias_of(q, s, j);
    double r2 = q.xx - 2 * ((double)p[j] * q.a1 - (double)s.tile->sq[j] * q.a2);
    const double near = r2 - delta;  // r^2 is not below it
    p[j] = 0;
    if (b == -kInf) continue;
    const double err = near > 0 ? half * q.inv_t * delta / near : kInf;
    const double high = near > 0 ? (b - half * __builtin_log(near / s.D)) * q.inv_t : kInf;
    bool exact = false;
    if (err > Precision<R>::theta && high > lower + __builtin_log(Precision<R>::theta / dmin(1, err))) {
      r2 = exact_r2(q, s, j);
      exact = true;
    }
    if (!(r2 > 0)) {
      if (r2 == 0) hits++;
    }
    if (high < lower - 100) continue;
    s.exact_row[count] = (int)j;
    s.exact_near[count] = exact && is_near(q, s, j, r2);
    s.exact_value[count] = r2 > 0 ? (b - half * __builtin_log(r2 / s.D)) * q.inv_t : kInf;
    m = dmax(m, s.exact_value[count]);
    count++;
  }
  double f = 1;
  if (hits > 0 || st.key == 0) {
    if (st.key != 0) {
      st = empty_state();
      st.key = 0;
      f = 0;
    }
    int kept = 0;
    m = st.m;
    for (int i = 0; i < count; i++) {
      if (s.exact_value[i] != kInf) continue;
      s.exact_row[kept] = s.exact_row[i];
      s.exact_near[kept] = s.exact_near[i];
      s.exact_value[kept] = bias_of(q, s, s.exact_row[i]) * q.inv_t;
      m = dmax(m, s.exact_value[kept++]);
    }
    count = kept;
  } else {
    st.key = 1;
  }
  if (count > 0 && st.s > 0)
    f *= rescale(st, m);
  else if (count > 0)
    st.m = m;
  rescale(close, f, s.D);
  add_exact(q, s, st, close, p, 1, s.exact_row, s.exact_value, s.exact_near, count);
  return f;
}

// Of a query that a row which is NaN counts for nothing is known. Without this its comparisons, all of which
// are false, would leave the row out.
template <class R>
static void lose_queries(Query<R>* q, int lanes, const TileContext<R>& s) {
  for (int64_t j = 0; j < s.tile->cnt; j++)
    for (int e = 0; s.tile->sq[j] != s.tile->sq[j] && e < lanes; e++)
      if (bias_of(q[e], s, j) != -kInf) q[e].mode = kNotFinite;
}

// One tile for the first `lanes` queries of a group, whatever their modes. Returns whether any row has
// weight.
template <class R>
static bool weigh_tile(Query<R>* q, QueryGroup<R>& g, int lanes, const TileContext<R>& s, State* st,
                       Near<R>* close, R* p, double* f) {
  if (s.tile->lost) lose_queries(q, lanes, s);
  double before[Vec<R>::W];
  bool softmax = false, any = false;
  for (int e = 0; e < lanes; e++) {
    before[e] = st[e].s;
    f[e] = 1;
    if (q[e].mode == kSoftmax) {
      softmax = true;
      continue;
    }
    R* column = s.columns + e * s.NT;
    for (int64_t j = 0; j < s.tile->cnt; j++) column[j] = p[j * s.Ps + e];
    if (q[e].mode == kZeroSigma)
      f[e] = weigh_zero_sigma(q[e], s, st[e], close[e], column);
    else if (q[e].mode == kLogWeighting)
      f[e] = weigh_log(q[e], s, st[e], close[e], column);
    else
      memset((void*)column, 0, s.tile->cnt * sizeof(R));
  }
  if (softmax) weigh_softmax(q, g, lanes, s, st, close, p, f);
  for (int e = 0; e < lanes; e++) {
    any |= f[e] != 1 || st[e].s != before[e];
    if (q[e].mode == kSoftmax) continue;
    for (int64_t j = 0; j < s.tile->cnt; j++) p[j * s.Ps + e] = s.columns[e * s.NT + j];
  }
  return any;
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
