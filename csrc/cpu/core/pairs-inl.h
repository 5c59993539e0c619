// The micro-kernel of the first product of a sweep over rows of uint8 in integers, and its tile.
//
// An instruction multiplies pairs of 16-bit numbers and adds the two products of each, where one of floats
// does half as many products. A pair is of two features (pair_dots-inl.h).
#pragma once
#include "cpu/core/packed-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

// Fills a tile of integers. There are none of most types.
template <class R>
static void load_pairs(const Source<R>&, const Plan&, Tile<R>&) {}

#if MK_WHOLE_ROWS
// The micro-kernel of packed-inl.h: sum[i][v] = sum_k a(i, k) b[k][v W ..] over K pairs. S adds up, Plain or
// Vnni.
template <class S, int M, int V, int AI>
MK_INLINE void pairs_kernel(const int32_t* a, int64_t a_k, int64_t run, int64_t a_next, const int32_t* b,
                            int64_t K, Pairs (&sum)[M][V], Prefetch& next, int64_t ahead) {
  enum { W = Vec<float>::W };
#pragma GCC unroll 24
  for (int i = 0; i < M; i++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) sum[i][v] = Pairs{};
  for (int64_t k0 = 0; k0 < K; k0 += run, a += a_next) {
    const int32_t* ak = a;
    next.lines(ahead);
    for (int64_t left = imin(run, K - k0); left > 0; left--, ak += a_k, b += V * W) {
      const Pairs b0 = load(b), b1 = load(b + (V - 1) * W);
#pragma GCC unroll 24
      for (int i = 0; i < M; i++) {
        const Pairs ai = splat<int32_t>(ak[i * AI]);
        if constexpr (V == 2)
          S::add(ai, b0, b1, sum[i][0], sum[i][1]);
        else
          S::add(ai, b0, sum[i][0]);
      }
    }
  }
}

// Fills the tile as pack_rows does, with integers.
template <bool NORMS>
static void pack_pairs(const Source<float>& src, const Plan& pl, Tile<float>& t) {
  enum { W = Vec<float>::W, NR = 2 * W, J = 4 };
  const int64_t full = pl.D / NR * NR;
  const double sq_unit = src.unit * src.unit;
  for (int64_t j0 = 0; j0 < t.cnt; j0 += J) {
    const uint8_t* raw[J];
    double sq[J] = {};
    for (int j = 0; j < J; j++)
      raw[j] = (const uint8_t*)src.rows.data + (t.n0 + imin(j0 + j, t.cnt - 1)) * src.rows.stride;
    const auto put = [&](int64_t d, int j, const uint8_t* from) {
      store(t.whole.v + d * pl.NT + (j0 + j) * NR, shorts_of(from) + load(t.whole.shift + d));
    };
    for (int64_t d = 0; d < full; d += NR)
#pragma GCC unroll 4
      for (int j = 0; j < J; j++) put(d, j, raw[j] + d);
    for (int j = 0; full < pl.D && j < J; j++) {
      uint8_t tail[NR] = {};
      memcpy(tail, raw[j] + full, pl.D - full);
      put(full, j, tail);
    }
    for (int64_t d = 0; NORMS && d < pl.Dp; d += KC)
      for (int j = 0; j < J; j++) {
        Vec<float>::T q = {};
        for (int64_t k = d; k < imin(pl.Dp, d + KC); k += NR) {
          float y[NR];
          t.whole.to_floats(k, j0 + j, pl.NT, y);
          q += load(y) * load(y) + load(y + W) * load(y + W);
        }
        sq[j] += hsum<float>(q);
      }
    for (int j = 0; j < J && j0 + j < t.cnt; j++)
      t.set_norm(j0 + j, NORMS ? sq[j] * sq_unit : src.rows.sq_norms[t.n0 + j0 + j]);
  }
}
static void load_pairs(const Source<float>& src, const Plan& pl, Tile<float>& t) {
  src.rows.sq_norms ? pack_pairs<false>(src, pl, t) : pack_pairs<true>(src, pl, t);
}
#endif

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
