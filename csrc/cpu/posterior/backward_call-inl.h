// posterior_backward as a call: how it is shared among threads, how parts are joined, and the queries at a
// limit.
#pragma once
#include "cpu/listed/listed_backward-inl.h"
#include "cpu/posterior/backward-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

// A query of which only the nearest rows have weight: at sigma = 0, or where it hits a row exactly with
// weighting "log". Only the bias [N] and the temperature still move it. r2 [N] is work space. Without a bias,
// the temperature alone moves it, and only where log_z is finite.
template <class R>
static void backward_zero_sigma(const TileContext<R>& s, const BackwardArgs& io, const Query<R>& q, int64_t b,
                                const double* bias, double* row, double* r2, double* grad_bias, int threads) {
  const int64_t N = s.src->rows.n, D = s.D;
  const int64_t pieces = imin(N, (int64_t)4 * threads);
  for_parts(threads, pieces, [&](int64_t i, int) {
    for (int64_t n = N * i / pieces; n < N * (i + 1) / pieces; n++)
      r2[n] = bias && bias[n] == -kInf ? kInf : s.exact(*s.src, n, q.x, q.alpha);
    return (int)kDone;
  });
  double best = kInf, m = -kInf, z = 0, exact[3];
  for (int64_t n = 0; n < N; n++) best = dmin(best, r2[n]);
  if (best == kInf) {  // the bias leaves no row
    io.out.temperature[b] = 0;
    return;
  }
  for (int64_t n = 0; n < N; n++)
    if (r2[n] == best) m = dmax(m, bias ? bias[n] : 0);
  for (int64_t n = 0; n < N; n++)
    if (r2[n] == best) z += __builtin_exp(((bias ? bias[n] : 0) - m) * q.inv_t);
  // Only at distance 0 are log_z and mean_logit finite, and follow the bias.
  const bool finite = q.mode == kZeroSigma && best == 0;
  const double T = q.temperature, Eb = io.sums.mean_bias[b];
  const double gL = finite ? io.grads.log_z[b] : 0, gE = finite ? io.grads.mean_logit[b] : 0;
  const double gb = io.grads.mean_bias[b];
  double temp = finite ? gL * (io.sums.log_z[b] - Eb) / T : 0;
  for (int64_t n = 0; n < N; n++) {
    if (r2[n] != best) continue;
    const double bn = bias ? bias[n] : 0, w = __builtin_exp((bn - m) * q.inv_t) / z;
    exact_row(*s.src, q, io.sums.mean + b * D, io.grads.mean + b * D, n, row, exact);
    const double h =
        (exact[2] + (gE + gb) * (bn - Eb) + 2 * io.grads.weight_sq[b] * (w - io.sums.weight_sq[b])) / T;
    if (grad_bias) grad_bias[n] += w * (gL + gE + gb + h);
    temp -= w * (bn - Eb) * h / T;
  }
  io.out.temperature[b] = temp;
}

// The gradients of query b over all rows by direct differences, as over a list of them; bias [N] is the
// query's or null, grad_bias [N] receives its gradient, and index [N] is work space. `f64`, x and the rest
// are the call's.
static int backward_by_differences(const Rows& rows, const Queries& in, const BackwardArgs& io, int64_t b,
                                   const double* bias, int64_t* index, double* grad_bias, int threads) {
  const int64_t D = rows.d, start[2] = {0, rows.n};
  for (int64_t n = 0; n < rows.n; n++) index[n] = n;
  const auto at = [&](const void* p) { return (char*)p + b * D * (in.f64 ? 8 : 4); };
  const Queries one = {at(in.x), in.f64,       1,  in.sigma + b, in.alpha + b, in.temperature + b,
                       bias,     in.weighting, {}, nullptr,      in.watch};
  const SumsIn grads = {io.grads.mean + b * D, io.grads.log_z + b, io.grads.mean_logit + b,
                        io.grads.mean_bias + b, io.grads.weight_sq + b};
  const Gradients out = {
      at(io.out.x), io.out.sigma + b, io.out.alpha + b, io.out.temperature + b, bias ? grad_bias : nullptr,
      nullptr,      nullptr};
  const RowLists list = {start, index, rows.n};
  return run_posterior_listed_backward(rows, one, list, grads, out, threads);
}

// What the gradient [N] for the biases of query b is to those that the queries share and to its condition.
static void share_bias_gradient(const Queries& in, const BackwardArgs& io, int64_t b, int64_t N,
                                const double* grad_bias) {
  for (int64_t n = 0; io.out.bias && n < N; n++) io.out.bias[n] += grad_bias[n];
  const Conditions& c = in.conditions;
  if (!c.rows) return;
  double *to_c = io.out.condition + b * c.k, to_h = 0;
  const double base = anchor_square(c, b);
  memset((void*)to_c, 0, c.k * sizeof(double));
  for (int64_t n = 0; n < N; n++)
    if (grad_bias[n] != 0) {
      add_condition_gradients(c, b, n, 1, grad_bias + n, nullptr, to_c);
      to_h += grad_bias[n] * condition_part(c, b, base, n);
    }
  finish_condition_gradient(c, b, to_c, to_h, 0, 0, io.out);
}

