// nearest: the k rows of least |x - y|^2, exactly, and of equal ones those of the lower index.
//
// The sweep's first product gives every squared distance up to a bound for the worst case (bound_error), so
// an interval that holds it. A row whose interval begins beyond the k-th lowest end of all intervals is none
// of the k nearest. Each part keeps the others of its rows for each query; what is left of all parts, hardly
// more than k rows, is evaluated by direct differences in double. No step takes N k operations.
#pragma once
#include "cpu/nearest/candidates-inl.h"
#include "cpu/posterior/sweep-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

// Where the direct difference of a query and a row lies, as it would be computed, if t is (|xc|^2 - r^2) / 2
// up to err: nearness() solved for the distance, and the same with the errors on the other side.
template <class R>
MK_INLINE double least_r2(const Query<R>& q, double t, double err) {
  return (0.5 * q.xx - t - err) / (0.5 + (q.d + 16) * 1.2e-16);
}
template <class R>
MK_INLINE double most_r2(const Query<R>& q, double t, double err) {
  return (0.5 * q.xx - t + err) / (0.5 - (q.d + 16) * 1.2e-16);
}

// A query that is finite is lost to no norm that is not (of 10^154, or about a centre that a row of NaN has
// made one): its distances are evaluated one by one.
template <class R>
static void keep_finite(Query<R>& q) {
  if (q.mode != kNotFinite) return;
  R all = 0;  // NaN where a feature is not finite
  for (int64_t d = 0; d < (int64_t)q.d; d++) all += 0 * q.x[d];
  if (all != 0) return;
  q.mode = kZeroSigma;
  q.e0 = kInf;
}

// Rows n0 .. n1 for queries b0 .. b0 + B, whose candidates c [B] are. Returns kDone or kStopped.
template <class R>
static int nearest_sweep(const Source<R>& src, const Queries& in, const Plan& pl, int64_t b0, int64_t B,
                         int64_t n0, int64_t n1, Candidates* c, SweepWork<R>& w) {
  const Products<R> products = products_for(src, pl);
  enum { W = Vec<R>::W };
  load_queries(src, in, pl, b0, B, w);
  for (int64_t b = 0; b < B; b++) keep_finite(w.q[b]);
  w.tile.in_pairs = pl.pairs;
  for (int64_t b = 0; b < B; b++) w.tile.in_pairs &= is_sharp_in_pairs(w.q[b]);
  const TileContext<R> s = make_tile_context<R>(src, pl, nullptr, 0, w);
  for (w.tile.n0 = n0; w.tile.n0 < n1; w.tile.n0 += pl.NT) {
    if (w.pace.stopped(pl.NT * pl.D * B)) return kStopped;
    Prefetch next = load_tile(products, src, pl, w.tile, n1);
    if (w.tile.in_pairs)
      w.pairs.dots(pl, w.tile, B, w.p, next);
    else
      products.dots(src, pl, w.tile, w.x, 0, B, w.p, next);
    for (int64_t b = 0; b < B; b += W) {
      const typename Vec<R>::T top = logits(w.groups[b / W], s, w.p + b);  // t = (|xc|^2 - r^2) / 2
      for (int e = 0; e < imin(W, B - b); e++) {
        const Query<R>& q = w.q[b + e];
        Candidates& found = c[b + e];
        const auto exact = [&](int64_t n) { return s.exact(src, n, q.x, q.alpha); };
        const double err = error_of(q, s);
        double least = nearness(q, found.reach(), err);
        if (q.mode == kNotFinite || top[e] < least) continue;
        for (int64_t j = 0; j < w.tile.cnt; j++) {
          const double t = w.p[j * pl.Ps + b + e];
          if (t < least) continue;
          const int64_t n = w.tile.n0 + j;
          found.add(n, least_r2(q, t, err), err < kInf ? most_r2(q, t, err) : kInf, exact);
          least = nearness(q, found.reach(), err);
        }
      }
    }
  }
  return kDone;
}

