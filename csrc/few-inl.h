// The products for few queries, and the choice between these and the packed ones.
#pragma once
#include "tile-inl.h"

namespace memokern { namespace MEMOKERN_ISA_NS {

// The products for up to FEW queries, straight from the rows: nothing is packed, since each row serves few operations.
template <class R, class S> struct Direct {
  enum { W = Vec<R>::W, NR = 2 * W };
  typedef typename Vec<R>::T V;
  static const S* row(const Source<R>& src, const Tile<R>& t, int64_t j) {  // beyond the tile, its last row again
    return (const S*)src.rows.data + (t.n0 + imin(j, t.cnt - 1)) * src.rows.stride;
  }
  static V centred(const Source<R>& src, const S* raw, int64_t d) { return Convert<R, S>::vec(raw + d) * src.scale + load(src.offset + d); }

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
      }
      t.set_norm(j, sq);
    }
  }

  // Queries [b, b + Q): p[j][b] = <yc_j, xc_b>. J rows at a time, H vectors of features, sums along the features.
  template <int Q> static void dots(const Source<R>& src, const Plan& pl, const Tile<R>& t, const R* x, int64_t b, R* p, Ahead& next) {
    enum { J = Q == 4 ? 3 : 4, H = Q == 1 ? 2 : 1 };
    const int64_t full = pl.D / (H * W) * (H * W), ahead = b > 0 ? 0 : next.per(2 * ((t.cnt + J - 1) / J) * imax(1, full / (H * W)));
    x += b * pl.Dp;
    for (int64_t j0 = 0; j0 < t.cnt; j0 += J) {
      const S* raw[J];
      double sum[J][Q];
      for (int j = 0; j < J; j++) {
        raw[j] = row(src, t, j0 + j);
        for (int q = 0; q < Q; q++) sum[j][q] = 0;
      }
      for (int64_t k = 0; k < full; k += DEEP) {
        V s[J][Q][H];
#pragma GCC unroll 4
        for (int j = 0; j < J; j++)
#pragma GCC unroll 4
          for (int q = 0; q < Q; q++)
#pragma GCC unroll 2
            for (int h = 0; h < H; h++) s[j][q][h] = V{};
        for (int64_t d = k; d < imin(k + DEEP, full); d += H * W) {
          next.lines(ahead);
#pragma GCC unroll 2
          for (int h = 0; h < H; h++)
#pragma GCC unroll 4
            for (int j = 0; j < J; j++) {
              const V y = centred(src, raw[j], d + h * W);
#pragma GCC unroll 4
              for (int q = 0; q < Q; q++) s[j][q][h] += y * load(x + q * pl.Dp + d + h * W);
            }
        }
        for (int j = 0; j < J; j++)
          for (int q = 0; q < Q; q++)
            for (int h = 0; h < H; h++) sum[j][q] += hsum<R>(s[j][q][h]);
      }
      if (full < pl.D)
        for (int j = 0; j < J; j++) {
          R tail[NR];
          fetch<R, S>(src, t.n0 + imin(j0 + j, t.cnt - 1), full, pl.D - full, tail);
          for (int q = 0; q < Q; q++)
            for (int64_t i = 0; i < pl.D - full; i++) sum[j][q] += (double)tail[i] * x[q * pl.Dp + full + i];
        }
      for (int j = 0; j < J; j++)
        for (int q = 0; q < Q; q++) p[(j0 + j) * pl.Ps + b + q] = (R)sum[j][q];
    }
  }

  // acc[b][d ..] += sum_j p[j][b] yc_j for one run of V vectors of features, in registers.
  template <int Q, int N> static void run(const Source<R>& src, const Plan& pl, const Tile<R>& t, const R* p, R* acc, int64_t d) {
    V s[Q][N];
#pragma GCC unroll 4
    for (int q = 0; q < Q; q++)
#pragma GCC unroll 8
      for (int v = 0; v < N; v++) s[q][v] = V{};
    const S* raw = row(src, t, 0);
    for (int64_t j = 0; j < t.cnt; j++, raw += src.rows.stride, p += pl.Ps) {
      bool any = false;
#pragma GCC unroll 4
      for (int q = 0; q < Q; q++) any |= p[q] != R(0);
      if (!any) continue;
#pragma GCC unroll 8
      for (int v = 0; v < N; v++) {
        const V y = centred(src, raw, d + v * W);
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) s[q][v] += y * splat<R>(p[q]);
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
    enum { N = Q == 3 ? 2 : 8 / Q };
    const int64_t ahead = b > 0 ? 0 : next.per(imax(1, pl.D / (N * W)));
    p += b;
    acc += b * pl.Dp;
    int64_t d = 0;
    for (; d + N * W <= pl.D; d += N * W) {
      next.lines(ahead);
      run<Q, N>(src, pl, t, p, acc, d);
    }
    for (; d + W <= pl.D; d += W) run<Q, 1>(src, pl, t, p, acc, d);
    if (d == pl.D) return;
    V s[Q];
    for (int q = 0; q < Q; q++) s[q] = V{};
    for (int64_t j = 0; j < t.cnt; j++) {
      R tail[W];
      fetch<R, S>(src, t.n0 + j, d, pl.D - d, tail);
      for (int q = 0; q < Q; q++) s[q] += load(tail) * splat<R>(p[j * pl.Ps + q]);
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
#define MK_DOTS(Q) dots<Q>(src, pl, t, x, b, p, next)
#define MK_ACC(Q) accumulate<Q>(src, pl, t, p, b, acc, next)
  static void all_dots(const Source<R>& src, const Plan& pl, const Tile<R>& t, const R* x, int64_t B, R* p, Ahead& next) { MK_GROUPS(MK_DOTS) }
  static void all_accumulate(const Source<R>& src, const Plan& pl, const Tile<R>& t, const R* p, int64_t B, R* acc, Ahead& next) { MK_GROUPS(MK_ACC) }
#undef MK_GROUPS
#undef MK_DOTS
#undef MK_ACC
};

// The steps of a tile: few queries directly, many from a packed tile.
template <class R> struct Engine {
  void (*load)(const Source<R>&, const Plan&, Tile<R>&);
  void (*dots)(const Source<R>&, const Plan&, const Tile<R>&, const R* x, int64_t B, R* p, Ahead&);        // p[j][b] = <yc_j, xc_b>
  void (*accumulate)(const Source<R>&, const Plan&, const Tile<R>&, const R* p, int64_t B, R* acc, Ahead&);  // acc[b] += sum_j p[j][b] yc_j
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
