// From products to coefficients: one tile's step of the backward sweep, by the formulas of backward-inl.h.
#pragma once
#include "cpu/posterior/sweep-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

struct BackwardArgs {
  SumsIn sums, grads;
  Gradients out;
};

// The sums of a query over the rows of a part.
struct BackwardSums {
  double w;       // sum of w
  double drift;   // sum of w <g, y - mean> / T, which is 0 but for rounding, and subtracted at the end
  double q, qc;   // sums of q, and of q c but for the rows in `near`, where d l / d x = c (alpha y - x)
  double ql;      // sum of q (l - b)
  double qa, wa;  // sums of q c <x - alpha y, yc>, and of w <x - alpha y, yc>
  double temp;    // sum of w (l - E) h
  double qh, wh;  // sums of (q + gb w) part, the condition's part of the bias, and of w part
};

// A row by direct differences: |x - alpha y|^2, <x - alpha y, yc> and <g, y - mean> go to out, y to row.
// Without g the last is 0.
template <class R>
static void exact_row(const Source<R>& src, const Query<R>& q, const double* mean, const double* g, int64_t n,
                      double* row, double* out) {
  out[0] = exact_for(src)(src, n, q.x, q.alpha);
  values_for(src)(src, n, 0, src.rows.d, row);
  double xy = 0, gy = 0;
  for (int64_t d = 0; d < src.rows.d; d++) {
    xy += ((double)q.x[d] - q.alpha * row[d]) * (row[d] - src.center[d]);
    if (g) gy += g[d] * (row[d] - mean[d]);
  }
  out[1] = xy;
  out[2] = gy;
}

// Of a query, what its condition gathers.
struct ConditionArgs {
  const Conditions* of;  // null where there is none
  const double* part;    // [NT][W] what it adds to the logits
  double* grad_c;        // [2][k]
};

// The numbers of query b in the formulas.
struct BackwardQuery {
  double T, E, Eb, S, log_z, gL, gE, gb, gS;
  double common;   // l - b = T t - common, where t is a logit of the tile without its bias
  double g_shift;  // <g, mean - center>
};

// Rows j .. j + W of a tile, all of a softmax, where none needs direct differences: the loop of
// backward_tile, with W rows to a vector of doubles.
struct BackwardVectors {
  typedef Vec<double>::T V;
  enum { W = Vec<double>::W };
  V w, drift, q, ql, qa, wa, temp, qh, wh;

  // Numbers of the rows j .. j + W, of which each query has its own [NT][Vec<R>::W].
  template <class R>
  MK_INLINE V own(const double* of, const Query<R>& q, int64_t j) {
    V v;
    for (int e = 0; e < W; e++) v[e] = of[(j + e) * Vec<R>::W + q.lane];
    return v;
  }
  // Whether any of the rows has a logit above lo, or one that is not a number.
  template <class R>
  MK_INLINE bool any_above(const TileContext<R>& s, const Query<R>& q, int64_t j, const R* logit, double lo) {
    bool all = true;
    for (int e = 0; e < W; e++) all &= logit[j + e] + pull_of_bias(q, s, j + e) <= lo;
    return !all;
  }

  template <class R>
  MK_INLINE void add(BackwardVectors& a, const TileContext<R>& s, const BackwardQuery& c, const Query<R>& q,
                     int64_t j, const R* logit, R* p, const R* pg, double* grad_bias,
                     const ConditionArgs& condition, int64_t query) {
    typedef Convert<double, R> In;
    typedef typename RawVec<double, R, W>::T Out;
    const double per_t = 1 / c.T, least = dmax(least_difference(R(0)), -708);
    const V xy = In::vec(p + j) - q.alpha * In::vec(s.tile->sq + j), gy = In::vec(pg + j) - c.g_shift;
    const V lr = In::vec(logit + j) * c.T - c.common;
    V b = {}, v = (lr - c.log_z) * per_t;
    if (s.bias || s.own_bias) {
      b = s.own_bias ? own(s.own_bias, q, j) : load(s.bias + s.tile->n0 + j);
      v += b * per_t;
      b = b == splat<double>(-kInf) ? V{} : b;
    }
    v = vmax(v, splat<double>(least - 1));  // -inf and what is not a number have no exponential
    const V w = vexp(v, least), off = lr + b - c.E;
    const V hg = gy * per_t, h = hg + (c.gE * off + c.gb * (b - c.Eb) + 2 * c.gS * (w - c.S)) * per_t;
    const V coeff = w * (c.gL + c.gE + h);
    a.w += w;
    a.drift += w * hg;
    a.q += coeff;
    a.ql += coeff * lr;
    a.qa += coeff * xy;
    a.wa += w * xy;
    a.temp += w * off * h;
    if (grad_bias) {
      double* to = grad_bias + s.tile->n0 + j;
      store(to, load(to) + coeff + c.gb * w);
    }
    if (condition.of) {
      const V g = coeff + c.gb * w, part = own(condition.part, q, j);
      a.qh += w > V{} ? g * part : V{};
      a.wh += w > V{} ? w * part : V{};
      add_condition_gradients(*condition.of, query, s.tile->n0 + j, W, (const double*)&g, (const double*)&w,
                              condition.grad_c);
    }
    *(Out*)(p + j) = __builtin_convertvector(coeff, Out);
  }
  void join(BackwardSums& to) const {
    to.w += hsum<double>(w);
    to.drift += hsum<double>(drift);
    to.q += hsum<double>(q);
    to.qc += hsum<double>(q);  // c is 1
    to.ql += hsum<double>(ql);
    to.qa += hsum<double>(qa);
    to.wa += hsum<double>(wa);
    to.temp += hsum<double>(temp);
    to.qh += hsum<double>(qh);
    to.wh += hsum<double>(wh);
  }
};

