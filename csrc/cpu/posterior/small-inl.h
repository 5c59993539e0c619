// The sweep for few features (D <= SMALL_D) and many queries, or few rows: queries lie across the lanes of a
// vector.
//
// A part owns a range of queries and sweeps all rows in chunks of SMALL_ROWS. For each chunk and vector of
// queries it computes logits by direct differences into L1, then the largest one, then exponentials and sums
// in registers. A query's result depends on nothing but the rows: neither on the threads, nor on how the
// batch is split. Queries whose logits a float cannot hold (small sigma, large bias), and those without a
// softmax (sigma = 0, numbers that are not finite, no row with weight), are handed back for the general
// sweep.
#pragma once
#include "cpu/core/watch-inl.h"
#include "cpu/posterior/finish-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

static const double kLog2E = 1.4426950408889634074, kLn2 = 0.6931471805599453094;
enum {
  SMALL_D = 8,         // features, at most
  SMALL_ROWS = 256,    // rows of a chunk
  SMALL_BLOCK = 2048,  // queries that pass a chunk before the next one is read
  FEW_ROWS = 2048      // up to so many rows this sweep is taken for few queries too
};

// One vector of queries. Logits are handled as -log2 of e^v, which is |x - alpha yc|^2 - inv_t b, where x,
// alpha and inv_t hold the factors that make it so; m is the least of them.
template <class R, int D>
struct LaneQueries {
  typedef typename Vec<R>::T V;
  V x[D], acc[D], alpha, inv_t, m;
  double s[Vec<R>::W], s_v[Vec<R>::W], s_bias[Vec<R>::W], s_sq[Vec<R>::W];
};

