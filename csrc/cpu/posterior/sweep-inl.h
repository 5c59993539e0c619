// One sweep: rows n0 .. n1 for a block of queries.
//
// A part (a thread) owns a range of rows, or of query blocks, and streams tiles of NT rows. After each tile,
// m of a query's state is the largest v = l / T seen, s the sum of w = e^(v - m), and the accumulator the sum
// of w (y - center), so that center + acc / s is the mean so far. The rows are read once for each block of
// queries; no array is N x B.
#pragma once
#include "cpu/core/products-inl.h"
#include "cpu/core/watch-inl.h"
#include "cpu/posterior/weigh-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

enum { REFINED = 8 };  // a product that is refined costs as much as integers save for so many rows, at most

// What a part works with: the buffers of a tile and of a block of queries.
template <class R>
struct SweepWork {
  enum { W = Vec<R>::W };
  Tile<R> tile;
  R* p;                        // [NT][Ps]
  R* x;                        // [Bp][Dp] the queries, as query_at() says
  PairQueries<R> pairs;        // the same as integers
  R* acc;                      // [B][Dp] the accumulators, as acc_at() says
  R* near_sums;                // [B][Dp] the sums of `close`
  R *tile_bias, *finite_bias;  // [NT], null where there is no bias, or one of each query's own:
  OwnBias<R> own;
  R* columns;             // [W][NT]
  R* row;                 // [Dp]
  int* exact_row;         // [W][NT]
  double* exact_value;    // [W][NT]
  bool* exact_near;       // [W][NT]
  Near<R>* close;         // [Bp]
  State* st;              // [Bp]
  Query<R>* q;            // [Bp]
  QueryGroup<R>* groups;  // [Bp / W]
  int64_t refined;        // how many products of the tile were
  Pace pace;
  Arena arena;
  // `in` must outlive the work.
  bool reserve(const Plan& pl, const Queries& in) {
    const bool bias = in.bias && !has_own_bias(in);
    const int64_t tile_numbers = pl.direct ? 0 : pl.NT * pl.Dp;
    const int64_t integers = pl.pairs ? WholeRows<R>::bytes(pl.Dp, pl.NT) + PairQueries<R>::bytes(pl) : 0;
    if (!arena.reserve(Arena::bytes<R>(tile_numbers) + 3 * Arena::bytes<R>(pl.NT) +
                       Arena::bytes<R>(pl.NT * pl.Ps) + Arena::bytes<R>(pl.Bp * pl.Dp) +
                       2 * Arena::bytes<R>(pl.B * pl.Dp) + Arena::bytes<bool>(W * pl.NT) +
                       Arena::bytes<Near<R>>(pl.Bp) + Arena::bytes<R>(W * pl.NT) + Arena::bytes<R>(pl.Dp) +
                       Arena::bytes<int>(W * pl.NT) + Arena::bytes<double>(W * pl.NT) +
                       Arena::bytes<State>(pl.Bp) + Arena::bytes<Query<R>>(pl.Bp) +
                       Arena::bytes<QueryGroup<R>>(pl.Bp / W) + OwnBias<R>::bytes(pl, in) + integers))
      return false;
    tile.y = arena.take<R>(tile_numbers);
    tile.sq = arena.take<R>(pl.NT);
    tile_bias = bias ? arena.take<R>(pl.NT) : nullptr;
    finite_bias = bias ? arena.take<R>(pl.NT) : nullptr;
    p = arena.take<R>(pl.NT * pl.Ps);
    x = arena.take<R>(pl.Bp * pl.Dp);
    acc = arena.take<R>(pl.B * pl.Dp);
    near_sums = arena.take_raw<R>(pl.B * pl.Dp);
    columns = arena.take<R>(W * pl.NT);
    row = arena.take<R>(pl.Dp);
    exact_row = arena.take<int>(W * pl.NT);
    exact_value = arena.take<double>(W * pl.NT);
    exact_near = arena.take<bool>(W * pl.NT);
    close = arena.take<Near<R>>(pl.Bp);
    for (int64_t b = 0; b < pl.B; b++) close[b].sum = near_sums + b * pl.Dp;
    st = arena.take<State>(pl.Bp);
    q = arena.take<Query<R>>(pl.Bp);
    groups = arena.take<QueryGroup<R>>(pl.Bp / W);
    own.take(pl, in, arena);
    if (pl.pairs) {
      tile.whole.take(pl.Dp, pl.NT, arena);
      pairs.take(pl, arena);
    }
    return true;
  }
};

