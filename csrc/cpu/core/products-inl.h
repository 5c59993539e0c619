// The choice between direct and packed products, and the loading of a tile.
#pragma once
#include "cpu/core/direct-inl.h"
#include "cpu/core/pair_dots-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

// What a sweep does with a tile, for queries b0 .. b0 + B, whose columns come first in p.
template <class R>
struct Products {
  void (*load)(const Source<R>&, const Plan&, Tile<R>&);
  // p[j][b - b0] = <u_j, x_b>
  void (*dots)(const Source<R>&, const Plan&, const Tile<R>&, const R* x, int64_t b0, int64_t B, R* p,
               Prefetch&);
  // acc[b] += sum_j p[j][b - b0] u_j
  void (*accumulate)(const Source<R>&, const Plan&, const Tile<R>&, const R* p, int64_t b0, int64_t B, R* acc,
                     Prefetch&);
  typedef Products (*For)(bool direct);
};
template <class R, class S>
static Products<R> products_typed(bool direct) {
  const Products<R> unpacked = {Direct<R, S>::norms, Direct<R, S>::all_dots, Direct<R, S>::all_accumulate};
  const Products<R> packed = {pack_typed<R, S>, packed_dots<R>, packed_accumulate<R>};
  return direct ? unpacked : packed;
}
template <class R>
static typename Products<R>::For products_by_type(const Source<R>& src) {
  MK_BY_TYPE(R, products_typed)
}
template <class R>
static Products<R> products_for(const Source<R>& src, const Plan& pl) {
  return products_by_type(src)(pl.direct);
}

// Loads the tile that begins at t.n0, of rows before n1. Returns the rows after it, to be asked for on the
// way.
template <class R>
static Prefetch load_tile(const Products<R>& products, const Source<R>& src, const Plan& pl, Tile<R>& t,
                          int64_t n1) {
  t.cnt = imin(pl.NT, n1 - t.n0);
  t.sq_max = 0;
  t.lost = false;
  if (t.in_pairs)
    load_pairs(src, pl, t);
  else
    products.load(src, pl, t);
  t.y_max = __builtin_sqrt(t.sq_max);
  return prefetch_of(src, t.n0 + t.cnt, imin(pl.NT, n1 - t.n0 - t.cnt));
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
