// The products for few queries, and the choice between these and the packed ones.
#pragma once
#include "cpu/core/tile-inl.h"

namespace memokern { namespace MEMOKERN_ISA_NS {

// The products for up to FEW queries, straight from the rows: nothing is packed, since each row serves few operations.
template <class R, class S> struct Direct {
  enum { W = Vec<R>::W, NR = 2 * W };
  typedef typename Vec<R>::T V;
  static const S* row(const Source<R>& src, const Tile<R>& t, int64_t j) {  // beyond the tile, its last row again
    return (const S*)src.rows.data + (t.n0 + imin(j, t.cnt - 1)) * src.rows.stride;
  }
  static V centred(const Source<R>& src, const S* raw, int64_t d) { return Convert<R, S>::vec(raw) + load(src.offset + d); }

  static void norms(const Source<R>& src, const Plan& pl, Tile<R>& t) {
    for (int64_t j = 0; j < t.cnt; j++) {
      double sq = 0;
      if (src.rows.sq_norms) {
        sq = src.rows.sq_norms[t.n0 + j];
      } else {
        R part[KC];
        for (int64_t d = 0; d < pl.D; d += KC) {
          const int64_t cnt = imin(KC, pl.D - d);
          memset((void*)part, 0, sizeof part);
          fetch<R, S>(src, t.n0 + j, d, cnt, part);
          V s = {};
          for (int64_t e = 0; e < cnt; e += W) s += load(part + e) * load(part + e);
          sq += hsum<R>(s);
        }
        sq *= src.rows.scale * src.rows.scale;
      }
      t.set_norm(j, sq);
    }
  }

  // Queries [b, b + Q), features [k, end): part[j][b] += <yc_j, xc_b>, lane by lane. J rows at a time.
  template <int Q> static void dots(const Source<R>& src, const Plan& pl, const Tile<R>& t, const R* x, int64_t b, int64_t k, int64_t end, V* part, Ahead& next, int64_t ahead) {
    enum { J = Q >= 3 ? 3 : 4 };
    x += b * pl.Dp;
    for (int64_t j0 = 0; j0 < t.cnt; j0 += J) {
      const S* raw[J];
      V s[J][Q];
#pragma GCC unroll 4
      for (int j = 0; j < J; j++) {
        raw[j] = row(src, t, j0 + j);
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) s[j][q] = part[(j0 + j) * pl.B + b + q];
      }
      for (int64_t d = k; d < end; d += W) {
        if ((d / W & 3) == 0) next.lines(ahead);
        const V o = load(src.offset + d);
        V y[J];
#pragma GCC unroll 4
        for (int j = 0; j < J; j++) y[j] = Convert<R, S>::vec(raw[j] + d) + o;
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) {
          V v = load(x + q * pl.Dp + d);
          MK_ROUND(v);  // in a register, for J rows: GCC would load it for each
#pragma GCC unroll 4
          for (int j = 0; j < J; j++) s[j][q] += y[j] * v;
        }
      }
#pragma GCC unroll 4
      for (int j = 0; j < J; j++)
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) part[(j0 + j) * pl.B + b + q] = s[j][q];
    }
  }

  // acc[q][d ..] += sum_i w[i][q] yc_(rows[i]) for one run of N vectors of features, in registers.
  template <int Q, int N> static void run(const Source<R>& src, const Plan& pl, const S* const* rows, int64_t count, const R* w, R* acc, int64_t d, Ahead& next, int64_t ahead) {
    V s[Q][N];
#pragma GCC unroll 4
    for (int q = 0; q < Q; q++)
#pragma GCC unroll 8
      for (int v = 0; v < N; v++) s[q][v] = V{};
    for (int64_t i = 0; i < count; i++, w += Q) {
      const S* raw = rows[i] + d;
      next.lines(ahead);
      V y[N];
#pragma GCC unroll 8
      for (int v = 0; v < N; v++) y[v] = centred(src, raw + v * W, d + v * W);
#pragma GCC unroll 4
      for (int q = 0; q < Q; q++) {
        const V f = splat<R>(w[q]);
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) s[q][v] += y[v] * f;
      }
    }
#pragma GCC unroll 4
    for (int q = 0; q < Q; q++)
#pragma GCC unroll 8
      for (int v = 0; v < N; v++) {  // one rounding on the large sum per tile, not per row
        R* a = acc + q * pl.Dp + d + v * W;
        store(a, load(a) + s[q][v]);
      }
  }
  template <int Q> static void accumulate(const Source<R>& src, const Plan& pl, const Tile<R>& t, const R* p, int64_t b, R* acc, Ahead& next) {
    enum { N = Q == 1 ? 8 : Q == 2 ? 4 : 3 };
    const S* rows[MAX_NT];  // those with any weight
    int64_t which[MAX_NT];
    R w[MAX_NT * Q];
    int64_t count = 0, d = 0;
    for (int64_t j = 0; j < t.cnt; j++) {
      bool any = false;
      for (int q = 0; q < Q; q++) {
        w[count * Q + q] = p[j * pl.Ps + b + q];
        any |= w[count * Q + q] != R(0);
      }
      rows[count] = (const S*)src.rows.data + (t.n0 + j) * src.rows.stride;
      which[count] = t.n0 + j;
      count += any;
    }
    const int64_t ahead = pl.B == 1 ? 1 : next.per((pl.B - b + 3) / 4 * count * (pl.D / (N * W)));  // as much as leaves room for the rows in L2
    acc += b * pl.Dp;
    for (; d + N * W <= pl.D; d += N * W) {
      run<Q, N>(src, pl, rows, count, w, acc, d, next, ahead);
    }
    for (; d + W <= pl.D; d += W) run<Q, 1>(src, pl, rows, count, w, acc, d, next, ahead);
    if (d == pl.D) return;
    V s[Q];
    for (int q = 0; q < Q; q++) s[q] = V{};
    for (int64_t i = 0; i < count; i++) {
      R tail[W];
      fetch<R, S>(src, which[i], d, pl.D - d, tail);
      for (int q = 0; q < Q; q++) s[q] += load(tail) * splat<R>(w[i * Q + q]);
    }
    for (int q = 0; q < Q; q++) store(acc + q * pl.Dp + d, load(acc + q * pl.Dp + d) + s[q]);
  }

