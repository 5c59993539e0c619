// posterior for few features (D <= SMALL_D) and many queries, or few rows: queries lie across the vector's lanes.
//
// One part owns a range of queries and sweeps all rows in chunks of ROWS. Per chunk and vector of queries: logits by
// direct differences into L1, the largest one, then exponentials and sums, all in registers. A query's result depends
// on nothing but the rows: not on the threads, nor on how the batch is split. Queries whose logits float cannot hold
// (small sigma, large bias), or at a limit, are handed back for the general sweep, which evaluates exactly.
#pragma once
#include "cpu/posterior/posterior-inl.h"

namespace memokern { namespace MEMOKERN_ISA_NS {

static const double kLog2E = 1.4426950408889634074, kLn2 = 0.6931471805599453094;
enum { SMALL_D = 8, ROWS = 256, SMALL_BLOCK = 2048, FEW_ROWS = 2048 };

template <class R, int D> struct Lanes {  // one vector of queries
  typedef typename Vec<R>::T V;
  V x[D], acc[D], alpha, inv_t, m;  // -log2 of e^t: |x - alpha yc|^2 - inv_t b, each with its factor; m: the least
  double s[Vec<R>::W], st[Vec<R>::W], sb[Vec<R>::W], sw2[Vec<R>::W];
};

template <class R, int D, bool BIAS>
static void small_chunk(Lanes<R, D>& q, const R* y, const R* b, const R* b0, int64_t cnt) {
  enum { W = Vec<R>::W };
  typedef typename Vec<R>::T V;
  V l[ROWS], low = q.m;
  for (int64_t r = 0; r < cnt; r++) {
    V t = {};
#pragma GCC unroll 8
    for (int d = 0; d < D; d++) {
      V e = q.x[d] - q.alpha * splat<R>(y[r * D + d]);
      e *= e;
      MK_ROUND(e);  // a fused sum would round the coordinates differently: symmetric rows must stay ties
      t = d == 0 ? e : t + e;
    }
    if (BIAS) t -= q.inv_t * splat<R>(b[r]);
    l[r] = t;
    low = vmin(t, low);
  }
  const V none = splat<R>((R)kInf), lo = splat<R>(lowest_power(R(0)));
  V shift = low - q.m;
  shift = low == none ? V{} : (shift < lo ? lo : shift);
  const V f = vexp2(shift);
  V s = {}, st = {}, sw = {}, sb = {}, acc[D];
#pragma GCC unroll 8
  for (int d = 0; d < D; d++) acc[d] = V{};
  for (int64_t r = 0; r < cnt; r++) {
    V d_ = low - l[r];
    d_ = vmax(d_, lo);  // lo also where both are inf: no row so far has weight
    V w = vexp2(d_);
    if (BIAS) w = d_ > lo ? w : V{};  // else 2^lo is as good as nothing beside the largest
    s += w;
    st += w * d_;
    sw += w * w;
    if (BIAS) sb += w * splat<R>(b0[r]);
#pragma GCC unroll 8
    for (int d = 0; d < D; d++) acc[d] += w * splat<R>(y[r * D + d]);
  }
#pragma GCC unroll 8
  for (int d = 0; d < D; d++) q.acc[d] = q.acc[d] * f + acc[d];  // one rounding on the large sum per chunk, not per row
  for (int i = 0; i < W; i++) {
    const double g = f[i];
    q.st[i] = g * (q.st[i] + q.s[i] * shift[i]) + st[i];
    q.s[i] = g * q.s[i] + s[i];
    q.sb[i] = g * q.sb[i] + sb[i];
    q.sw2[i] = g * g * q.sw2[i] + sw[i];
  }
  q.m = low;
}

// Queries [b0, b1); `left` [b1 - b0] receives 1 where the query is handed back.
template <class R, int D>
static int small_part(const Source<R>& src, const Queries& in, double b_max, int64_t b0, int64_t b1, const Posterior& out, char* left) {
  enum { W = Vec<R>::W };
  Plan pl = {};
  pl.D = pl.depth = src.rows.d;
  const int64_t d_real = src.rows.d, N = src.rows.n, block = imin(SMALL_BLOCK, round_up(b1 - b0, W));
  Arena arena;
  if (!arena.reserve(Arena::bytes<Lanes<R, D> >(block / W) + Arena::bytes<Query<R> >(block) + Arena::bytes<R>(ROWS * D + 64) + 2 * Arena::bytes<R>(ROWS) +
                     Arena::bytes<R>(64)))
    return 1;
  Lanes<R, D>* lanes = arena.take<Lanes<R, D> >(block / W);
  Query<R>* q = arena.take<Query<R> >(block);
  R *y = arena.take<R>(ROWS * D + 64), *b = arena.take<R>(ROWS), *bz = arena.take<R>(ROWS), *row = arena.take<R>(64);
  const typename Fetch<R>::F fetch_row = fetch_for(src);
  for (int64_t q0 = b0; q0 < b1; q0 += block) {
    const int64_t count = imin(block, b1 - q0), vectors = (count + W - 1) / W;
    double y_max = 0;
    memset((void*)lanes, 0, vectors * sizeof(Lanes<R, D>));
    for (int64_t i = 0; i < vectors * W; i++) {
      Lanes<R, D>& v = lanes[i / W];
      const int e = i % W;
      if (i < count) q[i] = make_query(in, src, q0 + i, pl, row);  // else the last one, again
      else q[i] = q[count - 1];
      const bool soft = q[i].mode == kSoft;
      const double f = soft ? __builtin_sqrt(0.5 * kLog2E * q[i].inv_t) / q[i].sigma : 0;
      for (int64_t d = 0; d < d_real; d++) v.x[d][e] = (R)(f * row[d]);
      v.alpha[e] = (R)(f * q[i].alpha);
      v.inv_t[e] = (R)(soft ? kLog2E * q[i].inv_t : 1);
      v.m[e] = (R)kInf;
    }
    for (int64_t n0 = 0; n0 < N; n0 += ROWS) {
      const int64_t cnt = imin(ROWS, N - n0);
      for (int64_t r = 0; r < cnt; r++) {
        fetch_row(src, n0 + r, 0, d_real, row);
        double sq = 0;
        for (int d = 0; d < D; d++) {
          const double v = d < d_real ? row[d] * src.rows.scale : 0;
          y[r * D + d] = (R)v;
          sq += v * v;
        }
        y_max = dmax(y_max, sq);
        if (in.bias) {
          const double v = in.bias[n0 + r];
          b[r] = (R)v;
          bz[r] = v == -kInf ? R(0) : (R)v;
        }
      }
      for (int64_t i = 0; i < vectors; i++) {
        if (in.bias) small_chunk<R, D, true>(lanes[i], y, b, bz, cnt);
        else small_chunk<R, D, false>(lanes[i], y, b, bz, cnt);
      }
    }
    y_max = __builtin_sqrt(y_max);
    for (int64_t i = 0; i < count; i++) {
      Lanes<R, D>& v = lanes[i / W];
      const int e = i % W;
      const int64_t at = q0 + i;
      // Rows within 15 of the largest logit are those that matter; their distance r bounds the error of a logit:
      // coordinates are off by u (2 |xc| + 3 |alpha y|), squares and sums by (D + 4) u.
      const double u = Precision<R>::u, m = -v.m[e] * kLn2, reach = __builtin_fabs(m) + 2 * b_max * q[i].inv_t + 15;
      const double h = 0.5 * q[i].inv_t / (q[i].sigma * q[i].sigma);
      const double err = 2 * u * __builtin_sqrt(reach * h) * (2 * __builtin_sqrt(q[i].xx) + 3 * __builtin_fabs(q[i].alpha) * y_max) +
                         (D + 4) * u * reach + (in.bias ? 4 * u * b_max * q[i].inv_t : 0);
      left[at - b0] = q[i].mode != kSoft || !(err < Precision<R>::tolerance) || !(v.s[e] > 0);
      if (left[at - b0]) continue;
      State st = {0, m, v.s[e], v.st[e] * kLn2, v.sb[e], v.sw2[e]};
      double acc[D];
      for (int d = 0; d < D; d++) acc[d] = v.acc[d][e];
      R* mean = (R*)out.mean + at * d_real;
      for (int64_t d = 0; d < d_real; d++) mean[d] = (R)(acc[d] / st.s + src.center[d]);
      finish_stats(q[i], st, at, out);
    }
  }
  return 0;
}

template <class R> struct Small { typedef int (*F)(const Source<R>&, const Queries&, double, int64_t, int64_t, const Posterior&, char*); };
template <class R> static typename Small<R>::F small_for(int64_t d) {
  switch (d) {
    case 1: return small_part<R, 1>;
    case 2: return small_part<R, 2>;
    case 3: return small_part<R, 3>;
    case 4: return small_part<R, 4>;
    default: return small_part<R, SMALL_D>;
  }
}

// Dispatch of `posterior` by shape.
template <class R> static int posterior_typed(const Rows& rows, const Queries& in, const Posterior& out, int threads) {
  enum { W = Vec<R>::W };
  if (in.b == 0) return 0;
  Centred<R> c;
  if (!c.prepare(rows)) return 1;
  const double b_max = largest_bias(in.bias, rows.n);
  if (rows.d > SMALL_D || (in.b < 32 && (rows.d > 4 || rows.n > FEW_ROWS)) || in.kernel != kGaussian) return posterior_general(c, in, out, b_max, threads);
  const int parts = (int)imax(1, imin(threads, in.b / (2 * W)));
  Arena marks;
  if (!marks.reserve(Arena::bytes<char>(in.b))) return 1;
  char* left = marks.take<char>(in.b);
  const typename Small<R>::F part = small_for<R>(rows.d);
  int failed = 0;
#pragma omp parallel for num_threads(parts) schedule(static, 1) reduction(| : failed) if (parts > 1)
  for (int i = 0; i < parts; i++) {
    const int64_t b0 = in.b * i / parts / W * W, b1 = i + 1 == parts ? in.b : in.b * (i + 1) / parts / W * W;
    failed |= part(c.src, in, b_max, b0, b1, out, left + b0);
  }
  if (failed) return 1;
  int64_t count = 0;
  for (int64_t b = 0; b < in.b; b++) count += left[b];
  if (count == 0) return 0;
  Arena arena;  // the queries handed back, gathered, swept, and scattered
  const int64_t D = rows.d;
  if (!arena.reserve(2 * Arena::bytes<R>(count * D) + 7 * Arena::bytes<double>(count))) return 1;
  R *x = arena.take<R>(count * D), *mean = arena.take<R>(count * D);
  double* column[7];
  for (int i = 0; i < 7; i++) column[i] = arena.take<double>(count);
  int64_t k = 0;
  for (int64_t b = 0; b < in.b; b++) {
    if (!left[b]) continue;
    memcpy(x + k * D, (const R*)in.x + b * D, D * sizeof(R));
    column[0][k] = in.sigma[b];
    column[1][k] = in.alpha[b];
    column[2][k++] = in.temperature[b];
  }
  const Queries rest = {x, count, column[0], column[1], column[2], in.bias, in.kernel};
  const Posterior to = {mean, column[3], column[4], column[5], column[6]};
  if (posterior_general(c, rest, to, b_max, threads)) return 1;
  k = 0;
  for (int64_t b = 0; b < in.b; b++) {
    if (!left[b]) continue;
    memcpy((R*)out.mean + b * D, mean + k * D, D * sizeof(R));
    out.log_z[b] = to.log_z[k];
    out.mean_logit[b] = to.mean_logit[k];
    out.mean_bias[b] = to.mean_bias[k];
    out.weight_sq[b] = to.weight_sq[k++];
  }
  return 0;
}

} }  // namespace
