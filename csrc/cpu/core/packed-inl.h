// The two matrix products of a sweep for many queries, from a packed tile.
//
// A tile is NT rows, u in the compute type (source-inl.h), in panels of NR features: y [Dp/NR][NT][NR]. One
// layout serves both products, and avoids that rows which lie D floats apart map to one set of the L1 cache:
// - dots makes P [NT][Ps] = Y X'. Queries lie across the lanes, packed once per sweep in panels of them; the
//   feature of a row is a broadcast.
// - accumulate makes ACC [Dp/NR][B][NR] += P' Y. Features lie across the lanes; a weight is a broadcast.
#pragma once
#include "cpu/core/tile-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

// Fills the tile, J rows at a time: few streams to read, and whole lines to write.
template <class R, class S, bool NORMS, bool VALUED>
static void pack_rows(const Source<R>& src, const Plan& pl, Tile<R>& t) {
  enum { W = Vec<R>::W, NR = 2 * W, J = 4 };
  typedef typename Vec<R>::T V;
  const int64_t full = pl.D / NR * NR;
  const double scale = src.rows.scale, shift = src.rows.shift;
  const double sq_unit = src.unit * src.unit;
  for (int64_t j0 = 0; j0 < t.cnt; j0 += J) {
    const S* raw[J];
    double sq[J];
    for (int j = 0; j < J; j++) {
      raw[j] = (const S*)src.rows.data + (t.n0 + imin(j0 + j, t.cnt - 1)) * src.rows.stride;
      sq[j] = 0;
    }
    for (int64_t k = 0; k < full; k += KC) {
      V q[J];
#pragma GCC unroll 4
      for (int j = 0; j < J; j++) q[j] = V{};
      for (int64_t d = k; d < imin(full, k + KC); d += NR) {
        const V o0 = load(src.offset + d), o1 = load(src.offset + d + W);
        R* dst = t.y + d * pl.NT + j0 * NR;
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) {
          const V a = VALUED ? ValueIn<R, S>::vec(raw[j] + d, scale, shift) + o0
                             : Convert<R, S>::vec(raw[j] + d) + o0;
          const V b = VALUED ? ValueIn<R, S>::vec(raw[j] + d + W, scale, shift) + o1
                             : Convert<R, S>::vec(raw[j] + d + W) + o1;
          store(dst + j * NR, a);
          store(dst + j * NR + W, b);
          if (NORMS) q[j] += a * a + b * b;
        }
      }
      if (NORMS)
        for (int j = 0; j < J; j++) sq[j] += hsum<R>(q[j]);
    }
    if (full < pl.D)
      for (int j = 0; j < J; j++) {
        R* dst = t.y + full * pl.NT + (j0 + j) * NR;
        R tail[NR];
        memset((void*)tail, 0, sizeof tail);
        fetch<R, S>(src, t.n0 + imin(j0 + j, t.cnt - 1), full, pl.D - full, tail);
        for (int i = 0; i < NR; i++) {
          dst[i] = tail[i];
          if (NORMS) sq[j] += (double)tail[i] * tail[i];
        }
      }
    for (int j = 0; j < J && j0 + j < t.cnt; j++) {
      t.set_norm(j0 + j, NORMS ? sq[j] * sq_unit : src.rows.sq_norms[t.n0 + j0 + j]);
    }
  }
}
template <class R, class S>
static void pack_typed(const Source<R>& src, const Plan& pl, Tile<R>& t) {
  if (src.valued)
    src.rows.sq_norms ? pack_rows<R, S, false, true>(src, pl, t) : pack_rows<R, S, true, true>(src, pl, t);
  else
    src.rows.sq_norms ? pack_rows<R, S, false, false>(src, pl, t) : pack_rows<R, S, true, false>(src, pl, t);
}

