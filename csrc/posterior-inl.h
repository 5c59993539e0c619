// posterior: one sweep over the rows.
//
// One part (a thread) owns a range of rows, or a range of query blocks, and streams tiles of NT rows. After each tile
// m is the largest logit seen, s the sum of e^(t-m), acc the sum of e^(t-m) yc, so center + acc / s is the mean so far.
// Parts that own rows are joined by merge(). Reads the rows once for each block of queries; never an N x B array.
#pragma once
#include "logits-inl.h"

namespace memokern { namespace MEMOKERN_ISA_NS {

enum { BLOCK_B = 256, FEW = 8 };  // queries of a block; up to FEW of them take one plain pass over the rows

// Tile heights from the L2 cache (512 KiB is common; a larger one does no harm): both copies of a packed tile stay
// near it, and a plain tile with its accumulators inside it.
template <class R> static Plan make_plan(int64_t B, int64_t N, int64_t D) {
  enum { W = Vec<R>::W, NR = 2 * W };
  Plan pl;
  pl.B = imin(B, BLOCK_B);
  pl.D = D;
  pl.Dp = round_up(D, NR);
  pl.Ds = pl.Dp + 64 / (int64_t)sizeof(R);  // odd number of cache lines apart: rows fall in different L1 sets
  if ((pl.Ds * (int64_t)sizeof(R) / 64) % 2 == 0) pl.Ds += 64 / (int64_t)sizeof(R);
  pl.packed = pl.B > FEW;
  pl.depth = pl.packed ? imin(D, KC) + D / KC + 1 : D / (2 * W) + 8;
  const int64_t budget = (pl.packed ? 512 << 10 : 128 << 10) / (int64_t)sizeof(R);
  const int64_t unit = pl.packed ? NR : imax(8, W), least = pl.packed ? imax(NR, 32) : unit;
  pl.NT = imin(imax(budget / pl.Dp / unit * unit, least), 128);
  pl.NT = imin(pl.NT, round_up(N, unit));
  return pl;
}

// What a part works with: the buffers of a tile and of a block of queries.
template <class R> struct Work {
  Tile<R> tile;
  R *p, *xc, *acc, *b, *b0, *t;
  int* cand;
  double* cand_t;
  State* st;        // [B]
  Query<R>* q;      // [B]
  Arena arena;
  bool reserve(const Plan& pl, bool bias) {
    const int64_t tile_len = pl.NT * (pl.Ds + 64);
    if (!arena.reserve(Arena::bytes<R>(tile_len) * (pl.packed ? 2 : 1) + Arena::bytes<R>(pl.NT + 64) * 3 +
                       Arena::bytes<R>(pl.B * pl.NT) + 2 * Arena::bytes<R>(pl.B * pl.Ds) + Arena::bytes<int>(pl.NT) +
                       Arena::bytes<double>(pl.NT) + Arena::bytes<State>(pl.B) + Arena::bytes<Query<R> >(pl.B) + Arena::bytes<R>(pl.NT + 64)))
      return false;
    tile.y2 = arena.take<R>(tile_len);
    tile.y1 = pl.packed ? arena.take<R>(tile_len) : nullptr;
    tile.sq = arena.take<R>(pl.NT + 64);
    b = bias ? arena.take<R>(pl.NT + 64) : nullptr;
    b0 = bias ? arena.take<R>(pl.NT + 64) : nullptr;
    p = arena.take<R>(pl.B * pl.NT);
    xc = arena.take<R>(pl.B * pl.Ds);
    acc = arena.take<R>(pl.B * pl.Ds);
    cand = arena.take<int>(pl.NT);
    cand_t = arena.take<double>(pl.NT);
    st = arena.take<State>(pl.B);
    q = arena.take<Query<R> >(pl.B);
    t = arena.take<R>(pl.NT + 64);
    return true;
  }
};

template <class R> static void load_bias(const Plan& pl, const double* bias, Work<R>& w) {
  if (!bias) return;
  for (int64_t j = 0; j < pl.NT; j++) {
    const double v = j < w.tile.cnt ? bias[w.tile.n0 + j] : 0;
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
  s.D = pl.D;
  s.bias = bias;
  s.b = w.b;
  s.b0 = w.b0;
  s.b_max = b_max;
  s.cand = w.cand;
  s.cand_t = w.cand_t;
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
  const typename Pack<R>::F pack = pack_for(src);
  for (int64_t b = 0; b < B; b++) {
    w.q[b] = make_query(in, src, b0 + b, pl, w.xc + b * pl.Ds);
    w.st[b] = neutral();
  }
  memset((void*)w.acc, 0, pl.B * pl.Ds * sizeof(R));
  const Step<R> s = make_step(src, pl, in.bias, b_max, w);
  for (w.tile.n0 = n0; w.tile.n0 < n1; w.tile.n0 += pl.NT) {
    w.tile.cnt = imin(pl.NT, n1 - w.tile.n0);
    pack(src, pl, w.tile);
    load_bias(pl, in.bias, w);
    dots(pl, w.tile, w.xc, B, w.p);
    for (int64_t b = 0; b < B; b++) {
      R* p = w.p + b * pl.NT;
      double f = 1;
      switch (w.q[b].mode) {
        case kSoft: f = step_soft(w.q[b], s, w.st[b], p); break;
        case kHard: f = step_hard(w.q[b], s, w.st[b], p); break;
        case kLogMap: f = step_log(w.q[b], s, w.st[b], p); break;
        default: memset((void*)p, 0, pl.NT * sizeof(R));
      }
      if (f != 1) scale_acc(pl, w.acc, b, f);
    }
    accumulate(pl, w.tile, w.p, B, w.acc);
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
      mean[d + i] = lost ? (R)__builtin_nan("") : (R)((double)a[i] / st.s + src.center[d + i]);
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
      src.scale = 1;
      const typename Fetch<R>::F fetch_row = fetch_for(src);
      const int64_t some = imin(rows.n, 64);
      for (int64_t i = 0; i < some; i++) {
        fetch_row(src, rows.n * i / some, 0, rows.d, row);
        for (int64_t d = 0; d < rows.d; d++) center[d] += row[d];
      }
      for (int64_t d = 0; d < rows.d; d++) center[d] = (R)(center[d] / some * rows.scale + rows.shift);
    }
    src.scale = (R)rows.scale;
    double off = 0, mid = 0;
    for (int64_t d = 0; d < rows.d; d++) {
      offset[d] = (R)(rows.shift - center[d]);
      off += (double)offset[d] * offset[d];
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
  const Plan pl = make_plan<R>(in.b, rows.n, rows.d);
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