// The k nearest of a query's candidates, which begin at c and lie `parts` in a row; they are overwritten.
// Returns kDone or kStopped.
template <class R>
static int nearest_finish(const Source<R>& src, const Query<R>& q, Candidates* c, int64_t stride, int parts,
                          double* sq_dist, int64_t* index, Pace& pace) {
  const int64_t k = c->k;
  if (q.mode == kNotFinite) {
    for (int64_t j = 0; j < k; j++) {
      sq_dist[j] = __builtin_nan("");
      index[j] = j;
    }
    return kDone;
  }
  for (int i = 1; i < parts; i++) c->take_reach(c[i * stride]);
  const typename Exact<R>::F exact = exact_for(src);
  Candidate* left = c->list;  // the lists of all parts follow each other
  int64_t count = 0;
  for (int i = 0; i < parts; i++) {
    const Candidates& part = c[i * stride];
    for (int64_t j = 0; j < part.count; j++) {
      Candidate one = part.list[j];
      if (one.low > c->reach()) continue;
      if (!one.evaluated()) {
        if (pace.stopped(src.rows.d)) return kStopped;
        one.evaluate(exact(src, one.row(), q.x, q.alpha));
      }
      left[count++] = one;
    }
  }
  sort_candidates(left, count);
  for (int64_t j = 0; j < k; j++) {
    sq_dist[j] = left[j].low;
    index[j] = left[j].row();
  }
  return kDone;
}

template <class R>
static int nearest_typed(const Rows& rows, const Queries& given, const Neighbours& out, int threads) {
  if (given.b == 0) return kDone;
  CentredRows<R> c;
  if (!c.prepare(rows)) return kNoMemory;
  const Plan pl = make_plan<R>(given.b, c.src, false, true);
  const int64_t k = out.k, blocks = (given.b + pl.B - 1) / pl.B, tiles = (rows.n + pl.NT - 1) / pl.NT;
  // With sigma = 0 and alpha = T = 1 every query takes the mode in which t is half a squared distance.
  Arena numbers;
  if (!numbers.reserve(2 * Arena::bytes<double>(given.b))) return kNoMemory;
  Queries in = given;
  double* one = numbers.take<double>(given.b);
  in.sigma = numbers.take<double>(given.b);
  for (int64_t b = 0; b < given.b; b++) one[b] = 1;
  in.alpha = in.temperature = one;
  in.bias = nullptr;
  in.conditions.rows = nullptr;
  in.leave_out = nullptr;
  in.weighting = kGaussian;
  threads = threads_for(threads, (double)rows.n * rows.d * given.b);
  const int parts = (int)imax(1, imin(threads, tiles));
  WorkSpaces<SweepWork<R>> list(parts);
  if (!list.reserve(pl, in)) return kNoMemory;
  CandidateLists lists;
  if (!lists.reserve(pl.B, parts, k, imin(rows.n, (tiles + parts - 1) / parts * pl.NT))) return kNoMemory;
  for (int64_t m = 0; m < blocks; m++) {
    const int64_t b0 = m * pl.B, B = imin(pl.B, in.b - b0);
    lists.clear();
    const int failed = for_parts(threads, parts, [&](int64_t i, int) {
      return nearest_sweep(c.src, in, pl, b0, B, imin(rows.n, tiles * i / parts * pl.NT),
                           imin(rows.n, tiles * (i + 1) / parts * pl.NT), lists.of(i), list.items[i]);
    });
    if (failed) return failed;
    const int left = for_parts(threads, B, [&](int64_t b, int) {
      Pace pace = {in.watch, 0};
      return nearest_finish(c.src, list.items[0].q[b], lists.of(0) + b, pl.B, parts,
                            out.sq_dist + (b0 + b) * k, out.index + (b0 + b) * k, pace);
    });
    if (left) return left;
  }
  return kDone;
}

static int run_nearest(const Rows& rows, const Queries& in, const Neighbours& out, int threads) {
  return in.f64 ? nearest_typed<double>(rows, in, out, threads)
                : nearest_typed<float>(rows, in, out, threads);
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