// The micro-kernel: c[i][0 .. V W) (+)= sum_k a(i, k) b[k][0 .. V W). It keeps M x V vectors in registers,
// and U of each to hide the latency of a multiply-add. a(i, k) = a[i * AI + k * a_k] within runs of `run`,
// which are a_next apart; rows of b are b_k apart. On the way it asks for `ahead` lines of the next rows in
// each run.
template <class R, int M, int V, int U, int AI>
static void micro_kernel(const R* a, int64_t a_k, int64_t run, int64_t a_next, const R* b, int64_t b_k,
                         int64_t K, R* c, int64_t c_i, bool add, Prefetch& next, int64_t ahead) {
  enum { W = Vec<R>::W };
  typename Vec<R>::T r[U][M][V];
#pragma GCC unroll 4
  for (int u = 0; u < U; u++)
#pragma GCC unroll 24
    for (int i = 0; i < M; i++)
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) r[u][i][v] = typename Vec<R>::T{};
  for (int64_t k0 = 0; k0 < K; k0 += run, a += a_next) {
    const R* ak = a;
    next.lines(ahead);
    int64_t left = imin(run, K - k0);
    for (; left >= U; left -= U, ak += U * a_k, b += U * b_k) {
#pragma GCC unroll 4
      for (int u = 0; u < U; u++)
#pragma GCC unroll 24
        for (int i = 0; i < M; i++)
#pragma GCC unroll 2
          for (int v = 0; v < V; v++)
            r[u][i][v] += splat<R>(ak[u * a_k + i * AI]) * load(b + u * b_k + v * W);
    }
    for (; U > 1 && left > 0; left--, ak += a_k, b += b_k)
#pragma GCC unroll 24
      for (int i = 0; i < M; i++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) r[0][i][v] += splat<R>(ak[i * AI]) * load(b + v * W);
  }
#pragma GCC unroll 24
  for (int i = 0; i < M; i++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
#pragma GCC unroll 4
      for (int u = 1; u < U; u++) r[0][i][v] += r[u][i][v];
      R* q = c + i * c_i + v * W;
      if (add) r[0][i][v] += load(q);
      store(q, r[0][i][v]);
    }
}

// Where feature d of query b lies among the queries of a sweep: [B][Dp] for direct products, else in panels
// [Dp][NR], of which the last is [Dp][W] if that holds the rest.
template <class R>
MK_INLINE R* query_at(const Plan& pl, R* x, int64_t b, int64_t d) {
  enum { W = Vec<R>::W, NR = 2 * W };
  if (pl.direct) return x + b * pl.Dp + d;
  const int64_t b0 = b / NR * NR, lanes = imin(NR, pl.Bp - b0);
  return x + b0 * pl.Dp + d * lanes + (b - b0);
}

// p[j][b - b0] = <u_j, x_b> for queries b0 .. b0 + B, b0 a multiple of NR; p is [NT][Ps]. Half of the rows in
// `next` are asked for here, the rest by accumulate.
template <class R>
static void packed_dots(const Source<R>&, const Plan& pl, const Tile<R>& t, const R* x, int64_t b0, int64_t B,
                        R* p, Prefetch& next) {
  enum { W = Vec<R>::W, NR = 2 * W };
  const int64_t groups = (t.cnt + MR - 1) / MR;
  const int64_t ahead = next.lines_per_step(2 * (pl.Dp / NR) * ((B + NR - 1) / NR) * groups);
  p -= b0;
  for (int64_t k = 0; k < pl.Dp; k += KC)
    for (int64_t b = b0; b < b0 + B; b += NR) {
      const int64_t lanes = imin(NR, pl.Bp - b), K = imin(KC, pl.Dp - k);
      const R* xb = x + b * pl.Dp + k * lanes;
      const R* y = t.y + k * pl.NT;
      if (lanes == NR) {
        for (int64_t j = 0; j < t.cnt; j += MR) {
          micro_kernel<R, MR, 2, 1, NR>(y + j * NR, 1, NR, pl.NT * NR, xb, NR, K, p + j * pl.Ps + b, pl.Ps,
                                        k > 0, next, ahead);
        }
      } else {
        for (int64_t j = 0; j < t.cnt; j += ROW_UNIT) {
          micro_kernel<R, ROW_UNIT, 1, 1, NR>(y + j * NR, 1, NR, pl.NT * NR, xb, W, K, p + j * pl.Ps + b,
                                              pl.Ps, k > 0, next, 2 * ahead);
        }
      }
    }
}

