// From the state of a query to its results: normalised sums, or the state as it is.
#pragma once
#include "cpu/posterior/sweep-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

// Where a call's results go. One of the two is null.
struct Output {
  const Sums* sums;
  const States* states;
};

// Writes log_z, mean_logit, mean_bias and weight_sq of query b. A query without rows that have weight has
// log_z = -inf and knows nothing else; one that is not finite, or whose s is NaN, knows nothing at all.
template <class R>
static void write_stats(const Query<R>& q, const State& st, int64_t b, const Sums& out) {
  const double nan = __builtin_nan("");
  double log_z = nan, mean_logit = nan, mean_bias = nan, weight_sq = nan;
  if (q.mode != kNotFinite && st.s > 0) {
    const double lse = q.temperature * (st.m + __builtin_log(st.s)),
                 mean = q.temperature * (st.m + st.s_v / st.s);
    mean_bias = st.s_bias / st.s;
    weight_sq = st.s_sq / (st.s * st.s);
    if (q.mode == kSoftmax) {
      const double base = q.from > 0 ? q.temperature * pull_of_distance(q, q.from) : 0;
      log_z = lse + base;
      mean_logit = mean + base;
    } else if (q.mode == kZeroSigma) {  // the logits lack the distance, which is the key
      const double pull = st.key > 0 ? -0.5 * (st.key / q.sigma) / q.sigma : 0;
      log_z = lse + pull;
      mean_logit = mean + pull;
    } else {
      log_z = st.key == 0 ? kInf : lse;
      mean_logit = st.key == 0 ? kInf : mean;
    }
  } else if (q.mode != kNotFinite && st.s == 0) {
    log_z = -kInf;
  }
  out.log_z[b] = log_z;
  out.mean_logit[b] = mean_logit;
  out.mean_bias[b] = mean_bias;
  out.weight_sq[b] = weight_sq;
}

// Writes the state of query b, but for its accumulator, as memokern/calls/state.py defines it.
template <class R>
static void write_state(const Query<R>& q, const State& st, int64_t b, const States& out) {
  const double nan = __builtin_nan("");
  const State not_finite = {0, 0, nan, nan, nan, nan};
  const State v = q.mode == kNotFinite ? not_finite : st.s > 0 ? st : empty_state();
  out.key[b] = q.mode == kSoftmax && v.s > 0 ? q.from : v.key;  // which m counts from
  out.m[b] = v.m;
  out.s[b] = v.s;
  out.s_v[b] = v.s_v;
  out.s_bias[b] = v.s_bias;
  out.s_sq[b] = v.s_sq;
}

// Writes all results of query b. run(d) is where its accumulator has the features d .. d + 2 W, d a multiple
// of 2 W; multiplied by `unit` they are in the units of the rows' values. `near` has the rows that the
// accumulator lacks. With s = s_acc + s_near,
// - residual = (alpha acc - s_acc (x - alpha zero) + near) / s, where nothing cancels that near could lose;
// - mean = zero + (acc + (near + s_near (x - alpha zero)) / alpha) / s.
template <class R, class Run>
static void finish(const Source<R>& src, const Query<R>& q, const State& st, const Near<R>& near, double unit,
                   Run run, int64_t b, const Output& out) {
  enum { NR = 2 * Vec<R>::W };
  const int64_t D = src.rows.d;
  R* mean = out.sums && out.sums->mean ? (R*)out.sums->mean + b * D : nullptr;
  R* acc = out.states ? (R*)out.states->acc + b * D : nullptr;
  R* residual = (R*)(out.sums ? out.sums->residual : out.states->residual);
  if (residual) residual += b * D;
  if (out.sums)
    write_stats(q, st, b, *out.sums);
  else
    write_state(q, st, b, *out.states);
  if (q.mode == kNotFinite || !(st.s > 0)) {
    const R none = q.mode == kNotFinite || out.sums ? (R)__builtin_nan("") : R(0);
    for (int64_t d = 0; d < D; d++) {
      if (mean) mean[d] = none;
      if (acc) acc[d] = none;
      if (residual) residual[d] = none;
    }
    return;
  }
  const double s_acc = near.s == 0 ? st.s : dmax(st.s - near.s, 0), per = near.s == 0 ? 0 : 1 / q.alpha;
  for (int64_t d = 0; d < D; d += NR) {
    const R* a = run(d);
    for (int64_t i = 0; i < imin(NR, D - d); i++) {
      const double zero = src.zero[d + i], sum = a[i] * unit, xc = (double)q.x[d + i] - q.alpha * zero;
      const double close = near.s == 0 ? 0 : near.sum[d + i];
      const double all = sum + (near.s == 0 ? 0 : (close + near.s * xc) * per);
      const double pull = q.alpha * sum - s_acc * xc + close;
      if (mean) mean[d + i] = (R)(all / st.s + zero);
      if (acc) acc[d + i] = (R)(all + st.s * (zero - src.center[d + i]));
      if (residual) residual[d + i] = (R)(acc ? pull : pull / st.s);
    }
  }
}

// The [b] columns of the results, and the [b][d] vectors, whichever they are. The second may be null.
struct OutputArrays {
  double* column[6];
  int columns;
  void* vectors[2];
};
static OutputArrays arrays_of(const Output& out) {
  if (out.sums) {
    const Sums& s = *out.sums;
    const OutputArrays a = {
        {s.log_z, s.mean_logit, s.mean_bias, s.weight_sq, nullptr, nullptr}, 4, {s.mean, s.residual}};
    return a;
  }
  const States& s = *out.states;
  const OutputArrays a = {{s.key, s.m, s.s, s.s_v, s.s_bias, s.s_sq}, 6, {s.acc, s.residual}};
  return a;
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