// One tile for query b. p holds the products of the rows with the query and becomes the coefficients q c; pg
// holds those with the gradient of the mean.
template <class R>
static void backward_tile(const TileContext<R>& s, const BackwardArgs& io, const Query<R>& q, int64_t b,
                          double g_shift, double* row, R* logit, R* p, R* pg, R* near, BackwardSums& a,
                          double* grad_bias, const ConditionArgs& condition) {
  const bool is_log = q.mode == kLogWeighting;
  const double T = q.temperature, E = io.sums.mean_logit[b], Eb = io.sums.mean_bias[b],
               S = io.sums.weight_sq[b];
  // Where one row has nearly all weight, the gradient is made of the others, and their weights must be right
  // to a share of what these have together.
  const double share = __builtin_log(dmax(dmin(1 - S, 1), Precision<R>::u));
  const double gL = io.grads.log_z[b], gE = io.grads.mean_logit[b], gb = io.grads.mean_bias[b];
  const double gS = io.grads.weight_sq[b], log_z = io.sums.log_z[b];
  const double common = is_log ? 0 : q.shared * T, tz = (log_z + common) / T, err = error_of(q, s);
  const double lo = err > Precision<R>::theta ? threshold<R>(tz, err) + share : kInf,
               half = 0.5 * (double)s.D;
  const double delta = is_log ? error_of_r2(q, s) : 0;
  const double top = is_log ? kInf : (double)logits(q, s, p, logit);
  if (top < tz + least_difference(R(0)) - err) {
    for (int64_t j = 0; j < s.tile->cnt; j++) p[j] = 0;  // no row of the tile has weight
    return;
  }
  const auto row_by_itself = [&](int64_t j) {
    const double bj = bias_of(q, s, j);
    double t, r2 = 0, exact[3];
    bool direct;
    if (is_log) {
      r2 = q.xx - 2 * ((double)p[j] * q.a1 - (double)s.tile->sq[j] * q.a2);
      const double least = r2 - delta, e = least > 0 ? half * delta / least / T : kInf;
      const double high = least > 0 ? (bj - half * __builtin_log(least / s.D)) / T : kInf;
      direct = bj != -kInf && e > Precision<R>::theta &&
               high > tz + share + __builtin_log(Precision<R>::theta / dmin(1, e));
      t = high;
    } else {
      t = logit[j] + pull_of_bias(q, s, j);
      direct = err == kInf || !(t <= lo);  // where nothing is known t may be -inf
    }
    if (bj == -kInf || (!direct && t - tz < least_difference(R(0)))) {
      p[j] = 0;
      return;
    }
    double l, lr, xy, gy;  // lr: l - b
    if (direct) {
      const double* g = io.grads.mean ? io.grads.mean + b * s.D : nullptr;
      exact_row(*s.src, q, io.sums.mean + b * s.D, g, s.tile->n0 + j, row, exact);
      r2 = exact[0];
      xy = exact[1];
      gy = exact[2];
      lr = -0.5 * (r2 / q.sigma) / q.sigma;
    } else {
      xy = (double)p[j] - q.alpha * s.tile->sq[j];
      gy = (double)pg[j] - g_shift;
      lr = logit[j] * T - common;
    }
    if (is_log) lr = -half * __builtin_log(r2 / s.D);
    l = lr + bj;
    const double w = __builtin_exp((l - log_z) / T);
    const double hg = gy / T, ho = gE * (l - E) / T + gb * (bj - Eb) / T + 2 * gS * (w - S) / T;
    const double coeff = w * (gL + gE + hg + ho), c = is_log ? s.D / r2 : 1;
    a.w += w;
    a.drift += w * hg;
    a.q += coeff;
    a.ql += coeff * lr;
    a.qa += coeff * c * xy;
    a.wa += w * xy;
    a.temp += w * (l - E) * (hg + ho);
    if (grad_bias) grad_bias[s.tile->n0 + j] += coeff + gb * w;
    if (condition.of) {
      const double g = coeff + gb * w, part = condition.part[j * Vec<R>::W + q.lane];
      a.qh += g * part;
      a.wh += w * part;
      add_condition_gradients(*condition.of, b, s.tile->n0 + j, 1, &g, &w, condition.grad_c);
    }
    if (direct) {  // its term of grad_x as it is: within the sums it would cancel where r is small
      for (int64_t d = 0; d < s.D; d++) near[d] += (R)(coeff * c * (q.alpha * row[d] - (double)q.x[d]));
      p[j] = R(0);
    } else {
      a.qc += coeff * c;
      p[j] = (R)(coeff * c);
    }
  };
  enum { W = BackwardVectors::W };
  const bool vectors = tz > -kInf && !is_log && err < kInf, none_direct = top <= lo;
  const BackwardQuery c = {T, E, Eb, S, log_z, gL, gE, gb, gS, common, g_shift};
  BackwardVectors sums = {};
  for (int64_t j = 0; j < s.tile->cnt; j += W) {
    const bool whole = vectors && j + W <= s.tile->cnt;
    if (whole && (none_direct || !BackwardVectors::any_above(s, q, j, logit, lo)))
      BackwardVectors::add(sums, s, c, q, j, logit, p, pg, grad_bias, condition, b);
    else
      for (int64_t e = j; e < imin(j + W, s.tile->cnt); e++) row_by_itself(e);
  }
  sums.join(a);
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
