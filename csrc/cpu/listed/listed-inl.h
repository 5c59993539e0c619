// The posterior over a list of rows for each query, and its gradient: every logit by direct differences in double, so that
// exact hits are exact and ties stay ties.
//
// A query's list is cut into pieces where there are fewer queries than threads could share evenly; each piece is a State and
// an accumulator, joined by merge(). A piece goes over its rows twice: for their logits, then to add up those with weight.
#pragma once
#include "cpu/posterior/posterior-inl.h"

namespace memokern { namespace MEMOKERN_ISA_NS {

enum {
  PIECE = 64,    // rows of a piece, at least
  SUM_ROWS = 4,  // rows added to the accumulator at a time
  SUM_D = 512    // and features: these rows in double stay in L1
};

struct Piece {
  int64_t b, i0, i1;  // rows index[i0 .. i1) of query b
  bool alone;         // the query's only piece
  State st;
  double* sum;        // [D] sum of e^(t-m) y; the backward pass: of q y; of pieces that are alone, their thread's own
};

// The rows as they are, without a centre; and queries in double, which changes nothing: one instance serves both types.
struct Plain {
  Source<double> src;  // scale (raw + shift / scale)
  Exact<double>::F exact;
  Fetch<double>::F fetch;
  Values<double>::F row;
  Arena arena;
  bool prepare(const Rows& rows) {
    const int64_t Dp = round_up(rows.d, 64);
    if (!arena.reserve(Arena::bytes<double>(Dp))) return false;
    double* shift = arena.take<double>(Dp);
    for (int64_t d = 0; d < rows.d; d++) shift[d] = rows.shift / rows.scale;
    memset((void*)&src, 0, sizeof src);
    src.rows = rows;
    src.offset = shift;
    exact = exact_for(src);
    fetch = fetch_for(src);
    row = values_for(src);
    return true;
  }
};

// Query b in double: itself, or converted into own [D].
static const double* query_x(const Queries& in, bool f64, int64_t b, int64_t D, double* own) {
  if (f64) return (const double*)in.x + b * D;
  const float* x = (const float*)in.x + b * D;
  for (int64_t d = 0; d < D; d++) own[d] = x[d];
  return own;
}
static void put(void* out, bool f64, int64_t i, double v) {
  if (f64) ((double*)out)[i] = v;
  else ((float*)out)[i] = (float)v;
}

// sum += sum_i w_i y_i over the rows with a weight, SUM_ROWS at a time. sum has room for whole vectors.
static void add_rows(const Source<double>& src, Fetch<double>::F fetch, const int64_t* n, const double* w, int64_t count, double least, double* sum) {
  enum { W = Vec<double>::W };
  double buffer[SUM_ROWS * SUM_D];
  int64_t i = 0;
  while (i < count) {
    const double* from[SUM_ROWS];
    double a[SUM_ROWS];
    int64_t rows[SUM_ROWS];
    int m = 0;
    for (; i < count && m < SUM_ROWS; i++) {
      if (!(__builtin_fabs(w[i]) > least)) continue;
      rows[m] = n[i];
      a[m++] = w[i] * src.rows.scale;
    }
    if (m == 0) break;
    for (int e = m; e < SUM_ROWS; e++) a[e] = 0;
    for (int64_t d0 = 0; d0 < src.rows.d; d0 += SUM_D) {
      const int64_t cnt = imin(SUM_D, src.rows.d - d0);
      for (int e = 0; e < SUM_ROWS; e++) {
        from[e] = buffer + imin(e, m - 1) * SUM_D;
        if (e < m) fetch(src, rows[e], d0, cnt, buffer + e * SUM_D);
      }
      for (int64_t d = 0; d < cnt; d += W)
        store(sum + d0 + d, load(sum + d0 + d) + (splat(a[0]) * load(from[0] + d) + splat(a[1]) * load(from[1] + d)) + (splat(a[2]) * load(from[2] + d) + splat(a[3]) * load(from[3] + d)));
    }
  }
}

// What is known of a query on its support; kHard where sigma is 0, or as good as.
static Query<double> support_query(const Queries& in, const double* x, int64_t b, int64_t D) {
  Query<double> q;
  memset((void*)&q, 0, sizeof q);
  q.x = x;
  q.d = (double)D;
  q.alpha = in.alpha[b];
  q.sigma = in.sigma[b];
  q.temperature = in.temperature[b];
  q.inv_t = 1 / q.temperature;
  enum { W = Vec<double>::W };
  Vec<double>::T sum = {};
  int64_t d = 0;
  for (; d + W <= D; d += W) sum += load(x + d) * load(x + d);
  double xx = hsum<double>(sum);
  for (; d < D; d++) xx += x[d] * x[d];
  q.xx = xx;
  if (!(xx < kInf) || !(q.sigma >= 0) || !(q.inv_t > 0) || !(q.inv_t < kInf)) q.mode = kLost;
  else q.mode = q.inv_t / q.sigma / q.sigma * (xx + 1) < Precision<double>::big ? kSoft : kHard;
  return q;
}

// Logits t of a piece from its squared distances in t (hard: those of the nearest rows, the others -inf), and its state.
static State weigh(const Query<double>& q, const double* bias, const int64_t* n, double* t, int64_t count) {
  State st = neutral();
  double key = 0;
  if (q.mode == kHard) {
    key = kInf;
    for (int64_t i = 0; i < count; i++)
      if (!bias || bias[n[i]] > -kInf) key = dmin(key, t[i]);
  }
  double m = -kInf;
  for (int64_t i = 0; i < count; i++) {
    const double b = bias ? bias[n[i]] : 0;
    if (q.mode == kHard) t[i] = t[i] == key ? b * q.inv_t : -kInf;
    else t[i] = (b - 0.5 * (t[i] / q.sigma) / q.sigma) * q.inv_t;
    m = dmax(m, t[i]);
  }
  if (!(m > -kInf)) return st;
  st.key = key;
  st.m = m;
  for (int64_t i = 0; i < count; i++) {
    const double d = t[i] - m, w = __builtin_exp(d);
    t[i] = w;
    if (w == 0) continue;
    st.s += w;
    st.st += w * d;
    st.sw2 += w * w;
    if (bias) st.sb += w * bias[n[i]];
  }
  return st;
}

// Whether the lists are lists: positions that do not fall, from 0, and rows that exist.
static bool valid(const Support& list, int64_t B, int64_t N) {
  if (list.start[0] != 0 || list.start[B] != list.count) return false;
  for (int64_t b = 0; b < B; b++)
    if (list.start[b + 1] < list.start[b]) return false;
  bool good = true;
  for (int64_t i = 0; i < list.count; i++) good &= (uint64_t)list.index[i] < (uint64_t)N;
  return good;
}

// Pieces of all lists: each query has one at least, and no thread is left with much more than its share.
static int64_t cut(const Support& list, int64_t B, int threads, Piece* pieces) {
  const int64_t size = imax(PIECE, list.start[B] / (4 * threads) + 1);
  int64_t k = 0;
  for (int64_t b = 0; b < B; b++) {
    const int64_t count = list.start[b + 1] - list.start[b], n = threads == 1 ? 1 : imax(1, (count + size - 1) / size);
    for (int64_t i = 0; i < n; i++, k++) {
      if (!pieces) continue;
      pieces[k].b = b;
      pieces[k].alone = n == 1;
      pieces[k].i0 = list.start[b] + count * i / n;
      pieces[k].i1 = list.start[b] + count * (i + 1) / n;
    }
  }
  return k;
}

// The pieces' accumulators: of those to be joined; count them with none to give them to.
static int64_t place(Piece* pieces, int64_t count, int64_t Dp, double* sums) {
  int64_t k = 0;
  for (int64_t i = 0; i < count; i++) {
    if (pieces[i].alone) continue;
    pieces[i].sum = sums + k * Dp;
    k += 1;
  }
  return k;
}

static void support_finish(const Query<double>& q, const Piece& c, int64_t D, const Posterior& out, bool f64) {
  const bool none = q.mode == kLost || !(c.st.s > 0);
  finish_stats(q, c.st, c.b, out);
  if (q.mode != kLost && none) out.log_z[c.b] = -kInf;
  for (int64_t d = 0; d < D; d++) put(out.mean, f64, c.b * D + d, none ? __builtin_nan("") : c.sum[d] / c.st.s);
}

static int run_support(const Rows& rows, const Queries& in, const Support& list, const Posterior& out, bool f64, int threads) {
  if (in.b == 0) return 0;
  if (!valid(list, in.b, rows.n)) return 2;
  Plain p;
  Arena arena, joined;
  const int64_t D = rows.d, Dp = round_up(D, 64), count = cut(list, in.b, threads, nullptr);
  const int workers = (int)imax(1, imin(threads, count));
  if (!p.prepare(rows) || !arena.reserve(Arena::bytes<Piece>(count) + Arena::bytes<double>(list.count))) return 1;
  Piece* pieces = arena.take<Piece>(count);
  double* t = arena.take<double>(list.count);
  cut(list, in.b, threads, pieces);
  const int64_t joins = place(pieces, count, 0, nullptr);
  if (!joined.reserve(Arena::bytes<double>(joins * Dp) + Arena::bytes<double>(Dp))) return 1;
  place(pieces, count, Dp, joined.take<double>(joins * Dp));
  double* wide = joined.take<double>(Dp);
  int failed = 0;
#pragma omp parallel num_threads(workers) reduction(| : failed) if (workers > 1)
  {
    Arena own;
    const bool there = own.reserve(2 * Arena::bytes<double>(Dp));
    double *sum = there ? own.take<double>(Dp) : nullptr, *x = there ? own.take<double>(Dp) : nullptr;
    failed |= !there;
#pragma omp for schedule(dynamic, 1)
    for (int64_t k = 0; k < count; k++) {
      if (!there) continue;
      Piece& c = pieces[k];
      if (c.alone) {
        c.sum = sum;
        memset((void*)sum, 0, Dp * sizeof(double));
      }
      c.st = neutral();
      const Query<double> q = support_query(in, query_x(in, f64, c.b, D, x), c.b, D);
      const int64_t* n = list.index + c.i0;
      if (q.mode != kLost) {
        for (int64_t i = 0; i < c.i1 - c.i0; i++) t[c.i0 + i] = p.exact(p.src, n[i], q.x, q.alpha);
        c.st = weigh(q, in.bias, n, t + c.i0, c.i1 - c.i0);
      }
      // The weights left out, all together, are below 2^-60 of the largest.
      if (c.st.s > 0) add_rows(p.src, p.fetch, n, t + c.i0, c.i1 - c.i0, 8e-19 / (c.i1 - c.i0), c.sum);
      if (c.alone) support_finish(q, c, D, out, f64);
    }
  }
  for (int64_t k = 0; k < count && !failed;) {
    Piece& a = pieces[k++];
    if (a.alone) continue;
    for (; k < count && pieces[k].b == a.b; k++) {
      double fa, fb;
      merge(a.st, pieces[k].st, fa, fb);
      for (int64_t d = 0; d < D; d++) a.sum[d] = (fa == 0 ? 0 : fa * a.sum[d]) + (fb == 0 ? 0 : fb * pieces[k].sum[d]);
    }
    support_finish(support_query(in, query_x(in, f64, a.b, D, wide), a.b, D), a, D, out, f64);
  }
  return failed;
}

// The gradient. With w = softmax(l / T) on the list, h = <g, y> + gE l + gb b + 2 gS w and q = w (gL + gE + (h - sum w h) / T):
// grad_x = sum q (alpha y - x) / sigma^2, grad_sigma = sum q r^2 / sigma^3, grad_alpha = sum q <x - alpha y, y> / sigma^2,
// grad_T = gL (L - E) / T - sum w (l - E) h / T^2, grad_b = q + gb w. At sigma = 0 only the nearest rows have weight, and only
// the bias and the temperature still move it (backward-inl.h).
struct SupportBackward {
  const Plain* p;
  const Queries* in;
  const Support* list;
  const Gradients* io;
  double *t, *gy, *xy, *r2;  // [M] each; t: weights, then q; gy: <g, y>, then what the bias gets
};
// One pass over a piece's rows: r^2, <g, y>, <x - alpha y, y>.
static void support_products(const SupportBackward& s, const Piece& c, const double* x, double* row) {
  enum { W = Vec<double>::W };
  const Plain& p = *s.p;
  const int64_t D = p.src.rows.d;
  const double *g = s.io->g_mean + c.b * D, alpha = s.in->alpha[c.b];
  for (int64_t i = c.i0; i < c.i1; i++) {
    s.r2[i] = p.exact(p.src, s.list->index[i], x, alpha);
    p.row(p.src, s.list->index[i], row);
    Vec<double>::T vg = {}, vx = {};
    int64_t d = 0;
    for (; d + W <= D; d += W) {
      const Vec<double>::T y = load(row + d);
      vg += load(g + d) * y;
      vx += (load(x + d) - y * alpha) * y;
    }
    double sg = hsum<double>(vg), sx = hsum<double>(vx);
    for (; d < D; d++) {
      sg += g[d] * row[d];
      sx += (x[d] - alpha * row[d]) * row[d];
    }
    s.gy[i] = sg;
    s.xy[i] = sx;
  }
}
// From products to the coefficients of one query, and all its gradients but grad_x's sum over rows.
static void support_coefficients(const SupportBackward& s, int64_t b, const Query<double>& q) {
  const Gradients& io = *s.io;
  const int64_t i0 = s.list->start[b], count = s.list->start[b + 1] - i0;
  const int64_t* n = s.list->index + i0;
  double *t = s.t + i0, *gy = s.gy + i0, *xy = s.xy + i0, *r2 = s.r2 + i0;
  memcpy(t, r2, count * sizeof(double));
  const State st = weigh(q, s.in->bias, n, t, count);
  const bool hard = q.mode == kHard, finite = !hard || st.key == 0, any = st.s > 0;
  const double T = q.temperature, E = any ? T * (st.m + st.st / st.s) : 0, L = any ? T * (st.m + __builtin_log(st.s)) : 0;
  const double gL = finite ? io.g_log_z[b] : 0, gE = finite ? io.g_mean_logit[b] : 0, gb = io.g_mean_bias[b], gS = io.g_weight_sq[b];
  double mean_h = 0, sigma = 0, alpha = 0, temp = 0;
  for (int64_t i = 0; i < count; i++) {
    const double bn = s.in->bias ? s.in->bias[n[i]] : 0, w = any ? t[i] / st.s : 0;
    t[i] = w;
    if (w == 0) continue;
    const double l = hard ? bn : bn - 0.5 * (r2[i] / q.sigma) / q.sigma;
    gy[i] += gE * (l - E) + gb * bn + 2 * gS * w;  // h, but for a constant
    mean_h += w * gy[i];
  }
  const double is2 = hard ? 0 : 1 / q.sigma / q.sigma;
  for (int64_t i = 0; i < count; i++) {
    const double w = t[i];
    if (w == 0) {
      t[i] = gy[i] = 0;
      continue;
    }
    const double bn = s.in->bias ? s.in->bias[n[i]] : 0, l = hard ? bn : bn - 0.5 * (r2[i] / q.sigma) / q.sigma, h = gy[i] - mean_h;
    const double c = w * (gL + gE + h / T);
    temp += w * (l - E) * h;
    if (!hard) {
      sigma += c * ((r2[i] / q.sigma) / q.sigma);
      alpha += c * xy[i];
    }
    gy[i] = c + gb * w;
    t[i] = hard ? 0 : c;
  }
  io.grad_sigma[b] = hard ? 0 : sigma / q.sigma;
  io.grad_alpha[b] = alpha * is2;
  io.grad_temperature[b] = gL * (L - E) / T - temp / T / T;
}

static void support_backward_finish(const SupportBackward& s, const Piece& c, const Query<double>& q, const double* x, bool f64) {
  const int64_t D = s.p->src.rows.d;
  const bool lost = q.mode == kLost, hard = q.mode == kHard;
  double total = 0;
  for (int64_t i = s.list->start[c.b]; !lost && i < s.list->start[c.b + 1]; i++) total += s.t[i];
  const double v = lost ? __builtin_nan("") : 0;
  for (int64_t d = 0; d < D; d++) put(s.io->grad_x, f64, c.b * D + d, lost || hard ? v : (q.alpha * c.sum[d] - x[d] * total) / q.sigma / q.sigma);
  if (lost) s.io->grad_sigma[c.b] = s.io->grad_alpha[c.b] = s.io->grad_temperature[c.b] = v;
}

static int run_support_backward(const Rows& rows, const Queries& in, const Support& list, const Gradients& io, bool f64, int threads) {
  if (io.grad_bias) memset((void*)io.grad_bias, 0, rows.n * sizeof(double));
  if (in.b == 0) return 0;
  if (!valid(list, in.b, rows.n)) return 2;
  Plain p;
  Arena arena, joined;
  const int64_t D = rows.d, Dp = round_up(D, 64), M = list.count, count = cut(list, in.b, threads, nullptr);
  const int workers = (int)imax(1, imin(threads, count));
  if (!p.prepare(rows) || !arena.reserve(Arena::bytes<Piece>(count) + 4 * Arena::bytes<double>(M) + Arena::bytes<Query<double> >(in.b))) return 1;
  Piece* pieces = arena.take<Piece>(count);
  Query<double>* queries = arena.take<Query<double> >(in.b);
  double *t = arena.take<double>(M), *gy = arena.take<double>(M), *xy = arena.take<double>(M), *r2 = arena.take<double>(M);
  cut(list, in.b, threads, pieces);
  const int64_t joins = place(pieces, count, 0, nullptr);
  if (!joined.reserve(Arena::bytes<double>(joins * Dp) + Arena::bytes<double>(Dp))) return 1;
  place(pieces, count, Dp, joined.take<double>(joins * Dp));
  double* wide = joined.take<double>(Dp);
  const SupportBackward s = {&p, &in, &list, &io, t, gy, xy, r2};
  int failed = 0;
#pragma omp parallel num_threads(workers) reduction(| : failed) if (workers > 1)
  {
    Arena own;
    const bool there = own.reserve(2 * Arena::bytes<double>(Dp));
    double *sum = there ? own.take<double>(Dp) : nullptr, *x = there ? own.take<double>(Dp) : nullptr;
    failed |= !there;
#pragma omp for schedule(dynamic, 1)
    for (int64_t k = 0; k < count; k++)
      if (there) support_products(s, pieces[k], query_x(in, f64, pieces[k].b, D, x), sum);
#pragma omp for schedule(dynamic, 1)
    for (int64_t b = 0; b < in.b; b++) {
      if (!there) continue;
      queries[b] = support_query(in, query_x(in, f64, b, D, x), b, D);
      if (queries[b].mode != kLost) support_coefficients(s, b, queries[b]);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t k = 0; k < count; k++) {
      Piece& c = pieces[k];
      if (!there || queries[c.b].mode == kLost) continue;
      if (c.alone) {
        c.sum = sum;
        memset((void*)sum, 0, Dp * sizeof(double));
      }
      add_rows(p.src, p.fetch, list.index + c.i0, t + c.i0, c.i1 - c.i0, 0, c.sum);
      if (c.alone) support_backward_finish(s, c, queries[c.b], query_x(in, f64, c.b, D, x), f64);
    }
  }
  for (int64_t k = 0; k < count && !failed;) {
    Piece& a = pieces[k++];
    const Query<double>& q = queries[a.b];
    for (; k < count && pieces[k].b == a.b; k++)
      for (int64_t d = 0; d < D && q.mode != kLost; d++) a.sum[d] += pieces[k].sum[d];
    if (!a.alone || q.mode == kLost) support_backward_finish(s, a, q, query_x(in, f64, a.b, D, wide), f64);
  }
  if (!io.grad_bias || failed) return failed;
  for (int64_t b = 0; b < in.b; b++) {  // in order, so that any number of threads gives the same
    if (queries[b].mode == kLost) io.grad_bias[0] = __builtin_nan("");
    for (int64_t i = list.start[b]; queries[b].mode != kLost && i < list.start[b + 1]; i++) io.grad_bias[list.index[i]] += gy[i];
  }
  return 0;
}

} }  // namespace
