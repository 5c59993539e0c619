// nearest: the k rows of least |x - y|^2, exactly.
//
// The sweep's first product gives every squared distance up to a bound for the worst case (bound_error); a row whose
// distance could be among the k best is evaluated by direct differences in double. Each part keeps k pairs (distance,
// index) per query in ascending order, of equal distances the lower index first. Parts are joined by inserting the list
// of one into that of another.
#pragma once
#include "cpu/posterior/sweep-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

MK_INLINE void insert_neighbour(double* dist, int64_t* index, int64_t k, double d, int64_t n) {
  if (!(d < dist[k - 1] || (d == dist[k - 1] && n < index[k - 1]))) return;
  int64_t i = k - 1;
  for (; i > 0 && (dist[i - 1] > d || (dist[i - 1] == d && index[i - 1] > n)); i--) {
    dist[i] = dist[i - 1];
    index[i] = index[i - 1];
  }
  dist[i] = d;
  index[i] = n;
}

// Rows n0 .. n1 for queries b0 .. b0 + B; dist and index [B][k] receive their lists.
template <class R>
static void nearest_sweep(const Source<R>& src, const Queries& in, const Plan& pl, int64_t b0, int64_t B, int64_t n0,
                          int64_t n1, int64_t k, double* dist, int64_t* index, SweepWork<R>& w) {
  const Products<R> products = products_for(src, pl);
  enum { W = Vec<R>::W };
  load_queries(src, in, pl, b0, B, w);
  for (int64_t i = 0; i < B * k; i++) {
    dist[i] = kInf;
    index[i] = INT64_MAX;
  }
  const TileContext<R> s = make_tile_context<R>(src, pl, nullptr, 0, w);
  for (w.tile.n0 = n0; w.tile.n0 < n1; w.tile.n0 += pl.NT) {
    Prefetch next = load_tile(products, src, pl, w.tile, n1);
    products.dots(src, pl, w.tile, w.x, 0, B, w.p, next);
    for (int64_t b = 0; b < B; b += W) {
      const typename Vec<R>::T top = logits(w.groups[b / W], s, w.p + b);  // t = (|xc|^2 - r^2) / 2
      for (int e = 0; e < imin(W, B - b); e++) {
        const Query<R>& q = w.q[b + e];
        double* best = dist + (b + e) * k;
        const double err = error_of(q, s);
        if (q.mode == kNotFinite || top[e] < nearness(q, best[k - 1], err)) continue;
        for (int64_t j = 0; j < w.tile.cnt; j++)
          if (!((double)w.p[j * pl.Ps + b + e] < nearness(q, best[k - 1], err)))
            insert_neighbour(best, index + (b + e) * k, k, exact_r2(q, s, j), w.tile.n0 + j);
      }
    }
  }
}

template <class R>
static int nearest_typed(const Rows& rows, const Queries& given, const Neighbours& out, int threads) {
  if (given.b == 0) return kDone;
  CentredRows<R> c;
  if (!c.prepare(rows)) return kNoMemory;
  const Plan pl = make_plan<R>(given.b, rows);
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
  in.weighting = kGaussian;
  const int parts = (int)imax(1, imin(threads, tiles));
  WorkSpaces<SweepWork<R> > list(parts);
  Arena lists;
  if (!list.items ||
      !lists.reserve(parts * (Arena::bytes<double>(pl.B * k) + Arena::bytes<int64_t>(pl.B * k))))
    return kNoMemory;
  for (int i = 0; i < parts; i++)
    if (!list.items[i].reserve(pl, false)) return kNoMemory;
  double* dist = lists.take<double>(parts * pl.B * k);
  int64_t* index = lists.take<int64_t>(parts * pl.B * k);
  for (int64_t m = 0; m < blocks; m++) {
    const int64_t b0 = m * pl.B, B = imin(pl.B, in.b - b0);
#pragma omp parallel for num_threads(parts) schedule(static, 1) if (parts > 1)
    for (int i = 0; i < parts; i++)
      nearest_sweep(c.src, in, pl, b0, B, imin(rows.n, tiles * i / parts * pl.NT),
                    imin(rows.n, tiles * (i + 1) / parts * pl.NT), k, dist + i * pl.B * k, index + i * pl.B * k,
                    list.items[i]);
    for (int64_t b = 0; b < B; b++) {
      const bool not_finite = list.items[0].q[b].mode == kNotFinite;
      double* d = out.sq_dist + (b0 + b) * k;
      int64_t* n = out.index + (b0 + b) * k;
      for (int64_t j = 0; j < k; j++) {
        d[j] = not_finite ? __builtin_nan("") : dist[b * k + j];
        n[j] = not_finite ? j : index[b * k + j];
      }
      for (int i = 1; i < parts && !not_finite; i++)
        for (int64_t j = 0; j < k; j++)
          insert_neighbour(d, n, k, dist[(i * pl.B + b) * k + j], index[(i * pl.B + b) * k + j]);
    }
  }
  return kDone;
}

static int run_nearest(const Rows& rows, const Queries& in, const Neighbours& out, int threads) {
  return in.f64 ? nearest_typed<double>(rows, in, out, threads) : nearest_typed<float>(rows, in, out, threads);
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
