// The hooks of one instruction set, included like cpu/isa/table-inl.h.
#pragma once
#include "cpu/core/exp-inl.h"
#include "cpu/core/products-inl.h"
#include "testing/hooks.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

template <class R>
static void run_exp(const R* x, R* y, int64_t n, bool two) {
  enum { W = Vec<R>::W };
  R t[W];
  for (int64_t i = 0; i < n; i += W) {
    const int64_t m = imin(W, n - i);
    memset((void*)t, 0, sizeof t);
    memcpy(t, x + i, m * sizeof(R));
    store(t, two ? vexp2(load(t)) : vexp(load(t)));
    memcpy(y + i, t, m * sizeof(R));
  }
}
static void run_merge(State* a, const State* b, double* factors) { merge(*a, *b, factors[0], factors[1]); }

static bool run_pairs(const Rows& rows, const Queries& in, double* dots, double* refined, double* errors) {
  CentredRows<float> c;
  if (!c.prepare(rows)) return false;
  const Plan pl = make_plan<float>(in.b, c.src, false, true);
  Tile<float> t;
  PairQueries<float> pairs;
  Arena arena;
  if (!pl.pairs || !arena.reserve(WholeRows<float>::bytes(pl.Dp, pl.NT) + PairQueries<float>::bytes(pl) +
                                  Arena::bytes<float>(pl.NT) + Arena::bytes<float>(pl.NT * pl.Ps) +
                                  Arena::bytes<float>(pl.Dp) + Arena::bytes<Query<float>>(pl.B)))
    return false;
  t.whole.take(pl.Dp, pl.NT, arena);
  t.whole.set(c.src);
  t.in_pairs = true;
  t.sq = arena.take<float>(pl.NT);
  pairs.take(pl, arena);
  float *p = arena.take<float>(pl.NT * pl.Ps), *row = arena.take<float>(pl.Dp);
  Query<float>* q = arena.take<Query<float>>(pl.B);
  for (int64_t b = 0; b < in.b; b++) {
    q[b] = make_query(in, c.src, b, pl, row);
    pairs.put(c.src, pl, t.whole, row, b, q[b]);
    const double of[4] = {q[b].i0, q[b].i1, q[b].r1, q[b].a1};
    memcpy(errors + 4 * b, of, sizeof of);
  }
  for (t.n0 = 0; t.n0 < rows.n; t.n0 += pl.NT) {
    Prefetch next = load_tile(products_for(c.src, pl), c.src, pl, t, rows.n);
    pairs.dots(pl, t, in.b, p, next);
    for (int64_t j = 0; j < t.cnt; j++)
      for (int64_t b = 0; b < in.b; b++) {
        dots[(t.n0 + j) * in.b + b] = p[j * pl.Ps + b];
        refined[(t.n0 + j) * in.b + b] = pairs.refined(c.src, pl, t, q[b], b, j);
      }
  }
  return true;
}

#define MK_STRING_OF(x) #x
#define MK_STRING(x) MK_STRING_OF(x)
static const Hooks kHooks = {MK_STRING(MEMOKERN_ISA_NS), run_exp<float>, run_exp<double>, run_merge,
                             run_pairs};

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