// c[i][0 .. NR) += sum_k a[list[k]][i] y[list[k]][0 .. NR): the micro-kernel of accumulate where few rows
// have weight in any of its M queries, over these rows alone.
template <class R, int M>
static void micro_kernel_sparse(const uint8_t* list, int64_t count, const R* a, int64_t a_k, const R* y,
                                R* c) {
  enum { W = Vec<R>::W, NR = 2 * W };
  typename Vec<R>::T r[M][2];
#pragma GCC unroll 12
  for (int i = 0; i < M; i++)
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) r[i][v] = load(c + i * NR + v * W);
  for (int64_t k = 0; k < count; k++) {
    const R *ak = a + list[k] * a_k, *yk = y + list[k] * NR;
#pragma GCC unroll 12
    for (int i = 0; i < M; i++)
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) r[i][v] += splat<R>(ak[i]) * load(yk + v * W);
  }
#pragma GCC unroll 12
  for (int i = 0; i < M; i++)
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++) store(c + i * NR + v * W, r[i][v]);
}

// The rows of a tile that have weight in any of the queries first .. end.
struct WeighedRows {
  int64_t count;
  uint8_t at[NT_GROUPED];
  template <class R>
  void find(const R* p, int64_t Ps, int64_t first, int64_t end, int64_t cnt) {
    count = 0;
    for (int64_t j = 0; j < cnt; j++) {
      bool any = false;
      for (int64_t b = first; b < end; b++) any |= p[j * Ps + b] != R(0);
      at[count] = (uint8_t)j;
      count += any;
    }
  }
};

// acc[.][b][.] += sum_j p[j][b - b0] u_j for queries b0 .. b0 + B: all of them against one panel of features
// after another, in blocks of even size. A block in which few rows have weight goes over these alone.
template <class R>
static void packed_accumulate(const Source<R>&, const Plan& pl, const Tile<R>& t, const R* p, int64_t b0,
                              int64_t B, R* acc, Prefetch& next) {
  enum { NR = 2 * Vec<R>::W };
  const int64_t blocks = (B + MR - 1) / MR, ahead = next.lines_per_step(pl.Dp / NR * blocks);
  WeighedRows list[MAX_BLOCKS], any;
  for (int64_t k = 0; k < blocks; k++) {
    list[k].count = t.cnt;  // where features are few, looking costs as much as it saves
    if (pl.D >= KC) list[k].find(p, pl.Ps, B * k / blocks, B * (k + 1) / blocks, t.cnt);
  }
  if (t.in_pairs) any.find(p, pl.Ps, 0, B, t.cnt);
  for (int64_t d = 0; d < pl.Dp; d += NR) {
    const R* y = t.in_pairs ? t.whole.floats(d, any.at, any.count, pl.NT) : t.y + d * pl.NT;
    for (int64_t k = 0; k < blocks; k++) {
      const int64_t b = B * k / blocks, m = B * (k + 1) / blocks - b;
      R* c = acc + d * pl.B + (b0 + b) * NR;
      switch (m) {
#define MK_CASE(M, U)                                                                              \
  case M:                                                                                          \
    if (4 * list[k].count < 3 * t.cnt) {                                                           \
      next.lines(ahead);                                                                           \
      micro_kernel_sparse<R, M>(list[k].at, list[k].count, p + b, pl.Ps, y, c);                    \
    } else {                                                                                       \
      micro_kernel<R, M, 2, U, 1>(p + b, pl.Ps, t.cnt, 0, y, NR, t.cnt, c, NR, true, next, ahead); \
    }                                                                                              \
    break;
        MK_CASE(1, 4)
        MK_CASE(2, 2)
        MK_CASE(3, 2)
        MK_CASE(4, 1)
        MK_CASE(5, 1)
        MK_CASE(6, 1)
#if MK_MR > 6
        MK_CASE(7, 1)
        MK_CASE(8, 1)
        MK_CASE(9, 1)
        MK_CASE(10, 1)
        MK_CASE(11, 1)
        MK_CASE(12, 1)
#endif
#undef MK_CASE
      }
    }
  }
}
// Where the accumulator of query b has feature d, d a multiple of NR, followed by the NR - 1 features after
// it: in [B][Dp] for direct products, else in [Dp/NR][B][NR].
template <class R>
MK_INLINE R* acc_at(const Plan& pl, R* acc, int64_t b, int64_t d) {
  return pl.direct ? acc + b * pl.Dp + d : acc + d * pl.B + b * (2 * Vec<R>::W);
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