// Puts a vector of features of query b, in the units of the rows, where the first product looks for it.
template <class R>
static void put_query(const Source<R>& src, const Plan& pl, const R* row, int64_t b, R* x) {
  for (int64_t d = 0; d < pl.D; d++) *query_at(pl, x, b, d) = (R)(row[d] * src.unit);
}
// The queries b0 .. b0 + B of a sweep, with empty states.
template <class R>
static void load_queries(const Source<R>& src, const Queries& in, const Plan& pl, int64_t b0, int64_t B,
                         SweepWork<R>& w) {
  w.pace.watch = in.watch;
  w.tile.in_pairs = false;
  if (pl.pairs) w.tile.whole.set(src);
  for (int64_t b = 0; b < B; b++) {
    w.q[b] = make_query(in, src, b0 + b, pl, w.row);
    w.q[b].index = (int)b;
    w.q[b].lane = (int)(b % SweepWork<R>::W);
    if (w.own.in) w.own.set(b, b0 + b);
    w.st[b] = empty_state();
    w.close[b].s = 0;
    set_lane(w.groups[b / SweepWork<R>::W], (int)(b % SweepWork<R>::W), w.q[b]);
    put_query(src, pl, w.row, b, w.x);
    if (pl.pairs) w.pairs.put(src, pl, w.tile.whole, w.row, b, w.q[b]);
  }
}

template <class R>
static void load_bias(const double* bias, SweepWork<R>& w) {
  if (!w.tile_bias) return;
  for (int64_t j = 0; j < w.tile.cnt; j++) {
    const double v = bias[w.tile.n0 + j];
    w.tile_bias[j] = (R)v;
    w.finite_bias[j] = v == -kInf ? R(0) : (R)v;
  }
}

// Where each query has a bias of its own, makes those of the tile for `lanes` queries, b the first of them:
// known(i) is a lower bound of log sum e^t of query i of the block.
template <class R, class Known>
static void load_own_bias(SweepWork<R>& w, int64_t b, int lanes, Known known) {
  if (!w.own.in) return;
  w.own.make(b, w.tile);
  for (int64_t i = b; i < b + lanes; i++)
    if (w.q[i].mode == kSoftmax) w.own.cut(w.q[i], w.tile, known(i));
  w.own.round(w.tile.cnt);
}

template <class R>
static TileContext<R> make_tile_context(const Source<R>& src, const Plan& pl, const double* bias,
                                        double b_max, SweepWork<R>& w) {
  TileContext<R> s;
  s.src = &src;
  s.exact = exact_for(src);
  s.add_difference = add_difference_for(src);
  s.tile = &w.tile;
  s.NT = pl.NT;
  s.Ps = pl.Ps;
  s.D = pl.D;
  s.bias = bias;
  s.own_bias = w.own.exact;
  s.tile_bias = w.own.exact ? w.own.rounded : w.tile_bias;
  s.finite_bias = w.own.exact ? w.own.finite : w.finite_bias;
  s.b_max = b_max;
  s.least = (R)(Precision<R>::log_theta - 2.4 - __builtin_log((double)src.rows.n));
  s.exact_row = w.exact_row;
  s.exact_value = w.exact_value;
  s.exact_near = w.exact_near;
  s.columns = w.columns;
  s.pairs = &w.pairs;
  s.pl = &pl;
  s.refined = &w.refined;
  return s;
}

template <class R>
static void scale_acc(const Plan& pl, R* acc, int64_t b, double f) {
  enum { NR = 2 * Vec<R>::W };
  for (int64_t d = 0; d < pl.Dp; d += NR) {
    R* a = acc_at(pl, acc, b, d);
    for (int i = 0; i < NR; i++) a[i] = f == 0 ? R(0) : a[i] * (R)f;
  }
}

