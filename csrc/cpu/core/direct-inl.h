// The two matrix products of a sweep for up to DIRECT_B queries. They read the rows as they are stored:
// nothing is packed, since each row serves too few operations to pay for it. u = raw + offset, as in
// source-inl.h.
#pragma once
#include "cpu/core/tile-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

template <class R, class S>
struct Direct {
  enum { W = Vec<R>::W, NR = 2 * W };
  typedef typename Vec<R>::T V;
  // Row j of the tile; beyond it, its last row again.
  static const S* row(const Source<R>& src, const Tile<R>& t, int64_t j) {
    return (const S*)src.rows.data + (t.n0 + imin(j, t.cnt - 1)) * src.rows.stride;
  }
  static V shifted(const Source<R>& src, const S* raw, int64_t d) {
    return Convert<R, S>::vec(raw) + load(src.offset + d);
  }

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
        sq *= src.unit * src.unit;
      }
      t.set_norm(j, sq);
    }
  }

  // part[j][b] += <u_j, x_b> lane by lane, for queries b .. b + Q and features k .. end; J rows at a time.
  template <int Q>
  static void dots(const Source<R>& src, const Plan& pl, const Tile<R>& t, const R* x, int64_t b, int64_t k,
                   int64_t end, V* part, Prefetch& next, int64_t ahead) {
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
          MK_ROUND(v);  // keeps it in a register for J rows
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

  // acc[q][d ..] += sum_i w[i][q] u_(rows[i]) for a run of N vectors of features, in registers.
  template <int Q, int N>
  static void run(const Source<R>& src, const Plan& pl, const S* const* rows, int64_t count, const R* w,
                  R* acc, int64_t d, Prefetch& next, int64_t ahead) {
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
      for (int v = 0; v < N; v++) y[v] = shifted(src, raw + v * W, d + v * W);
#pragma GCC unroll 4
      for (int q = 0; q < Q; q++) {
        const V f = splat<R>(w[q]);
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) s[q][v] += y[v] * f;
      }
    }
    // The large sum is rounded once per tile, not once per row.
#pragma GCC unroll 4
    for (int q = 0; q < Q; q++)
#pragma GCC unroll 8
      for (int v = 0; v < N; v++) {
        R* a = acc + q * pl.Dp + d + v * W;
        store(a, load(a) + s[q][v]);
      }
  }
  template <int Q>
  static void accumulate(const Source<R>& src, const Plan& pl, const Tile<R>& t, const R* p, int64_t b,
                         R* acc, Prefetch& next) {
    enum { N = Q == 1 ? 8 : Q == 2 ? 4 : 3 };
    const S* rows[NT_GROUPED];  // those with any weight
    int64_t which[NT_GROUPED];
    R w[NT_GROUPED * Q];
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
    // With one query a line at a step is asked for, which leaves its rows room in L2.
    const int64_t ahead = pl.B == 1 ? 1 : next.lines_per_step((pl.B - b + 3) / 4 * count * (pl.D / (N * W)));
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

// Calls `call(Q)` for groups of Q = 1 to 4 queries, of even size, from b on.
#define MK_GROUPS(call)                                               \
  for (int64_t b = 0, groups = (B + 3) / 4, g = 0; g < groups; g++) { \
    const int64_t end = B * (g + 1) / groups;                         \
    switch (end - b) {                                                \
      case 1: call(1); break;                                         \
      case 2: call(2); break;                                         \
      case 3: call(3); break;                                         \
      default: call(4);                                               \
    }                                                                 \
    b = end;                                                          \
  }
#define MK_DOTS(Q) dots<Q>(src, pl, t, x, b, k, end_k, part, next, ahead)
#define MK_ACC(Q) accumulate<Q>(src, pl, t, p, b, acc, next)
  static void all_dots(const Source<R>& src, const Plan& pl, const Tile<R>& t, const R* x, int64_t, int64_t B,
                       R* p, Prefetch& next) {
    const int64_t full = pl.D / W * W;
    V part[(NT_GROUPED + 4) * DIRECT_B];
    double sum[NT_GROUPED * DIRECT_B];
    for (int64_t i = 0; i < t.cnt * pl.B; i++) sum[i] = 0;
    // One query waits for memory alone here, and what the processor's own prefetcher brings is enough.
    const int64_t ahead =
        B == 1 ? 0 : next.lines_per_step(2 * ((B + 3) / 4) * ((t.cnt + 2) / 3) * (full / (4 * W)));
    for (int64_t k0 = 0; k0 < full; k0 += DIRECT_SUM) {
      for (int64_t i = 0; i < (t.cnt + 4) * pl.B; i++) part[i] = V{};
      for (int64_t k = k0; k < imin(k0 + DIRECT_SUM, full); k += DIRECT_D) {
        const int64_t end_k = imin(imin(k + DIRECT_D, k0 + DIRECT_SUM), full);
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
  static void all_accumulate(const Source<R>& src, const Plan& pl, const Tile<R>& t, const R* p, int64_t,
                             int64_t B, R* acc, Prefetch& next) {
    MK_GROUPS(MK_ACC)
  }
#undef MK_GROUPS
#undef MK_DOTS
#undef MK_ACC
};

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