// One chunk of cnt rows y, less the centre, for one vector of queries. b: the rows' bias; finite_b: the same
// with 0 for -inf.
template <class R, int D, bool BIAS>
static void small_chunk(LaneQueries<R, D>& q, const R* y, const R* b, const R* finite_b, int64_t cnt) {
  enum { W = Vec<R>::W };
  typedef typename Vec<R>::T V;
  V l[SMALL_ROWS], low = q.m;
  for (int64_t r = 0; r < cnt; r++) {
    V t = {};
#pragma GCC unroll 8
    for (int d = 0; d < D; d++) {
      V e = q.x[d] - q.alpha * splat<R>(y[r * D + d]);
      e *= e;
      MK_ROUND(e);  // a fused sum would round the coordinates differently, and symmetric rows must stay ties
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
  V s = {}, s_v = {}, s_sq = {}, s_bias = {}, acc[D];
#pragma GCC unroll 8
  for (int d = 0; d < D; d++) acc[d] = V{};
  for (int64_t r = 0; r < cnt; r++) {
    V d_ = low - l[r];
    d_ = vmax(d_, lo);  // lo also where both are inf, because no row so far has weight
    V w = vexp2(d_);
    // Without a bias the row of the largest logit has weight 1, and 2^lo is as good as nothing beside it.
    if (BIAS) w = d_ > lo ? w : V{};
    s += w;
    s_v += w * d_;
    s_sq += w * w;
    if (BIAS) s_bias += w * splat<R>(finite_b[r]);
#pragma GCC unroll 8
    for (int d = 0; d < D; d++) acc[d] += w * splat<R>(y[r * D + d]);
  }
  // The large sums are rounded once per chunk, not once per row.
#pragma GCC unroll 8
  for (int d = 0; d < D; d++) q.acc[d] = q.acc[d] * f + acc[d];
  for (int i = 0; i < W; i++) {
    const double g = f[i];
    q.s_v[i] = g * (q.s_v[i] + q.s[i] * shift[i]) + s_v[i];
    q.s[i] = g * q.s[i] + s[i];
    q.s_bias[i] = g * q.s_bias[i] + s_bias[i];
    q.s_sq[i] = g * g * q.s_sq[i] + s_sq[i];
  }
  q.m = low;
}

// Queries b0 .. b1. handed_back [b1 - b0] receives 1 where the query is left to the general sweep.
template <class R, int D>
static int small_part(const Source<R>& src, const Queries& in, double b_max, int64_t b0, int64_t b1,
                      const Output& out, char* handed_back) {
  enum { W = Vec<R>::W };
  Plan pl = {};
  pl.D = pl.depth = src.rows.d;
  const int64_t d_real = src.rows.d, N = src.rows.n, block = imin(SMALL_BLOCK, round_up(b1 - b0, W));
  Arena arena;
  if (!arena.reserve(Arena::bytes<LaneQueries<R, D>>(block / W) + Arena::bytes<Query<R>>(block) +
                     Arena::bytes<R>(SMALL_ROWS * D + 64) + 2 * Arena::bytes<R>(SMALL_ROWS) +
                     Arena::bytes<R>(64)))
    return kNoMemory;
  LaneQueries<R, D>* lanes = arena.take<LaneQueries<R, D>>(block / W);
  Query<R>* q = arena.take<Query<R>>(block);
  R *y = arena.take<R>(SMALL_ROWS * D + 64), *b = arena.take<R>(SMALL_ROWS),
    *finite_b = arena.take<R>(SMALL_ROWS);
  R* row = arena.take<R>(64);
  const typename Values<R>::F values = values_for(src);
  Pace pace = {in.watch, 0};
  for (int64_t q0 = b0; q0 < b1; q0 += block) {
    const int64_t count = imin(block, b1 - q0), vectors = (count + W - 1) / W;
    double y_max = 0;
    memset((void*)lanes, 0, vectors * sizeof(LaneQueries<R, D>));
    for (int64_t i = 0; i < vectors * W; i++) {
      LaneQueries<R, D>& v = lanes[i / W];
      const int e = i % W;
      if (i < count)
        q[i] = make_query(in, src, q0 + i, pl, row);
      else
        q[i] = q[count - 1];  // fills up the last vector
      const bool softmax = q[i].mode == kSoftmax;
      const double f = softmax ? __builtin_sqrt(0.5 * kLog2E * q[i].inv_t) / q[i].sigma : 0;
      for (int64_t d = 0; d < d_real; d++) v.x[d][e] = (R)(f * row[d]);
      v.alpha[e] = (R)(f * q[i].alpha);
      v.inv_t[e] = (R)(softmax ? kLog2E * q[i].inv_t : 1);
      v.m[e] = (R)kInf;
    }
    for (int64_t n0 = 0; n0 < N; n0 += SMALL_ROWS) {
      const int64_t cnt = imin(SMALL_ROWS, N - n0);
      if (pace.stopped(cnt * count * (2 * D + 8))) return kStopped;
      for (int64_t r = 0; r < cnt; r++) {
        double value[SMALL_D];
        values(src, n0 + r, 0, d_real, value);
        double sq = 0;
        for (int d = 0; d < D; d++) {
          const double v = d < d_real ? value[d] - src.center[d] : 0;
          y[r * D + d] = (R)v;
          sq += v * v;
        }
        y_max = dmax(y_max, sq);
        if (in.bias) {
          const double v = in.bias[n0 + r];
          b[r] = (R)v;
          finite_b[r] = v == -kInf ? R(0) : (R)v;
        }
      }
      for (int64_t i = 0; i < vectors; i++) {
        if (in.bias)
          small_chunk<R, D, true>(lanes[i], y, b, finite_b, cnt);
        else
          small_chunk<R, D, false>(lanes[i], y, b, finite_b, cnt);
      }
    }
    y_max = __builtin_sqrt(y_max);
    for (int64_t i = 0; i < count; i++) {
      LaneQueries<R, D>& v = lanes[i / W];
      const int e = i % W;
      const int64_t at = q0 + i;
      // The rows within 15 of the largest logit are those that matter. Their distance r bounds the error of a
      // logit: coordinates are off by u (2 |xc| + 3 |alpha y|), squares and sums by (D + 4) u.
      const double u = Precision<R>::u, m = -v.m[e] * kLn2;
      const double reach = __builtin_fabs(m) + 2 * b_max * q[i].inv_t + 15;
      const double h = 0.5 * q[i].inv_t / (q[i].sigma * q[i].sigma);
      const double err = 2 * u * __builtin_sqrt(reach * h) *
                             (2 * __builtin_sqrt(q[i].xx) + 3 * __builtin_fabs(q[i].alpha) * y_max) +
                         (D + 4) * u * reach + (in.bias ? 4 * u * b_max * q[i].inv_t : 0);
      handed_back[at - b0] = q[i].mode != kSoftmax || !(err < Precision<R>::tolerance) || !(v.s[e] > 0);
      if (handed_back[at - b0]) continue;
      const State st = {0, m, v.s[e], v.s_v[e] * kLn2, v.s_bias[e], v.s_sq[e]};
      R acc[D];
      for (int d = 0; d < D; d++) acc[d] = v.acc[d][e];
      finish(src, q[i], st, 1.0, [&](int64_t d) { return acc + d; }, at, out);
    }
  }
  return kDone;
}

template <class R>
struct Small {
  typedef int (*F)(const Source<R>&, const Queries&, double, int64_t, int64_t, const Output&, char*);
};
template <class R>
static typename Small<R>::F small_for(int64_t d) {
  switch (d) {
    case 1: return small_part<R, 1>;
    case 2: return small_part<R, 2>;
    case 3: return small_part<R, 3>;
    case 4: return small_part<R, 4>;
    default: return small_part<R, SMALL_D>;
  }
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
