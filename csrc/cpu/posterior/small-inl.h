// The sweep for few features (D <= SMALL_D) and many queries, or few rows: queries lie across the lanes of a
// vector.
//
// A part owns a range of queries and sweeps all rows in chunks of SMALL_ROWS. For each chunk and vector of
// queries it computes logits by direct differences into L1, then the largest one, then exponentials and sums
// in registers. A query's result depends on nothing but the rows: neither on the threads, nor on how the
// batch is split.
//
// There are two of it. The first takes queries and rows less the centre, multiplied by what makes the sum of
// squares a logit. What that rounds away of a difference is too much where sigma is small; the second takes
// the values as they are, x - alpha y with alpha as a sum of two numbers, which is rounded once, and adds up
// the differences themselves. Each hands back the queries whose logits its numbers cannot hold (small sigma,
// large bias), and those without a softmax (sigma = 0, numbers that are not finite, no row with weight).
#pragma once
#include "cpu/core/watch-inl.h"
#include "cpu/posterior/finish-inl.h"
#include "cpu/posterior/own_bias-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

static const double kLog2E = 1.4426950408889634074, kLn2 = 0.6931471805599453094;
enum {
  SMALL_D = 8,         // features, at most
  SMALL_ROWS = 256,    // rows of a chunk
  SMALL_BLOCK = 2048,  // queries that pass a chunk before the next one is read
  FEW_ROWS = 2048      // up to so many rows this sweep is taken for few queries too
};

// A weight below 2^smallest_power is 0: it is nothing beside the largest one, and its square and its products
// with small numbers would be subnormal, which take a processor a hundred times as long.
MK_INLINE float smallest_power(float) { return -60.0f; }
MK_INLINE double smallest_power(double) { return -500.0; }

// One vector of queries. Of rows with a bias s_v is the sum of w times the square alone, because the bias may
// be far larger and would round it away. Logits are handled as -log2 of e^v, which is |x - alpha yc|^2 -
// inv_t b, where x, alpha and inv_t hold the factors that make it so; m is the least of them. As they are, x
// and alpha + low are the query's own and `unit` is the factor of the square; acc is then the sum of w (x -
// alpha y).
template <class R, int D>
struct LaneQueries {
  typedef typename Vec<R>::T V;
  V x[D], acc[D], alpha, low, unit, inv_t, m;
  double s[Vec<R>::W], s_v[Vec<R>::W], s_bias[Vec<R>::W], s_sq[Vec<R>::W];
};

// One chunk of cnt rows y, less the centre, for one vector of queries. b: the bias [cnt][W] that each of the
// queries has for each row, where there is one.
template <class R, int D, bool BIASED, bool CENTRED>
static void small_chunk(LaneQueries<R, D>& q, const R* y, const R* b, int64_t cnt) {
  enum { W = Vec<R>::W };
  typedef typename Vec<R>::T V;
  V l[SMALL_ROWS], low = q.m;
  const auto difference = [&](int64_t r, int d) {
    const V y_d = splat<R>(y[r * D + d]);
    V e = q.x[d] - q.alpha * y_d;  // fused where the processor can, and so exact but for its last rounding
    if (!CENTRED) e -= q.low * y_d;
    return e;
  };
  for (int64_t r = 0; r < cnt; r++) {
    V t = {};
#pragma GCC unroll 8
    for (int d = 0; d < D; d++) {
      V e = difference(r, d);
      e *= e;
      MK_ROUND(e);  // a fused sum would round the coordinates differently, and symmetric rows must stay ties
      t = d == 0 ? e : t + e;
    }
    if (!CENTRED) t *= q.unit;
    l[r] = t;
    if (BIASED) t -= q.inv_t * load(b + r * W);
    low = vmin(t, low);
  }
  const V none = splat<R>((R)kInf), most = splat<R>((R)Precision<R>::big), lo = splat<R>(lowest_power(R(0))),
          least = splat<R>(smallest_power(R(0)));
  V shift = low - q.m;
  shift = low == none ? V{} : (shift < lo ? lo : shift);
  const V f = vexp2(shift);
  V s = {}, s_v = {}, s_sq = {}, s_bias = {}, acc[D];
#pragma GCC unroll 8
  for (int d = 0; d < D; d++) acc[d] = V{};
  for (int64_t r = 0; r < cnt; r++) {
    V d_ = low - (BIASED ? l[r] - q.inv_t * load(b + r * W) : l[r]);
    d_ = vmax(d_, least);  // also where both are inf, because no row so far has weight
    V w = vexp2(d_);
    w = d_ > least ? w : V{};
    s += w;
    s_v += w * (BIASED ? vmin(l[r], most) : d_);
    s_sq += w * w;
    if (BIASED) s_bias += w * vmax(load(b + r * W), -most);  // a row whose bias is -inf has weight 0
#pragma GCC unroll 8
    for (int d = 0; d < D; d++) acc[d] += w * (CENTRED ? splat<R>(y[r * D + d]) : difference(r, d));
  }
  // The large sums are rounded once per chunk, not once per row.
#pragma GCC unroll 8
  for (int d = 0; d < D; d++) q.acc[d] = q.acc[d] * f + acc[d];
  for (int i = 0; i < W; i++) {
    const double g = f[i];
    q.s_v[i] = g * (BIASED ? q.s_v[i] : q.s_v[i] + q.s[i] * shift[i]) + s_v[i];
    q.s[i] = g * q.s[i] + s[i];
    q.s_bias[i] = g * q.s_bias[i] + s_bias[i];
    q.s_sq[i] = g * g * q.s_sq[i] + s_sq[i];
  }
  q.m = low;
}