#define MK_GROUPS(call)                                                  \
  for (int64_t b = 0, groups = (B + 3) / 4, g = 0; g < groups; g++) {    \
    const int64_t end = B * (g + 1) / groups;                            \
    switch (end - b) {                                                   \
      case 1: call(1); break;                                            \
      case 2: call(2); break;                                            \
      case 3: call(3); break;                                            \
      default: call(4);                                                  \
    }                                                                    \
    b = end;                                                             \
  }
#define MK_DOTS(Q) dots<Q>(src, pl, t, x, b, k, end_k, part, next, ahead)
#define MK_ACC(Q) accumulate<Q>(src, pl, t, p, b, acc, next)
  static void all_dots(const Source<R>& src, const Plan& pl, const Tile<R>& t, const R* x, int64_t, int64_t B, R* p, Ahead& next) {
    const int64_t full = pl.D / W * W;
    V part[(MAX_NT + 4) * FEW];
    double sum[MAX_NT * FEW];
    for (int64_t i = 0; i < t.cnt * pl.B; i++) sum[i] = 0;
    // One query: memory is all that is waited for here, and what the processor's own prefetcher brings is enough.
    const int64_t ahead = B == 1 ? 0 : next.per(2 * ((B + 3) / 4) * ((t.cnt + 2) / 3) * (full / (4 * W)));
    for (int64_t k0 = 0; k0 < full; k0 += DEEP) {
      for (int64_t i = 0; i < (t.cnt + 4) * pl.B; i++) part[i] = V{};
      for (int64_t k = k0; k < imin(k0 + DEEP, full); k += BLOCK) {
        const int64_t end_k = imin(imin(k + BLOCK, k0 + DEEP), full);
        MK_GROUPS(MK_DOTS)
      }
      for (int64_t i = 0; i < t.cnt * pl.B; i++) sum[i] += hsum<R>(part[i]);
    }
    for (int64_t j = 0; j < t.cnt; j++) {
      R tail[W] = {};
      fetch<R, S>(src, t.n0 + j, full, pl.D - full, tail);
      for (int64_t b = 0; b < B; b++) {
        double v = sum[j * pl.B + b];
        for (int64_t i = 0; i < pl.D - full; i++) v += (double)tail[i] * x[b * pl.Dp + full + i];
        p[j * pl.Ps + b] = (R)v;
      }
    }
  }
  static void all_accumulate(const Source<R>& src, const Plan& pl, const Tile<R>& t, const R* p, int64_t, int64_t B, R* acc, Ahead& next) { MK_GROUPS(MK_ACC) }
#undef MK_GROUPS
#undef MK_DOTS
#undef MK_ACC
};

// The steps of a tile, for queries [b0, b0 + B), whose columns of p come first: few queries directly, many from a packed tile.
template <class R> struct Engine {
  void (*load)(const Source<R>&, const Plan&, Tile<R>&);
  void (*dots)(const Source<R>&, const Plan&, const Tile<R>&, const R* x, int64_t b0, int64_t B, R* p, Ahead&);        // p[j][b] = <yc_j, xc_b>
  void (*accumulate)(const Source<R>&, const Plan&, const Tile<R>&, const R* p, int64_t b0, int64_t B, R* acc, Ahead&);  // acc[b] += sum_j p[j][b] yc_j
  typedef Engine (*For)(bool few);
};
template <class R, class S> static Engine<R> engine_typed(bool few) {
  const Engine<R> direct = {Direct<R, S>::norms, Direct<R, S>::all_dots, Direct<R, S>::all_accumulate};
  const Engine<R> packed = {pack_typed<R, S>, packed_dots<R>, packed_accumulate<R>};
  return few ? direct : packed;
}
template <class R> static typename Engine<R>::For engine_by_type(const Source<R>& src) { MK_BY_TYPE(R, engine_typed) }
template <class R> static Engine<R> engine_for(const Source<R>& src, const Plan& pl) { return engine_by_type(src)(pl.few); }

// The tile that begins at t.n0, of rows before n1; returns the rows after it, to be asked for on the way.
template <class R> static Ahead load_tile(const Engine<R>& engine, const Source<R>& src, const Plan& pl, Tile<R>& t, int64_t n1) {
  t.cnt = imin(pl.NT, n1 - t.n0);
  t.sq_max = 0;
  engine.load(src, pl, t);
  t.y_max = __builtin_sqrt(t.sq_max);
  return look_ahead(src, t.n0 + t.cnt, imin(pl.NT, n1 - t.n0 - t.cnt));
}

} }  // namespace
