// posterior_backward: the same sweep again, with the weights taken from log_z.
//
// A part owns a range of rows and streams tiles. For each tile it needs the products of the rows with the
// queries and with the gradients that arrive for the mean, and makes of them the coefficient of every (query,
// row); these are then accumulated like weights: three products to the forward's two.
//
// Let w = softmax(l / T), and gL, gE, gb, gS the gradients for log_z, mean_logit, mean_bias and weight_sq,
// whose values are L, E, Eb and S. With
// - h_n = (<g, y_n - mean> + gE (l_n - E) + gb (b_n - Eb) + 2 gS (w_n - S)) / T,
// - q_n = w_n (gL + gE + h_n),
//
// q_n is the gradient for the logit l_n. So grad_x = sum q dl/dx, and so on for sigma and alpha;
// grad_bias_n = q_n + gb w_n, and grad_T = gL (L - E) / T - sum w (l - E) h / T.
#pragma once
#include "cpu/posterior/backward_tile-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

template <class R>
struct BackwardWork {
  SweepWork<R> fwd;
  R* g;                // [Bp][Dp] the gradients of the mean, laid out as the queries
  R* pg;               // [NT][Ps] their products with the rows
  R *dot, *dot_g;      // [NT] the products of one query
  R* logit;            // [NT]
  double* row;         // [D] a row as given
  R* near;             // [B][Dp] sum of q c (alpha y - x) over the rows that are taken by direct differences
  double* g_shift;     // [B] <g, mean - center>
  BackwardSums* sums;  // [B]
  double* grad_bias;   // [N] or null
  double* grad_c;      // [B][2][k] sums of (q + gb w) (c_n - a) and of w (c_n - a), or null
  Arena arena;
  bool reserve(const Plan& pl, const Queries& in, int64_t N) {
    const bool bias = in.bias;
    const int64_t k = in.conditions.rows ? in.conditions.k : 0;
    if (!fwd.reserve(pl, in)) return false;
    if (!arena.reserve(Arena::bytes<R>(pl.Bp * pl.Dp) + Arena::bytes<R>(pl.B * pl.Dp) +
                       Arena::bytes<R>(pl.NT * pl.Ps) + 3 * Arena::bytes<R>(pl.NT) +
                       Arena::bytes<double>(pl.B) + Arena::bytes<double>(pl.D) +
                       Arena::bytes<BackwardSums>(pl.B) + (bias ? Arena::bytes<double>(N) : 0) +
                       Arena::bytes<double>(2 * pl.B * k)))
      return false;
    g = arena.take<R>(pl.Bp * pl.Dp);
    pg = arena.take<R>(pl.NT * pl.Ps);
    dot = arena.take<R>(pl.NT);
    dot_g = arena.take<R>(pl.NT);
    logit = arena.take<R>(pl.NT);
    row = arena.take<double>(pl.D);
    near = arena.take<R>(pl.B * pl.Dp);
    g_shift = arena.take<double>(pl.B);
    sums = arena.take<BackwardSums>(pl.B);
    grad_bias = bias ? arena.take<double>(N) : nullptr;
    grad_c = k ? arena.take<double>(2 * pl.B * k) : nullptr;
    return true;
  }
};

// Whether log_z is so large that the weights e^((l - log_z) / T) would be off by its rounding: such a query,
// whose rows are 10^4 times its noise away or more, is left to the sums over a list of all rows. So is one
// whose noise the sweep takes for 0, but whose log_z is finite: it still moves with the query.
template <class R>
MK_INLINE bool is_far(const Query<R>& q, double log_z) {
  if (q.mode == kZeroSigma) return q.sigma > 0 && log_z > -kInf && log_z < kInf;
  return q.mode == kSoftmax && log_z > -kInf &&
         __builtin_fabs(log_z) * q.inv_t > (sizeof(R) == 4 ? 1e9 : 1e6);
}

// Whether a query's gradients are sums over the rows, which needs neither sigma = 0 nor an exact hit.
template <class R>
MK_INLINE bool has_gradient(const Query<R>& q) {
  return q.mode == kSoftmax || q.mode == kLogWeighting;
}