template <class R>
static int backward_typed(const Rows& rows, const Queries& in, const BackwardArgs& io, int threads) {
  if (io.out.bias) memset((void*)io.out.bias, 0, rows.n * sizeof(double));
  if (in.b == 0) return kDone;
  CentredRows<R> c;
  if (!c.prepare(rows, in.bias)) return kNoMemory;
  const Plan pl = make_plan<R>(in.b, c.src);
  const double b_max = largest_bias(in.bias, rows.n);
  const int64_t blocks = (in.b + pl.B - 1) / pl.B, tiles = (rows.n + pl.NT - 1) / pl.NT;
  const bool by_queries = blocks >= 2 * threads || tiles < 2;
  const int parts = (int)imax(1, imin(threads, by_queries ? blocks : tiles));
  WorkSpaces<BackwardWork<R>> list(parts);
  if (!list.reserve(pl, in, rows.n)) return kNoMemory;
  BackwardWork<R>* work = list.items;
  Arena drifts;
  double *minus_off = nullptr, *zeros = nullptr;
  // In double the drift is as small as what rounding does to the sums of the gradient itself.
  if (io.out.bias && sizeof(R) == 4) {
    if (!drifts.reserve(2 * Arena::bytes<double>(in.b))) return kNoMemory;
    minus_off = drifts.take<double>(in.b);
    zeros = drifts.take<double>(in.b);
    memset((void*)zeros, 0, in.b * sizeof(double));
  }
  const BackwardArgs drift = {io.sums, {nullptr, minus_off, zeros, zeros, zeros}, io.out};
  // Calls sweep(k, n0, n1, part) for the part's share of blocks k, or of the rows of one block.
  const auto share = [&](int64_t i, int64_t k0, auto sweep) {
    int status = kDone;
    const int64_t first = by_queries ? blocks * i / parts : k0,
                  last = by_queries ? blocks * (i + 1) / parts : k0 + 1;
    const int64_t n0 = by_queries ? 0 : imin(rows.n, tiles * i / parts * pl.NT);
    const int64_t n1 = by_queries ? rows.n : imin(rows.n, tiles * (i + 1) / parts * pl.NT);
    for (int64_t k = first; k < last && !status; k++)
      status |= sweep(k * pl.B, imin(pl.B, in.b - k * pl.B), n0, n1, work[i]);
    return status;
  };
  const auto without_drift = [&](int64_t b0, int64_t B, int64_t n0, int64_t n1, BackwardWork<R>& w) {
    return minus_off ? remove_drift(c.src, in, drift, pl, b_max, b0, B, n0, n1, w) : (int)kDone;
  };
  int failed = 0;
  for (int64_t k0 = 0; k0 < blocks; k0 += by_queries ? blocks : 1) {
    failed = for_parts(threads, parts, [&](int64_t i, int) {
      return share(i, k0, [&](int64_t b0, int64_t B, int64_t n0, int64_t n1, BackwardWork<R>& w) {
        const int status = backward_sweep(c.src, in, io, pl, b_max, b0, B, n0, n1, w);
        if (!by_queries || status) return status;
        for (int64_t b = 0; b < B; b++) backward_finish(c.src, pl, in, io, w, b, b0 + b, minus_off);
        return without_drift(b0, B, n0, n1, w);
      });
    });
    if (failed) return failed;
    if (by_queries) break;
    const int64_t b0 = k0 * pl.B, B = imin(pl.B, in.b - b0);
    for (int64_t b = 0; b < B; b++) {
      join_backward_parts(pl, in, work, parts, b);
      backward_finish(c.src, pl, in, io, work[0], b, b0 + b, minus_off);
    }
    failed = for_parts(threads, parts, [&](int64_t i, int) { return share(i, k0, without_drift); });
    if (failed) return failed;
  }
  const TileContext<R> s = make_tile_context(c.src, pl, in.bias, b_max, work[0].fwd);
  Arena memory;
  double *r2 = nullptr, *column = nullptr, *grad_bias = nullptr;
  int64_t* index = nullptr;
  for (int64_t b = 0; b < in.b; b++) {
    Query<R> q = make_query(in, c.src, b, pl, work[0].fwd.row);
    const double log_z = io.sums.log_z[b];
    if (log_z != log_z) q.mode = kNotFinite;  // a row is NaN
    if (q.mode == kNotFinite && io.out.bias) io.out.bias[0] = __builtin_nan("");
    const bool far = is_far(q, log_z);
    if (!far && q.mode != kZeroSigma && !(q.mode == kLogWeighting && log_z == kInf)) continue;
    if (!far && !is_biased(in) && !(log_z > -kInf && log_z < kInf)) continue;
    if (!r2) {
      if (!memory.reserve(3 * Arena::bytes<double>(rows.n) + Arena::bytes<int64_t>(rows.n))) return kNoMemory;
      r2 = memory.take_raw<double>(rows.n);
      column = memory.take_raw<double>(rows.n);
      grad_bias = memory.take_raw<double>(rows.n);
      index = memory.take_raw<int64_t>(rows.n);
    }
    if (has_own_bias(in)) own_column(in, b, rows.n, column);
    const double* bias = has_own_bias(in) ? column : in.bias;
    memset((void*)grad_bias, 0, rows.n * sizeof(double));
    if (far) {
      failed = backward_by_differences(rows, in, io, b, bias, index, grad_bias, threads);
      if (failed) return failed;
    } else {
      if (work[0].fwd.pace.stopped(rows.n * rows.d)) return kStopped;
      backward_zero_sigma(s, io, q, b, bias, work[0].row, r2, grad_bias, threads);
    }
    share_bias_gradient(in, io, b, rows.n, grad_bias);
  }
  if (io.out.bias)
    for (int i = 0; i < parts; i++)
      for (int64_t n = 0; n < rows.n; n++) io.out.bias[n] += work[i].grad_bias[n];
  return kDone;
}

static int run_posterior_backward(const Rows& rows, const Queries& in, const SumsIn& sums,
                                  const SumsIn& grads, const Gradients& out, int threads) {
  const BackwardArgs io = {sums, grads, out};
  return in.f64 ? backward_typed<double>(rows, in, io, threads)
                : backward_typed<float>(rows, in, io, threads);
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