// What becomes of a query: it is answered, or handed back for one of the other sweeps.
enum : char { kHere = 0, kAsTheyAre = 1, kInGeneral = 2 };
// Whether x - alpha y is rounded once.
#if (defined(__FMA__) || defined(__aarch64__)) && !defined(MEMOKERN_UNFUSED)
enum { FUSED = 1 };
#else
enum { FUSED = 0 };
#endif

// Queries b0 .. b1. handed_back [b1 - b0] receives what becomes of each.
template <class R, int D, bool CENTRED>
static int small_part(const Source<R>& src, const Queries& in, double b_max, int64_t b0, int64_t b1,
                      const Output& out, char* handed_back) {
  enum { W = Vec<R>::W };
  Plan pl = {};
  pl.D = pl.depth = src.rows.d;
  const int64_t d_real = src.rows.d, N = src.rows.n, block = imin(SMALL_BLOCK, round_up(b1 - b0, W));
  pl.Bp = block;
  pl.NT = SMALL_ROWS;
  OwnBias<R> own;
  Arena arena;
  if (!arena.reserve(Arena::bytes<LaneQueries<R, D>>(block / W) + Arena::bytes<Query<R>>(block) +
                     Arena::bytes<R>(SMALL_ROWS * (D + W)) + Arena::bytes<R>(64) +
                     Arena::bytes<double>(SMALL_ROWS * D) + OwnBias<R>::bytes(pl, in)))
    return kNoMemory;
  own.take(pl, in, arena);
  LaneQueries<R, D>* lanes = arena.take_raw<LaneQueries<R, D>>(block / W);
  Query<R>* q = arena.take_raw<Query<R>>(block);
  R *y = arena.take_raw<R>(SMALL_ROWS * D), *shared = arena.take_raw<R>(SMALL_ROWS * W);
  R* row = arena.take<R>(64);
  double* value = arena.take_raw<double>(SMALL_ROWS * D);
  const typename Values<R>::F values = values_for(src);
  Pace pace = {in.watch, 0};
  Source<R> about = src;
  about.zero = src.center;  // about which the accumulators are
  for (int64_t q0 = b0; q0 < b1; q0 += block) {
    const int64_t count = imin(block, b1 - q0), vectors = (count + W - 1) / W;
    double y_max = 0;
    bool nan_row = false;  // the general sweep tells whose queries it counts for
    memset((void*)lanes, 0, vectors * sizeof(LaneQueries<R, D>));
    for (int64_t i = 0; i < count; i++) {
      LaneQueries<R, D>& v = lanes[i / W];
      q[i] = make_query(in, src, q0 + i, pl, row);
      const bool softmax = q[i].mode == kSoftmax;
      const double f = softmax ? __builtin_sqrt(0.5 * kLog2E * q[i].inv_t) / q[i].sigma : 0;
      const R alpha = (R)((CENTRED ? f : 1) * q[i].alpha);
      const int first = i % W, last = i + 1 < count ? first : W - 1;  // the last one fills up its vector
      for (int e = first; e <= last; e++) {
        for (int64_t d = 0; d < d_real; d++)
          v.x[d][e] = CENTRED ? (R)(f * row[d]) : softmax ? q[i].x[d] : R(0);
        v.alpha[e] = alpha;
        v.low[e] = (R)(q[i].alpha - alpha);
        v.unit[e] = (R)(f * f);
        v.inv_t[e] = (R)(softmax ? kLog2E * q[i].inv_t : 1);
        v.m[e] = (R)kInf;
        if (own.in) own.set(i - first + e, q0 + i);
      }
    }
    for (int64_t n0 = 0; n0 < N; n0 += SMALL_ROWS) {
      const int64_t cnt = imin(SMALL_ROWS, N - n0);
      if (pace.stopped(cnt * count * (2 * D + 8))) return kStopped;
      if (src.rows.stride == d_real)  // rows without gaps are read like one long row
        values(src, n0, 0, cnt * d_real, value);
      else
        for (int64_t r = 0; r < cnt; r++) values(src, n0 + r, 0, d_real, value + r * d_real);
      for (int64_t r = 0; r < cnt; r++) {
        double sq = 0;
        for (int d = 0; d < D; d++) {
          const double v = d < d_real ? value[r * d_real + d] - (CENTRED ? src.center[d] : 0) : 0;
          y[r * D + d] = (R)v;
          sq += v * v;
        }
        y_max = dmax(y_max, sq);
        nan_row |= sq != sq;
        if (in.bias) store(shared + r * W, splat<R>((R)in.bias[n0 + r]));
      }
      for (int64_t i = 0; i < vectors; i++) {
        if (own.in) own.make_rounded(i * W, n0, cnt);
        if (is_biased(in))
          small_chunk<R, D, true, CENTRED>(lanes[i], y, own.in ? own.rounded : shared, cnt);
        else
          small_chunk<R, D, false, CENTRED>(lanes[i], y, nullptr, cnt);
      }
    }
    y_max = __builtin_sqrt(y_max);
    for (int64_t i = 0; i < count; i++) {
      LaneQueries<R, D>& v = lanes[i / W];
      const int e = i % W;
      const int64_t at = q0 + i;
      // The rows within 15 of the largest logit are those that matter. Their distance r bounds the error of a
      // logit: squares and sums are off by (D + 4) u, coordinates about the centre by
      // u (2 |xc| + 3 |alpha y|). As they are, by u of themselves, twice, and by what is lost of alpha y.
      const double u = Precision<R>::u, m = -v.m[e] * kLn2;
      const double reach = __builtin_fabs(m) + 2 * b_max * q[i].inv_t + 15;
      const double h = 0.5 * q[i].inv_t / (q[i].sigma * q[i].sigma);
      const double a = __builtin_fabs(q[i].alpha), root = __builtin_sqrt(reach * h);
      const double lost = v.low[e] == 0 && (FUSED || q[i].alpha == 1) ? 0 : FUSED ? u : 2;
      const double off = CENTRED ? 2 * __builtin_sqrt(q[i].xx) + 3 * a * y_max : lost * a * y_max;
      // Of a row that matters, what the condition adds is within reach as its distance is.
      const double biases = (own.in ? reach : 0) + (in.bias ? b_max * q[i].inv_t : 0);
      const double rest = 4 * u * biases + (D + (CENTRED ? 4 : 6)) * u * reach;
      const double err = 2 * u * root * off + rest;
      const bool general = nan_row || q[i].e0 == kInf;  // or a float cannot hold the query's numbers
      bool back = general || q[i].mode != kSoftmax || !(err < Precision<R>::tolerance) || !(v.s[e] > 0);
      // As they are, the mean is x plus a difference, over alpha: not from too far off.
      if (!CENTRED) back |= !(root < 32 * a * y_max * h) || !(q[i].xx + y_max * y_max * a * a < 1e30);
      // What the values as they are will not do better either goes to the general sweep at once.
      const bool as_they_are = !general && rest < 0.5 * Precision<R>::tolerance;
      handed_back[at - b0] = !back ? kHere : as_they_are ? kAsTheyAre : kInGeneral;
      if (back) continue;
      const double s_v =
          is_biased(in) ? q[i].inv_t * v.s_bias[e] - v.s_v[e] * kLn2 - m * v.s[e] : v.s_v[e] * kLn2;
      const State st = {0, m, v.s[e], s_v, v.s_bias[e], v.s_sq[e]};
      R acc[D], none[D] = {};
      for (int d = 0; d < D; d++) acc[d] = CENTRED ? v.acc[d][e] : -v.acc[d][e];
      Near<R> near = {acc, CENTRED ? 0 : st.s};
      finish(about, q[i], st, near, 1.0, [&](int64_t d) { return (CENTRED ? acc : none) + d; }, at, out);
    }
  }
  return kDone;
}

template <class R>
struct Small {
  typedef int (*F)(const Source<R>&, const Queries&, double, int64_t, int64_t, const Output&, char*);
};
template <class R, bool CENTRED>
static typename Small<R>::F small_typed(int64_t d) {
  switch (d) {
    case 1: return small_part<R, 1, CENTRED>;
    case 2: return small_part<R, 2, CENTRED>;
    case 3: return small_part<R, 3, CENTRED>;
    case 4: return small_part<R, 4, CENTRED>;
    default: return small_part<R, SMALL_D, CENTRED>;
  }
}
template <class R>
static typename Small<R>::F small_for(int64_t d, bool centred) {
  return centred ? small_typed<R, true>(d) : small_typed<R, false>(d);
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