// Returns kDone or kStopped.
template <class R>
static int backward_sweep(const Source<R>& src, const Queries& in, const BackwardArgs& io, const Plan& pl,
                          double b_max, int64_t b0, int64_t B, int64_t n0, int64_t n1, BackwardWork<R>& w) {
  enum { W = Vec<R>::W };
  const Products<R> products = products_for(src, pl);
  SweepWork<R>& f = w.fwd;
  memset((void*)w.sums, 0, pl.B * sizeof(BackwardSums));
  memset((void*)f.acc, 0, pl.B * pl.Dp * sizeof(R));
  memset((void*)w.near, 0, pl.B * pl.Dp * sizeof(R));
  const Conditions& conditions = in.conditions;
  const int64_t k = w.grad_c ? conditions.k : 0;
  if (k) memset((void*)w.grad_c, 0, 2 * pl.B * k * sizeof(double));
  load_queries(src, in, pl, b0, B, f);
  for (int64_t b = 0; b < B; b++) {
    const double *g = io.grads.mean + (b0 + b) * pl.D, *mean = io.sums.mean + (b0 + b) * pl.D;
    w.g_shift[b] = 0;
    for (int64_t d = 0; d < pl.D; d++) {
      f.row[d] = (R)g[d];
      w.g_shift[b] += g[d] * (mean[d] - src.center[d]);
    }
    put_query(src, pl, f.row, b, w.g);
    const double log_z = io.sums.log_z[b0 + b];
    if (log_z != log_z) f.q[b].mode = kNotFinite;  // a row is NaN
    if (is_far(f.q[b], log_z) || (f.q[b].mode == kLogWeighting && log_z == kInf)) f.q[b].mode = kZeroSigma;
  }
  const TileContext<R> s = make_tile_context(src, pl, in.bias, b_max, f);
  for (f.tile.n0 = n0; f.tile.n0 < n1; f.tile.n0 += pl.NT) {
    if (f.pace.stopped(3 * pl.NT * pl.D * B)) return kStopped;
    Prefetch next = load_tile(products, src, pl, f.tile, n1);
    load_bias(in.bias, f);
    products.dots(src, pl, f.tile, f.x, 0, B, f.p, next);
    products.dots(src, pl, f.tile, w.g, 0, B, w.pg, next);
    for (int64_t b = 0; b < B; b++) {
      if (b % W == 0)
        load_own_bias(f, b, (int)imin(W, B - b),
                      [&](int64_t i) { return io.sums.log_z[b0 + i] * f.q[i].inv_t + f.q[i].shared; });
      const bool moves = has_gradient(f.q[b]);
      for (int64_t j = 0; j < f.tile.cnt; j++) {
        w.dot[j] = moves ? f.p[j * pl.Ps + b] : R(0);
        w.dot_g[j] = w.pg[j * pl.Ps + b];
      }
      const ConditionArgs condition = {k ? &conditions : nullptr, f.own.part, w.grad_c + 2 * b * k};
      if (moves)
        backward_tile(s, io, f.q[b], b0 + b, w.g_shift[b], w.row, w.logit, w.dot, w.dot_g, w.near + b * pl.Dp,
                      w.sums[b], w.grad_bias, condition);
      for (int64_t j = 0; j < f.tile.cnt; j++) f.p[j * pl.Ps + b] = w.dot[j];
    }
    products.accumulate(src, pl, f.tile, f.p, 0, B, f.acc, next);
  }
  return kDone;
}

// What the rounding of the mean leaves in the gradient for the biases that queries share, taken off it: off
// [b] times the weight of each row, by the products of the rows with the queries alone. Its sum over the rows
// is small, but what a bias is made of may be large. io.grads.log_z is -off, and the other gradients are 0.
template <class R>
static int remove_drift(const Source<R>& src, const Queries& in, const BackwardArgs& io, const Plan& pl,
                        double b_max, int64_t b0, int64_t B, int64_t n0, int64_t n1, BackwardWork<R>& w) {
  enum { W = Vec<R>::W };
  bool any = false;
  for (int64_t b = b0; b < b0 + B; b++) any |= io.grads.log_z[b] != 0;
  if (!any) return kDone;
  const Products<R> products = products_for(src, pl);
  SweepWork<R>& f = w.fwd;
  load_queries(src, in, pl, b0, B, f);
  const TileContext<R> s = make_tile_context(src, pl, in.bias, b_max, f);
  for (int64_t j = 0; j < pl.NT; j++) w.dot_g[j] = 0;
  for (f.tile.n0 = n0; f.tile.n0 < n1; f.tile.n0 += pl.NT) {
    if (f.pace.stopped(pl.NT * pl.D * B)) return kStopped;
    Prefetch next = load_tile(products, src, pl, f.tile, n1);
    load_bias(in.bias, f);
    products.dots(src, pl, f.tile, f.x, 0, B, f.p, next);
    for (int64_t b = 0; b < B; b++) {
      if (b % W == 0)
        load_own_bias(f, b, (int)imin(W, B - b),
                      [&](int64_t i) { return io.sums.log_z[b0 + i] * f.q[i].inv_t + f.q[i].shared; });
      if (io.grads.log_z[b0 + b] == 0) continue;
      for (int64_t j = 0; j < f.tile.cnt; j++) w.dot[j] = f.p[j * pl.Ps + b];
      backward_tile(s, io, f.q[b], b0 + b, 0, w.row, w.logit, w.dot, w.dot_g, w.near + b * pl.Dp, w.sums[b],
                    w.grad_bias, {nullptr, f.own.part, nullptr});
    }
  }
  return kDone;
}

