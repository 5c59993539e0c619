// posterior: one sweep over the rows.
//
// One part (a thread) owns a range of rows, or a range of query blocks, and streams tiles of NT rows. After each tile
// m is the largest logit seen, s the sum of e^(t-m), acc the sum of e^(t-m) yc, so center + acc / s is the mean so far.
// Parts that own rows are joined by merge(). Reads the rows once for each block of queries; never an N x B array.
#pragma once
#include "cpu/posterior/logits-inl.h"

namespace memokern { namespace MEMOKERN_ISA_NS {

// Tile heights. Each tile loads and stores all accumulators once: where these are many, a packed tile is high, though that
// takes it from L2 to L3 (it is read in order). Unpacked rows are read twice and stay in L2.
// `grouped`: where a tile of few features stays in L1 or L2, so few queries go through it together that P stays in L1.
template <class R> static Plan make_plan(int64_t B, const Rows& rows, bool grouped = false) {
  enum { W = Vec<R>::W, NR = 2 * W };
  Plan pl;
  const int64_t blocks = (B + BLOCK_B - 1) / BLOCK_B;
  pl.few = B <= FEW;
  pl.B = blocks == 1 ? B : round_up((B + blocks - 1) / blocks, W);
  pl.Bp = round_up(pl.B, W);
  pl.D = rows.d;
  pl.Dp = round_up(pl.D, NR);
  pl.group = grouped && !pl.few && pl.Dp <= KC ? imin(pl.B, (int64_t)NR) : pl.B;
  pl.Ps = (round_up(round_up(pl.group, W) * (int64_t)sizeof(R), 64) / 64 | 1) * 64 / (int64_t)sizeof(R);
  pl.depth = pl.few ? imin(pl.Dp, (int64_t)DEEP) / W + pl.Dp / DEEP + W : imin(pl.Dp, (int64_t)KC) + pl.Dp / KC + 1;
  const int64_t budget = pl.few ? (128 << 10) / size_of(rows.type) : (pl.B <= 16 ? 384 << 10 : 1 << 20) / (int64_t)sizeof(R);
  pl.NT = imin(imax(budget / pl.Dp / UNIT * UNIT, UNIT), pl.group < pl.B ? MAX_NT : SOME_NT);
  pl.NT = imin(pl.NT, round_up(rows.n, UNIT));
  return pl;
}

// What a part works with: the buffers of a tile and of a block of queries.
template <class R> struct Work {
  enum { W = Vec<R>::W };
  Tile<R> tile;
  R *p, *x, *acc, *b, *b0, *columns, *row;
  int* cand;
  double* cand_t;
  State* st;         // [Bp]
  Query<R>* q;       // [Bp]
  Group<R>* groups;  // [Bp / W]
  Arena arena;
  bool reserve(const Plan& pl, bool bias) {
    if (!arena.reserve(Arena::bytes<R>(pl.few ? 0 : pl.NT * pl.Dp) + 3 * Arena::bytes<R>(pl.NT) + Arena::bytes<R>(pl.NT * pl.Ps) + Arena::bytes<R>(pl.Bp * pl.Dp) +
                       Arena::bytes<R>(pl.B * pl.Dp) + Arena::bytes<R>(W * pl.NT) + Arena::bytes<R>(pl.Dp) + Arena::bytes<int>(W * pl.NT) +
                       Arena::bytes<double>(W * pl.NT) + Arena::bytes<State>(pl.Bp) + Arena::bytes<Query<R> >(pl.Bp) + Arena::bytes<Group<R> >(pl.Bp / W)))
      return false;
    tile.y = arena.take<R>(pl.few ? 0 : pl.NT * pl.Dp);
    tile.sq = arena.take<R>(pl.NT);
    b = bias ? arena.take<R>(pl.NT) : nullptr;
    b0 = bias ? arena.take<R>(pl.NT) : nullptr;
    p = arena.take<R>(pl.NT * pl.Ps);
    x = arena.take<R>(pl.Bp * pl.Dp);
    acc = arena.take<R>(pl.B * pl.Dp);
    columns = arena.take<R>(W * pl.NT);
    row = arena.take<R>(pl.Dp);
    cand = arena.take<int>(W * pl.NT);
    cand_t = arena.take<double>(W * pl.NT);
    st = arena.take<State>(pl.Bp);
    q = arena.take<Query<R> >(pl.Bp);
    groups = arena.take<Group<R> >(pl.Bp / W);
    return true;
  }
};

// A vector of features of query b, in the units of the rows, into the layout of the first product.
template <class R> static void put_query(const Source<R>& src, const Plan& pl, const R* row, int64_t b, R* x) {
  for (int64_t d = 0; d < pl.D; d++) *query_at(pl, x, b, d) = (R)(row[d] * src.rows.scale);
}
// The queries [b0, b0 + B) of a sweep.
template <class R> static void load_queries(const Source<R>& src, const Queries& in, const Plan& pl, int64_t b0, int64_t B, Work<R>& w) {
  for (int64_t b = 0; b < B; b++) {
    w.q[b] = make_query(in, src, b0 + b, pl, w.row);
    w.st[b] = neutral();
    set_lane(w.groups[b / Work<R>::W], (int)(b % Work<R>::W), w.q[b]);
    put_query(src, pl, w.row, b, w.x);
  }
}

template <class R> static void load_bias(const double* bias, Work<R>& w) {
  if (!bias) return;
  for (int64_t j = 0; j < w.tile.cnt; j++) {
    const double v = bias[w.tile.n0 + j];
    w.b[j] = (R)v;
    w.b0[j] = v == -kInf ? R(0) : (R)v;
  }
}

template <class R> static Step<R> make_step(const Source<R>& src, const Plan& pl, const double* bias, double b_max, const Work<R>& w) {
  Step<R> s;
  s.src = &src;
  s.exact = exact_for(src);
  s.tile = &w.tile;
  s.NT = pl.NT;
  s.Ps = pl.Ps;
  s.D = pl.D;
  s.bias = bias;
  s.b = w.b;
  s.b0 = w.b0;
  s.b_max = b_max;
  s.least = (R)(Precision<R>::log_theta - 2.4 - __builtin_log((double)src.rows.n));
  s.cand = w.cand;
  s.cand_t = w.cand_t;
  s.columns = w.columns;
  return s;
}

template <class R> static void scale_acc(const Plan& pl, R* acc, int64_t b, double f) {
  enum { NR = 2 * Vec<R>::W };
  for (int64_t d = 0; d < pl.Dp; d += NR) {
    R* a = acc_at(pl, acc, b, d);
    for (int i = 0; i < NR; i++) a[i] = f == 0 ? R(0) : a[i] * (R)f;
  }
}

// Rows [n0, n1) for queries [b0, b0 + B).
template <class R>
static void sweep(const Source<R>& src, const Queries& in, const Plan& pl, double b_max, int64_t b0, int64_t B, int64_t n0, int64_t n1, Work<R>& w) {
  const Engine<R> engine = engine_for(src, pl);
  enum { W = Vec<R>::W };
  load_queries(src, in, pl, b0, B, w);
  memset((void*)w.acc, 0, pl.B * pl.Dp * sizeof(R));
  const Step<R> s = make_step(src, pl, in.bias, b_max, w);
  for (w.tile.n0 = n0; w.tile.n0 < n1; w.tile.n0 += pl.NT) {
    Ahead next = load_tile(engine, src, pl, w.tile, n1);
    load_bias(in.bias, w);
    for (int64_t g = 0; g < B; g += pl.group) {
      const int64_t end = imin(g + pl.group, B);
      engine.dots(src, pl, w.tile, w.x, g, end - g, w.p, next);
      bool any = false;
      for (int64_t b = g; b < end; b += W) {
        const int lanes = (int)imin(W, B - b);
        double f[W];
        any |= step(w.q + b, w.groups[b / W], lanes, s, w.st + b, w.p + (b - g), f);
        for (int e = 0; e < lanes; e++)
          if (f[e] != 1) scale_acc(pl, w.acc, b + e, f[e]);
      }
      if (any) engine.accumulate(src, pl, w.tile, w.p, g, end - g, w.acc, next);
    }
  }
}

// The state of a query to its statistics.
template <class R> static void finish_stats(const Query<R>& q, const State& st, int64_t b, const Posterior& out) {
  double log_z = __builtin_nan(""), ml = log_z, mb = log_z, w2 = log_z;
  if (q.mode != kLost && st.s > 0) {
    const double lse = q.temperature * (st.m + __builtin_log(st.s)), e = q.temperature * (st.m + st.st / st.s);
    mb = st.sb / st.s;
    w2 = st.sw2 / (st.s * st.s);
    if (q.mode == kSoft) {
      log_z = lse;
      ml = e;
    } else if (q.mode == kHard) {
      const double d = st.key > 0 ? -0.5 * (st.key / q.sigma) / q.sigma : 0;
      log_z = lse + d;
      ml = e + d;
    } else {
      log_z = st.key == 0 ? kInf : lse;
      ml = st.key == 0 ? kInf : e;
    }
  }
  out.log_z[b] = log_z;
  out.mean_logit[b] = ml;
  out.mean_bias[b] = mb;
  out.weight_sq[b] = w2;
}
template <class R>
static void finish(const Source<R>& src, const Plan& pl, const Query<R>& q, const State& st, R* acc, int64_t row, int64_t b, const Posterior& out) {
  enum { NR = 2 * Vec<R>::W };
  R* mean = (R*)out.mean + b * pl.D;
  finish_stats(q, st, b, out);
  const bool lost = q.mode == kLost;
  for (int64_t d = 0; d < pl.D; d += NR) {
    const R* a = acc_at(pl, acc, row, d);
    for (int64_t i = 0; i < imin(NR, pl.D - d); i++)
      mean[d + i] = lost ? (R)__builtin_nan("") : (R)((double)a[i] / st.s * src.rows.scale + src.center[d + i]);
  }
}

// The rows with their centre: the caller's, or the mean of at most 64 rows, which centres well enough.
template <class R> struct Centred {
  Source<R> src;
  Arena arena;
  bool prepare(const Rows& rows) {
    const int64_t Dp = round_up(rows.d, 64);
    if (!arena.reserve(Arena::bytes<R>(Dp) * 2 + Arena::bytes<double>(Dp))) return false;
    R* offset = arena.take<R>(Dp);
    R* row = arena.take<R>(Dp);
    double* center = arena.take<double>(Dp);
    src.rows = rows;
    src.offset = offset;
    src.center = center;
    if (rows.center) {
      memcpy(center, rows.center, rows.d * sizeof(double));
    } else {
      src.rows.sq_norms = nullptr;
      const typename Fetch<R>::F fetch_row = fetch_for(src);
      const int64_t some = imin(rows.n, 64);
      for (int64_t i = 0; i < some; i++) {
        fetch_row(src, rows.n * i / some, 0, rows.d, row);
        for (int64_t d = 0; d < rows.d; d++) center[d] += row[d];
      }
      for (int64_t d = 0; d < rows.d; d++) center[d] = (R)(center[d] / some * rows.scale + rows.shift);
    }
    double off = 0, mid = 0;
    for (int64_t d = 0; d < rows.d; d++) {
      const double o = rows.shift - center[d];
      offset[d] = (R)(o / rows.scale);
      off += o * o;
      mid += center[d] * center[d];
    }
    src.pad = __builtin_sqrt(off) + __builtin_sqrt(mid);
    return true;
  }
};

// One work space for each part, without the C++ library's allocator.
template <class T> struct WorkList {
  T* items;
  int n;
  explicit WorkList(int count) : items((T*)calloc(count, sizeof(T))), n(count) {}  // zero is a valid empty T
  ~WorkList() {
    if (items)
      for (int i = 0; i < n; i++) items[i].~T();
    free(items);
  }
 private:
  WorkList(const WorkList&);
};

static double largest_bias(const double* bias, int64_t n) {
  double m = 0;
  if (bias)
    for (int64_t i = 0; i < n; i++)
      if (bias[i] != -kInf) m = dmax(m, __builtin_fabs(bias[i]));
  return m;
}

template <class R> static int posterior_general(const Centred<R>& c, const Queries& in, const Posterior& out, double b_max, int threads) {
  const Rows& rows = c.src.rows;
  const Plan pl = make_plan<R>(in.b, rows, true);
  const int64_t blocks = (in.b + pl.B - 1) / pl.B, tiles = (rows.n + pl.NT - 1) / pl.NT;
  const bool by_queries = blocks >= 2 * threads || tiles < 2;
  int parts = (int)imax(1, imin(threads, by_queries ? blocks : tiles));
  WorkList<Work<R> > list(parts);
  Work<R>* work = list.items;
  if (!work) return 1;
  int failed = 0;
  for (int i = 0; i < parts; i++) failed |= !work[i].reserve(pl, in.bias != nullptr);
  if (!failed && by_queries) {
#pragma omp parallel for num_threads(parts) schedule(static, 1) if (parts > 1)
    for (int i = 0; i < parts; i++) {
      for (int64_t k = blocks * i / parts; k < blocks * (i + 1) / parts; k++) {
        const int64_t b0 = k * pl.B, B = imin(pl.B, in.b - b0);
        sweep(c.src, in, pl, b_max, b0, B, 0, rows.n, work[i]);
        for (int64_t b = 0; b < B; b++) finish(c.src, pl, work[i].q[b], work[i].st[b], work[i].acc, b, b0 + b, out);
      }
    }
  } else if (!failed) {
    for (int64_t k = 0; k < blocks; k++) {
      const int64_t b0 = k * pl.B, B = imin(pl.B, in.b - b0);
#pragma omp parallel for num_threads(parts) schedule(static, 1) if (parts > 1)
      for (int i = 0; i < parts; i++)
        sweep(c.src, in, pl, b_max, b0, B, imin(rows.n, tiles * i / parts * pl.NT), imin(rows.n, tiles * (i + 1) / parts * pl.NT), work[i]);
      for (int64_t b = 0; b < B; b++) {
        for (int i = 1; i < parts; i++) {
          double fa, fb;
          merge(work[0].st[b], work[i].st[b], fa, fb);
          for (int64_t d = 0; d < pl.Dp; d += 2 * Vec<R>::W) {
            R *a = acc_at(pl, work[0].acc, b, d), *z = acc_at(pl, work[i].acc, b, d);
            for (int e = 0; e < 2 * Vec<R>::W; e++) a[e] = (R)((fa == 0 ? 0 : fa * a[e]) + (fb == 0 ? 0 : fb * z[e]));
          }
        }
        finish(c.src, pl, work[0].q[b], work[0].st[b], work[0].acc, b, b0 + b, out);
      }
    }
  }
  return failed;
}

} }  // namespace
