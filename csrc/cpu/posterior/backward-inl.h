// posterior_backward: the same sweep with weights recomputed from log_z.
//
// One part owns a range of rows and streams tiles. Per tile: products of the rows with the queries and with the
// incoming gradients of the mean, the coefficient q of every (query, row), and acc += q yc. In words: grad_x is
// sum q d l/dx, and so on for sigma, alpha, bias (see the formulas in memokern/ops.py). Three products to the forward's two.
#pragma once
#include "cpu/posterior/posterior-inl.h"

namespace memokern { namespace MEMOKERN_ISA_NS {

struct Sums {
  double w, drift;   // sum of w; sum of w <g, y - mean> / T, zero but for rounding: subtracted at the end
  double q, qc;      // sums of q, and of q c but for the rows in `near`, with d l / d x = c (alpha y - x)
  double ql;         // sum of q (l - b)
  double qa, wa;     // sums of q c <x - alpha y, yc>, and of w <x - alpha y, yc>
  double temp;       // sum of w (l - E) h, h: what multiplies d w
};

template <class R> struct BackWork {
  Work<R> fwd;
  R *g, *pg;           // gradients of the mean, laid out as the queries; [NT][Ps] their products with the rows
  R *dot, *dot_g;      // [NT] those of one query
  R* logit;            // [NT]
  double* row;         // [D] a row as given
  R* near;             // [B][Dp] sum of q c (alpha y - x) over the rows taken by direct differences
  double *g_shift;     // [B] <g, mean - center>
  Sums* sums;          // [B]
  double* grad_bias;   // [N] or null
  Arena arena;
  bool reserve(const Plan& pl, bool bias, int64_t N) {
    if (!fwd.reserve(pl, bias)) return false;
    if (!arena.reserve(Arena::bytes<R>(pl.Bp * pl.Dp) + Arena::bytes<R>(pl.B * pl.Dp) + Arena::bytes<R>(pl.NT * pl.Ps) + 3 * Arena::bytes<R>(pl.NT) +
                       Arena::bytes<double>(pl.B) + Arena::bytes<double>(pl.D) + Arena::bytes<Sums>(pl.B) + (bias ? Arena::bytes<double>(N) : 0)))
      return false;
    g = arena.take<R>(pl.Bp * pl.Dp);
    pg = arena.take<R>(pl.NT * pl.Ps);
    dot = arena.take<R>(pl.NT);
    dot_g = arena.take<R>(pl.NT);
    logit = arena.take<R>(pl.NT);
    row = arena.take<double>(pl.D);
    near = arena.take<R>(pl.B * pl.Dp);
    g_shift = arena.take<double>(pl.B);
    sums = arena.take<Sums>(pl.B);
    grad_bias = bias ? arena.take<double>(N) : nullptr;
    return true;
  }
};

// The row by direct differences: |x - alpha y|^2, <x - alpha y, yc>, <g, y - mean>. Leaves y in row.
template <class R>
static void exact_row(const Source<R>& src, const Query<R>& q, const double* mean, const double* g, int64_t n, double* row, double* out) {
  out[0] = exact_for(src)(src, n, q.x, q.alpha);
  values_for(src)(src, n, row);
  double xy = 0, gy = 0;
  for (int64_t d = 0; d < src.rows.d; d++) {
    xy += ((double)q.x[d] - q.alpha * row[d]) * (row[d] - src.center[d]);
    gy += g[d] * (row[d] - mean[d]);
  }
  out[1] = xy;
  out[2] = gy;
}

template <class R>
static void backward_step(const Step<R>& s, const Gradients& io, const Query<R>& q, int64_t b, double g_shift, double* row, R* logit, R* p, R* pg, R* near, Sums& a, double* grad_bias) {
  const bool log_map = q.mode == kLogMap;
  const double T = q.temperature, E = io.mean_logit[b], Eb = io.mean_bias[b], S = io.weight_sq[b];
  const double gL = io.g_log_z[b], gE = io.g_mean_logit[b], gb = io.g_mean_bias[b], gS = io.g_weight_sq[b];
  const double common = log_map ? 0 : q.xxt * T, tz = (io.log_z[b] + common) / T, err = error_of(q, s);
  const double lo = err > Precision<R>::theta ? threshold<R>(tz, err) : kInf, half = 0.5 * (double)s.D;
  const double delta = log_map ? delta_of(q, s) : 0;
  if (!log_map && (double)logits(q, s, p, logit) < tz + floor_of(R(0)) - err) {  // the whole tile is without weight
    for (int64_t j = 0; j < s.tile->cnt; j++) p[j] = 0;
    return;
  }
  for (int64_t j = 0; j < s.tile->cnt; j++) {
    const double bj = bias_of(s, j);
    double t, r2 = 0, exact[3];
    bool direct;
    if (log_map) {
      r2 = q.xx - 2 * ((double)p[j] * q.a1 - (double)s.tile->sq[j] * q.a2);
      const double least = r2 - delta, e = least > 0 ? half * delta / least / T : kInf;
      const double high = least > 0 ? (bj - half * __builtin_log(least / s.D)) / T : kInf;
      direct = bj != -kInf && e > Precision<R>::theta && high > tz + __builtin_log(Precision<R>::theta / dmin(1, e));
      t = high;
    } else {
      t = logit[j];
      direct = !(t <= lo);
    }
    if (bj == -kInf || (!direct && t - tz < floor_of(R(0)))) { p[j] = 0; continue; }
    double l, xy, gy;
    if (direct) {
      exact_row(*s.src, q, io.mean + b * s.D, io.g_mean + b * s.D, s.tile->n0 + j, row, exact);
      r2 = exact[0];
      xy = exact[1];
      gy = exact[2];
      l = bj - 0.5 * (r2 / q.sigma) / q.sigma;
    } else {
      xy = (double)p[j] - q.alpha * s.tile->sq[j];
      gy = (double)pg[j] - g_shift;
      l = t * T - common;
    }
    if (log_map) l = bj - half * __builtin_log(r2 / s.D);
    const double w = __builtin_exp((l - io.log_z[b]) / T);
    const double hg = gy / T, ho = gE * (l - E) / T + gb * (bj - Eb) / T + 2 * gS * (w - S) / T;
    const double coeff = w * (gL + gE + hg + ho), c = log_map ? s.D / r2 : 1;
    a.w += w;
    a.drift += w * hg;
    a.q += coeff;
    a.ql += coeff * (l - bj);
    a.qa += coeff * c * xy;
    a.wa += w * xy;
    a.temp += w * (l - E) * (hg + ho);
    if (grad_bias) grad_bias[s.tile->n0 + j] += coeff + gb * w;
    if (direct) {  // its term of grad_x as it is: in the sums below it would cancel where r is small
      for (int64_t d = 0; d < s.D; d++)
        near[d] += (R)(coeff * c * (q.alpha * row[d] - (double)q.x[d]));
      p[j] = R(0);
    } else {
      a.qc += coeff * c;
      p[j] = (R)(coeff * c);
    }
  }
}

// A query at its limit (sigma = 0, or an exact hit of the log kernel): only the nearest rows have weight, and only the
// bias and the temperature still move it. r2 [N] is work space. Without a bias only a finite log_z moves (by T).
template <class R>
static void backward_limit(const Step<R>& s, const Gradients& io, const Query<R>& q, int64_t b, double* row, double* r2, double* grad_bias, int threads) {
  const int64_t N = s.src->rows.n, D = s.D;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t n = 0; n < N; n++) r2[n] = s.bias && s.bias[n] == -kInf ? kInf : s.exact(*s.src, n, q.x, q.alpha);
  double best = kInf, m = -kInf, z = 0, exact[3];
  for (int64_t n = 0; n < N; n++) best = dmin(best, r2[n]);
  for (int64_t n = 0; n < N; n++)
    if (r2[n] == best) m = dmax(m, s.bias ? s.bias[n] : 0);
  for (int64_t n = 0; n < N; n++)
    if (r2[n] == best) z += __builtin_exp(((s.bias ? s.bias[n] : 0) - m) * q.inv_t);
  const bool finite = q.mode == kHard && best == 0;  // only then log_z and mean_logit are finite and follow the bias
  const double T = q.temperature, Eb = io.mean_bias[b];
  const double gL = finite ? io.g_log_z[b] : 0, gE = finite ? io.g_mean_logit[b] : 0, gb = io.g_mean_bias[b];
  double temp = finite ? gL * (io.log_z[b] - Eb) / T : 0;
  for (int64_t n = 0; n < N; n++) {
    if (r2[n] != best) continue;
    const double bn = s.bias ? s.bias[n] : 0, w = __builtin_exp((bn - m) * q.inv_t) / z;
    exact_row(*s.src, q, io.mean + b * D, io.g_mean + b * D, n, row, exact);
    const double h = (exact[2] + (gE + gb) * (bn - Eb) + 2 * io.g_weight_sq[b] * (w - io.weight_sq[b])) / T;
    if (grad_bias) grad_bias[n] += w * (gL + gE + gb + h);
    temp -= w * (bn - Eb) * h / T;
  }
  io.grad_temperature[b] = temp;
}

template <class R>
static void backward_sweep(const Source<R>& src, const Queries& in, const Gradients& io, const Plan& pl, double b_max, int64_t b0, int64_t B, int64_t n0, int64_t n1, BackWork<R>& w) {
  const Engine<R> engine = engine_for(src, pl);
  Work<R>& f = w.fwd;
  memset((void*)w.sums, 0, pl.B * sizeof(Sums));
  memset((void*)f.acc, 0, pl.B * pl.Dp * sizeof(R));
  memset((void*)w.near, 0, pl.B * pl.Dp * sizeof(R));
  load_queries(src, in, pl, b0, B, f);
  for (int64_t b = 0; b < B; b++) {
    const double *g = io.g_mean + (b0 + b) * pl.D, *mean = io.mean + (b0 + b) * pl.D;
    w.g_shift[b] = 0;
    for (int64_t d = 0; d < pl.D; d++) {
      f.row[d] = (R)g[d];
      w.g_shift[b] += g[d] * (mean[d] - src.center[d]);
    }
    put_query(src, pl, f.row, b, w.g);
    if (f.q[b].mode == kLogMap && io.log_z[b0 + b] == kInf) f.q[b].mode = kHard;
  }
  const Step<R> s = make_step(src, pl, in.bias, b_max, f);
  for (f.tile.n0 = n0; f.tile.n0 < n1; f.tile.n0 += pl.NT) {
    Ahead next = load_tile(engine, src, pl, f.tile, n1);
    load_bias(in.bias, f);
    engine.dots(src, pl, f.tile, f.x, 0, B, f.p, next);
    engine.dots(src, pl, f.tile, w.g, 0, B, w.pg, next);
    for (int64_t b = 0; b < B; b++) {
      const bool moves = f.q[b].mode == kSoft || f.q[b].mode == kLogMap;
      for (int64_t j = 0; j < f.tile.cnt; j++) {
        w.dot[j] = moves ? f.p[j * pl.Ps + b] : R(0);
        w.dot_g[j] = w.pg[j * pl.Ps + b];
      }
      if (moves) backward_step(s, io, f.q[b], b0 + b, w.g_shift[b], w.row, w.logit, w.dot, w.dot_g, w.near + b * pl.Dp, w.sums[b], w.grad_bias);
      for (int64_t j = 0; j < f.tile.cnt; j++) f.p[j * pl.Ps + b] = w.dot[j];
    }
    engine.accumulate(src, pl, f.tile, f.p, 0, B, f.acc, next);
  }
}

// The sums of all parts to the gradients of query b.
template <class R>
static void backward_finish(const Source<R>& src, const Plan& pl, const Queries& in, const Gradients& io, const Query<R>& q, const Sums& a, R* acc, const R* near, int64_t row, int64_t b) {
  R* gx = (R*)io.grad_x + b * pl.D;
  const double nan = __builtin_nan("");
  const bool moves = q.mode == kSoft || q.mode == kLogMap;
  if (!moves) {
    const double v = q.mode == kLost ? nan : 0;
    for (int64_t d = 0; d < pl.D; d++) gx[d] = (R)v;
    io.grad_sigma[b] = io.grad_alpha[b] = io.grad_temperature[b] = v;
    return;
  }
  const bool soft = q.mode == kSoft;
  const double drift = soft && a.w > 0 ? a.drift / a.w : 0, is2 = soft ? 1 / q.sigma / q.sigma : 1, T = q.temperature;
  const double* mean = io.mean + b * pl.D;
  const double qc = a.qc - drift * (soft ? a.w : 0);
  double cx = 0;  // <center, sum q c (x - alpha y)>
  enum { NR = 2 * Vec<R>::W };
  for (int64_t d = 0; d < pl.D; d += NR) {
    const R* p = acc_at(pl, acc, row, d);
    for (int64_t i = 0; i < imin(NR, pl.D - d); i++) {
      const double c = src.center[d + i];
      const double g = q.alpha * (p[i] * src.rows.scale - drift * a.w * (mean[d + i] - c)) - ((double)q.x[d + i] - q.alpha * c) * qc + near[row * pl.Dp + d + i];
      gx[d + i] = (R)(g * is2);
      cx -= c * g;
    }
  }
  io.grad_sigma[b] = soft ? -2 / q.sigma * (a.ql - drift * a.w * (io.mean_logit[b] - io.mean_bias[b])) : 0;
  io.grad_alpha[b] = (a.qa - drift * a.wa + cx) * is2;
  io.grad_temperature[b] = io.g_log_z[b] * (io.log_z[b] - io.mean_logit[b]) / T - a.temp / T;
}

template <class R> static int backward_typed(const Rows& rows, const Queries& in, const Gradients& io, int threads) {
  if (io.grad_bias) memset((void*)io.grad_bias, 0, rows.n * sizeof(double));
  if (in.b == 0) return 0;
  Centred<R> c;
  if (!c.prepare(rows)) return 1;
  const Plan pl = make_plan<R>(in.b, rows);
  const double b_max = largest_bias(in.bias, rows.n);
  const int64_t blocks = (in.b + pl.B - 1) / pl.B, tiles = (rows.n + pl.NT - 1) / pl.NT;
  const bool by_queries = blocks >= 2 * threads || tiles < 2;
  const int parts = (int)imax(1, imin(threads, by_queries ? blocks : tiles));
  WorkList<BackWork<R> > list(parts);
  BackWork<R>* work = list.items;
  if (!work) return 1;
  for (int i = 0; i < parts; i++)
    if (!work[i].reserve(pl, in.bias != nullptr, rows.n)) return 1;
  for (int64_t k0 = 0; k0 < blocks; k0 += by_queries ? blocks : 1) {
#pragma omp parallel for num_threads(parts) schedule(static, 1) if (parts > 1)
    for (int i = 0; i < parts; i++) {
      const int64_t first = by_queries ? blocks * i / parts : k0, last = by_queries ? blocks * (i + 1) / parts : k0 + 1;
      for (int64_t k = first; k < last; k++) {
        const int64_t b0 = k * pl.B, B = imin(pl.B, in.b - b0);
        const int64_t n0 = by_queries ? 0 : imin(rows.n, tiles * i / parts * pl.NT);
        const int64_t n1 = by_queries ? rows.n : imin(rows.n, tiles * (i + 1) / parts * pl.NT);
        backward_sweep(c.src, in, io, pl, b_max, b0, B, n0, n1, work[i]);
        if (!by_queries) continue;
        for (int64_t b = 0; b < B; b++)
          backward_finish(c.src, pl, in, io, work[i].fwd.q[b], work[i].sums[b], work[i].fwd.acc, work[i].near, b, b0 + b);
      }
    }
    if (by_queries) break;
    const int64_t b0 = k0 * pl.B, B = imin(pl.B, in.b - b0);
    Work<R>& f = work[0].fwd;
    for (int64_t b = 0; b < B; b++) {
      for (int i = 1; i < parts; i++) {
        const double* from = (const double*)&work[i].sums[b];
        double* to = (double*)&work[0].sums[b];
        for (size_t e = 0; e < sizeof(Sums) / sizeof(double); e++) to[e] += from[e];
        for (int64_t d = 0; d < pl.D; d++) work[0].near[b * pl.Dp + d] += work[i].near[b * pl.Dp + d];
        for (int64_t d = 0; d < pl.Dp; d += 2 * Vec<R>::W) {
          R *a = acc_at(pl, f.acc, b, d), *z = acc_at(pl, work[i].fwd.acc, b, d);
          for (int e = 0; e < 2 * Vec<R>::W; e++) a[e] += z[e];
        }
      }
      backward_finish(c.src, pl, in, io, f.q[b], work[0].sums[b], f.acc, work[0].near, b, b0 + b);
    }
  }
  const Step<R> s = make_step(c.src, pl, in.bias, b_max, work[0].fwd);
  Arena distances;
  double* r2 = nullptr;
  for (int64_t b = 0; b < in.b; b++) {
    const Query<R> q = make_query(in, c.src, b, pl, work[0].fwd.row);
    const double log_z = io.log_z[b];
    if (q.mode == kLost && io.grad_bias) io.grad_bias[0] = __builtin_nan("");
    if (q.mode != kHard && !(q.mode == kLogMap && log_z == kInf)) continue;
    if (!in.bias && !(log_z > -kInf && log_z < kInf)) continue;
    if (!r2) {
      if (!distances.reserve(Arena::bytes<double>(rows.n))) return 1;
      r2 = distances.take<double>(rows.n);
    }
    backward_limit(s, io, q, b, work[0].row, r2, io.grad_bias, threads);
  }
  if (io.grad_bias)
    for (int i = 0; i < parts; i++)
      for (int64_t n = 0; n < rows.n; n++) io.grad_bias[n] += work[i].grad_bias[n];
  return 0;
}

} }  // namespace