// Adds what the other parts of query b found to what the first one did.
template <class R>
static void join_backward_parts(const Plan& pl, const Queries& in, BackwardWork<R>* work, int parts,
                                int64_t b) {
  const int64_t k = work[0].grad_c ? in.conditions.k : 0;
  SweepWork<R>& f = work[0].fwd;
  for (int i = 1; i < parts; i++) {
    const double* from = (const double*)&work[i].sums[b];
    double* to = (double*)&work[0].sums[b];
    for (size_t e = 0; e < sizeof(BackwardSums) / sizeof(double); e++) to[e] += from[e];
    for (int64_t d = 0; d < pl.D; d++) work[0].near[b * pl.Dp + d] += work[i].near[b * pl.Dp + d];
    for (int64_t e = 2 * b * k; e < 2 * (b + 1) * k; e++) work[0].grad_c[e] += work[i].grad_c[e];
    for (int64_t d = 0; d < pl.Dp; d += 2 * Vec<R>::W) {
      R *a = acc_at(pl, f.acc, b, d), *z = acc_at(pl, work[i].fwd.acc, b, d);
      for (int e = 0; e < 2 * Vec<R>::W; e++) a[e] += z[e];
    }
  }
}

// From the sums over all rows to the gradients of query b, which is the block's query `row`. minus_off [B] or
// null receives what remove_drift takes off.
template <class R>
static void backward_finish(const Source<R>& src, const Plan& pl, const Queries& in, const BackwardArgs& io,
                            const BackwardWork<R>& w, int64_t row, int64_t b, double* minus_off) {
  const Query<R>& q = w.fwd.q[row];
  const BackwardSums& a = w.sums[row];
  R *acc = w.fwd.acc, *gx = (R*)io.out.x + b * pl.D;
  const R* near = w.near;
  const double lost = q.mode == kNotFinite ? __builtin_nan("") : 0, off = a.w > 0 ? a.drift / a.w : 0;
  if (minus_off) {  // the mean of h, which is 0 but for rounding
    const double shared = io.grads.log_z[b] + io.grads.mean_logit[b];
    minus_off[b] = has_gradient(q) && a.w > 0 ? shared - a.q / a.w : 0;
  }
  if (w.grad_c)
    finish_condition_gradient(in.conditions, b, w.grad_c + 2 * row * in.conditions.k, a.qh - off * a.wh, off,
                              lost, io.out);
  if (!has_gradient(q)) {
    for (int64_t d = 0; d < pl.D; d++) gx[d] = (R)lost;
    io.out.sigma[b] = io.out.alpha[b] = io.out.temperature[b] = lost;
    return;
  }
  const bool softmax = q.mode == kSoftmax;
  const double drift = softmax ? off : 0, is2 = softmax ? 1 / q.sigma / q.sigma : 1;
  const double T = q.temperature;
  const double* mean = io.sums.mean + b * pl.D;
  const double qc = a.qc - drift * (softmax ? a.w : 0);
  double cx = 0;  // <center, sum q c (x - alpha y)>
  enum { NR = 2 * Vec<R>::W };
  for (int64_t d = 0; d < pl.D; d += NR) {
    const R* p = acc_at(pl, acc, row, d);
    for (int64_t i = 0; i < imin(NR, pl.D - d); i++) {
      const double c = src.center[d + i];
      const double g = q.alpha * (p[i] * src.unit - drift * a.w * (mean[d + i] - c)) -
                       ((double)q.x[d + i] - q.alpha * c) * qc + near[row * pl.Dp + d + i];
      gx[d + i] = (R)(g * is2);
      cx -= c * g;
    }
  }
  io.out.sigma[b] =
      softmax ? -2 / q.sigma * (a.ql - drift * a.w * (io.sums.mean_logit[b] - io.sums.mean_bias[b])) : 0;
  io.out.alpha[b] = (a.qa - drift * a.wa + cx) * is2;
  io.out.temperature[b] = io.grads.log_z[b] * (io.sums.log_z[b] - io.sums.mean_logit[b]) / T - a.temp / T;
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