// How many rows of a tile would be multiplied again for a group of queries if the product were one of
// integers; p are their weights [NT][Ps].
template <class R>
static int64_t inexact_in_pairs(const TileContext<R>& s, const Query<R>* q, const QueryGroup<R>& g, int lanes,
                                const State* st, const R* p) {
  enum { W = Vec<R>::W };
  double sq = 0;
  for (int64_t j = 0; j < s.tile->cnt; j++) sq += s.tile->sq[j];
  const double y = __builtin_sqrt(sq / (double)s.tile->cnt);
  typename Vec<R>::T above = splat<R>((R)kInf);
  for (int e = 0; e < lanes; e++) {
    if (q[e].mode == kZeroSigma && !is_sharp_in_pairs(q[e])) above[e] = R(-1);  // all of them
    if (q[e].mode != kSoftmax) continue;
    const double err = error_in_pairs(q[e], s, y), lower = log_below(st[e].s);
    const double lo = dmin(threshold<R>(lower, err), lower + most_alike(q[e], s, g.top[e]) - err);
    above[e] = err < kInf && st[e].s > 1e-300 ? (R)__builtin_exp(dmin(lo, 80)) : R(-1);
  }
  typename Vec<R>::I count = {};
  for (int64_t j = 0; j < s.tile->cnt; j++) count -= load(p + j * s.Ps) > above;
  int64_t sum = 0;
  for (int e = 0; e < lanes; e++) sum += count[e];
  return sum;
}

// Returns kDone or kStopped.
template <class R>
static int sweep(const Source<R>& src, const Queries& in, const Plan& pl, double b_max, int64_t b0, int64_t B,
                 int64_t n0, int64_t n1, SweepWork<R>& w) {
  const Products<R> products = products_for(src, pl);
  enum { W = Vec<R>::W };
  load_queries(src, in, pl, b0, B, w);
  memset((void*)w.acc, 0, pl.B * pl.Dp * sizeof(R));
  const TileContext<R> s = make_tile_context(src, pl, in.bias, b_max, w);
  int64_t floats = 0, again = pl.NT * B;  // rows of a tile that integers would have multiplied again
  for (w.tile.n0 = n0; w.tile.n0 < n1; w.tile.n0 += pl.NT) {
    if (w.pace.stopped(2 * pl.NT * pl.D * B)) return kStopped;
    w.tile.in_pairs = pl.pairs && REFINED * again <= pl.NT * B;
    // Of the tiles of floats, the first, second, third, fifth, ninth and so on are asked whether integers
    // would do.
    const bool look = pl.pairs && !w.tile.in_pairs && (floats & (floats - 1)) == 0;
    floats += !w.tile.in_pairs;
    if (look) again = 0;
    w.refined = 0;
    Prefetch next = load_tile(products, src, pl, w.tile, n1);
    load_bias(in.bias, w);
    for (int64_t g = 0; g < B; g += pl.group) {
      const int64_t end = imin(g + pl.group, B);
      if (w.tile.in_pairs)
        w.pairs.dots(pl, w.tile, B, w.p, next);
      else
        products.dots(src, pl, w.tile, w.x, g, end - g, w.p, next);
      bool any = false;
      for (int64_t b = g; b < end; b += W) {
        const int lanes = (int)imin(W, B - b);
        double f[W];
        load_own_bias(w, b, lanes, [&](int64_t i) {
          return w.st[i].s > 1e-300 ? w.st[i].m + log_below(w.st[i].s) + w.q[i].shared : -kInf;
        });
        any |= weigh_tile(w.q + b, w.groups[b / W], lanes, s, w.st + b, w.close + b, w.p + (b - g), f);
        for (int e = 0; e < lanes; e++)
          if (f[e] != 1) scale_acc(pl, w.acc, b + e, f[e]);
        if (look) again += inexact_in_pairs(s, w.q + b, w.groups[b / W], lanes, w.st + b, w.p + (b - g));
      }
      if (any) products.accumulate(src, pl, w.tile, w.p, g, end - g, w.acc, next);
    }
    if (w.tile.in_pairs) again = w.refined;
  }
  return kDone;
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
