// Rows in, products out: the two matrix products of the sweep, and the packing that feeds them.
//
// A tile is NT rows, centred and in compute type. Two engines hold it in two ways:
//   packed (many queries): y1 [NT/NR][D][NR] feeds the first product (queries x rows, a column panel at a time),
//                          y2 [D/NR][NT][NR] the second (queries x features). Row strides of D floats would
//                          map to one set of the L1 cache; the panels are contiguous.
//   plain (few queries):   y2 [NT][Ds], one pass over the memory of the rows, both products along D.
#pragma once
#include "vec-inl.h"

namespace memokern { namespace MEMOKERN_ISA_NS {

enum { MR = 6, KC = 256 };  // queries of a register block; depth of a block of the first product (L1)

// Rows as the kernels read them: centred value = raw * scale + offset[d].
template <class R> struct Source {
  Rows rows;
  R scale;
  const R* offset;       // [Dp] shift - center, zero beyond d
  const double* center;  // [Dp]
  double pad;            // |offset| + |center|: what centring may add to the rounding of a row
};

template <class R, class S>
MK_INLINE void fetch(const Source<R>& src, int64_t n, int64_t d0, int64_t cnt, R* dst) {
  enum { W = Vec<R>::W };
  const S* raw = (const S*)src.rows.data + n * src.rows.stride + d0;
  const R* off = src.offset + d0;
  int64_t d = 0;
  for (; d + W <= cnt; d += W) store(dst + d, Convert<R, S>::vec(raw + d) * src.scale + load(off + d));
  if (d < cnt) {
    S tail[W];
    R out[W];
    memset((void*)tail, 0, sizeof tail);
    memcpy((void*)tail, raw + d, (cnt - d) * sizeof(S));
    store(out, Convert<R, S>::vec(tail) * src.scale + load(off + d));
    for (int i = 0; i < W; i++) dst[d + i] = i < cnt - d ? out[i] : R(0);
  }
}

// |x - alpha y_n|^2 by direct differences in double, from the values as they were given (not centred), each operation
// rounded as in plain arithmetic: a query that was computed as alpha * y_n is at distance exactly 0.
template <class R, class S>
MK_INLINE Vec<double>::T difference(const R* x, const S* raw, double alpha, double scale, double shift) {
  Vec<double>::T y = Convert<double, S>::vec(raw) * scale;
  MK_ROUND(y);
  y = (y + shift) * alpha;
  MK_ROUND(y);
  return Convert<double, R>::vec(x) - y;
}
template <class R, class S>
static double exact_typed(const Source<R>& src, int64_t n, const R* x, double alpha) {
  enum { W = Vec<double>::W };
  typedef Vec<double>::T V;
  const S* raw = (const S*)src.rows.data + n * src.rows.stride;
  const int64_t D = src.rows.d;
  const double scale = src.rows.scale, shift = src.rows.shift;
  V s0 = {}, s1 = {};
  int64_t d = 0;
  for (; d + 2 * W <= D; d += 2 * W) {
    const V e0 = difference(x + d, raw + d, alpha, scale, shift), e1 = difference(x + d + W, raw + d + W, alpha, scale, shift);
    s0 += e0 * e0;
    s1 += e1 * e1;
  }
  double s = hsum<double>(s0 + s1);
  for (; d < D; d += W) {
    const int64_t left = imin(W, D - d);
    S tail[W];
    R xt[W];
    memset((void*)tail, 0, sizeof tail);
    memset((void*)xt, 0, sizeof xt);
    memcpy((void*)tail, raw + d, left * sizeof(S));
    memcpy((void*)xt, x + d, left * sizeof(R));
    V e = difference(xt, tail, alpha, scale, shift);
    e *= e;
    MK_ROUND(e);
    for (int i = 0; i < left; i++) s += e[i];
  }
  return s;
}

#define MK_BY_TYPE(R, call)                                             \
  switch (src.rows.type) {                                              \
    case kF32: return call<R, float>;                                   \
    case kBF16: return call<R, BF16>;                                   \
    case kF16: return call<R, F16>;                                     \
    case kU8: return call<R, uint8_t>;                                  \
    default: return call<R, double>;                                    \
  }
template <class R> struct Exact { typedef double (*F)(const Source<R>&, int64_t, const R*, double); };
template <class R> static typename Exact<R>::F exact_for(const Source<R>& src) { MK_BY_TYPE(R, exact_typed) }
template <class R, class S> static void fetch_typed(const Source<R>& src, int64_t n, int64_t d0, int64_t cnt, R* dst) { fetch<R, S>(src, n, d0, cnt, dst); }
// The row as it was given, not centred, in double.
template <class R, class S> static void values_typed(const Source<R>& src, int64_t n, double* dst) {
  enum { W = Vec<double>::W };
  const S* raw = (const S*)src.rows.data + n * src.rows.stride;
  const double scale = src.rows.scale, shift = src.rows.shift;
  int64_t d = 0;
  for (; d + W <= src.rows.d; d += W) store(dst + d, Convert<double, S>::vec(raw + d) * scale + shift);
  if (d == src.rows.d) return;
  S tail[W];
  memset((void*)tail, 0, sizeof tail);
  memcpy((void*)tail, raw + d, (src.rows.d - d) * sizeof(S));
  const Vec<double>::T v = Convert<double, S>::vec(tail) * scale + shift;
  for (int64_t i = 0; d + i < src.rows.d; i++) dst[d + i] = v[i];
}
template <class R> struct Values { typedef void (*F)(const Source<R>&, int64_t, double*); };
template <class R> static typename Values<R>::F values_for(const Source<R>& src) { MK_BY_TYPE(R, values_typed) }
template <class R> struct Fetch { typedef void (*F)(const Source<R>&, int64_t, int64_t, int64_t, R*); };
template <class R> static typename Fetch<R>::F fetch_for(const Source<R>& src) { MK_BY_TYPE(R, fetch_typed) }

// The shapes one sweep works with.
struct Plan {
  bool packed;
  int64_t B, D, Dp, Ds, NT;  // queries of a block; features padded, and their stride in row-major buffers
  int64_t depth;             // most additions that one term of a product goes through
};

template <class R> struct Tile {
  int64_t n0, cnt;   // rows [n0, n0 + cnt)
  R* y1;             // packed: [NT/NR][D][NR]
  R* y2;             // packed: [Dp/NR][NT][NR]; plain: [NT][Ds]
  R* sq;             // [NT] |yc|^2, zero beyond cnt
  double sq_max;
};

// One panel of NR rows: convert, centre, norms, both layouts.
template <class R, class S>
static void pack_typed(const Source<R>& src, const Plan& pl, Tile<R>& t) {
  enum { W = Vec<R>::W, NR = 2 * W };
  typedef typename Vec<R>::T V;
  const bool need_norms = src.rows.sq_norms == nullptr;
  double sq[NR];
  t.sq_max = 0;
  for (int64_t j0 = 0; j0 < pl.NT; j0 += NR) {
    for (int j = 0; j < NR; j++) sq[j] = 0;
    if (j0 < t.cnt) {
      if (!pl.packed) {
        for (int j = 0; j < NR && j0 + j < pl.NT; j++) {
          R* row = t.y2 + (j0 + j) * pl.Ds;
          if (j0 + j >= t.cnt) { memset((void*)row, 0, pl.Dp * sizeof(R)); continue; }
          fetch<R, S>(src, t.n0 + j0 + j, 0, pl.D, row);
          if (need_norms) {
            for (int64_t d = 0; d < pl.D; d += KC) {
              V s = {};
              for (int64_t e = d; e < imin(d + KC, pl.D); e += W) s += load(row + e) * load(row + e);
              sq[j] += hsum<R>(s);
            }
          }
        }
      } else {
        R* y1 = t.y1 + j0 * pl.D;
        R* y2 = t.y2 + j0 * NR;
        for (int64_t d = 0; d < pl.D; d += W) {
          const int64_t cnt = imin(W, pl.D - d);
          R* q2 = y2 + (d / NR) * pl.NT * NR + d % NR;
#pragma GCC unroll 2
          for (int h = 0; h < NR; h += W) {
            V r[W];
            if (cnt == W && j0 + h + W <= t.cnt) {
#pragma GCC unroll 16
              for (int j = 0; j < W; j++) {
                const S* raw = (const S*)src.rows.data + (t.n0 + j0 + h + j) * src.rows.stride + d;
                r[j] = Convert<R, S>::vec(raw) * src.scale + load(src.offset + d);
              }
            } else {
              for (int j = 0; j < W; j++) {
                R tmp[W];
                memset((void*)tmp, 0, sizeof tmp);
                if (j0 + h + j < t.cnt) fetch<R, S>(src, t.n0 + j0 + h + j, d, cnt, tmp);
                r[j] = load(tmp);
              }
            }
#pragma GCC unroll 16
            for (int j = 0; j < W; j++) store(q2 + (h + j) * NR, r[j]);
            transpose<R>(r);
            R* q1 = y1 + d * NR + h;
            if (cnt == W) {
#pragma GCC unroll 16
              for (int k = 0; k < W; k++) store(q1 + k * NR, r[k]);
            } else {
              for (int k = 0; k < cnt; k++) store(q1 + k * NR, r[k]);
            }
          }
        }
        if (need_norms) {
          for (int64_t d = 0; d < pl.D; d += KC) {
            V s0 = {}, s1 = {};
            for (int64_t e = d; e < imin(d + KC, pl.D); e++) {
              V a = load(y1 + e * NR), b = load(y1 + e * NR + W);
              s0 += a * a;
              s1 += b * b;
            }
            for (int j = 0; j < W; j++) {
              sq[j] += s0[j];
              sq[W + j] += s1[j];
            }
          }
        }
      }
    }
    for (int j = 0; j < NR && j0 + j < pl.NT; j++) {
      double v = sq[j];
      if (!need_norms) v = j0 + j < t.cnt ? src.rows.sq_norms[t.n0 + j0 + j] : 0;
      t.sq[j0 + j] = (R)v;
      t.sq_max = dmax(t.sq_max, v);
    }
  }
}
template <class R> struct Pack { typedef void (*F)(const Source<R>&, const Plan&, Tile<R>&); };
template <class R> static typename Pack<R>::F pack_for(const Source<R>& src) { MK_BY_TYPE(R, pack_typed) }

// c[i][0..NR) (+)= sum_k a[i * as_i + k] * b[k * NR ..]: M x NR accumulators in registers.
template <class R, int M>
static void micro(const R* a, int64_t as_i, const R* b, int64_t K, R* c, int64_t ldc, bool add) {
  enum { W = Vec<R>::W, NR = 2 * W };
  typedef typename Vec<R>::T V;
  V r0[M], r1[M];
#pragma GCC unroll 6
  for (int i = 0; i < M; i++) r0[i] = r1[i] = V{};
  for (int64_t k = 0; k < K; k++) {
    V b0 = load(b), b1 = load(b + W);
    b += NR;
#pragma GCC unroll 6
    for (int i = 0; i < M; i++) {
      V x = splat<R>(a[i * as_i + k]);
      r0[i] += x * b0;
      r1[i] += x * b1;
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < M; i++) {
    R* q = c + i * ldc;
    if (add) {
      r0[i] += load(q);
      r1[i] += load(q + W);
    }
    store(q, r0[i]);
    store(q + W, r1[i]);
  }
}
// All queries against one panel, in even blocks of at most MR.
template <class R>
MK_INLINE void panel(const R* a, int64_t as_i, const R* b, int64_t K, R* c, int64_t ldc, int64_t B, bool add) {
  const int64_t blocks = (B + MR - 1) / MR;
  for (int64_t p = 0; p < blocks; p++) {
    const int64_t i0 = B * p / blocks, m = B * (p + 1) / blocks - i0;
    const R* ap = a + i0 * as_i;
    R* cp = c + i0 * ldc;
    switch (m) {
      case 1: micro<R, 1>(ap, as_i, b, K, cp, ldc, add); break;
      case 2: micro<R, 2>(ap, as_i, b, K, cp, ldc, add); break;
      case 3: micro<R, 3>(ap, as_i, b, K, cp, ldc, add); break;
      case 4: micro<R, 4>(ap, as_i, b, K, cp, ldc, add); break;
      case 5: micro<R, 5>(ap, as_i, b, K, cp, ldc, add); break;
      default: micro<R, 6>(ap, as_i, b, K, cp, ldc, add); break;
    }
  }
}

// Q queries against one row, both row-major: one load of the row for all of them.
template <class R, int Q>
static void dots_row(const R* x, int64_t Ds, const R* y, int64_t Dp, R* p, int64_t ldp) {
  enum { W = Vec<R>::W, U = 8 / Q };
  typedef typename Vec<R>::T V;
  V s[Q][U];
  for (int q = 0; q < Q; q++)
    for (int u = 0; u < U; u++) s[q][u] = V{};
  int64_t d = 0;
  for (; d + U * W <= Dp; d += U * W) {
#pragma GCC unroll 8
    for (int u = 0; u < U; u++) {
      V b = load(y + d + u * W);
#pragma GCC unroll 4
      for (int q = 0; q < Q; q++) s[q][u] += load(x + q * Ds + d + u * W) * b;
    }
  }
  for (; d < Dp; d += W)
    for (int q = 0; q < Q; q++) s[q][0] += load(x + q * Ds + d) * load(y + d);
  for (int q = 0; q < Q; q++) {
    for (int u = 1; u < U; u++) s[q][0] += s[q][u];
    p[q * ldp] = (R)hsum<R>(s[q][0]);
  }
}

// p[b][j] = <xc_b, yc_j>, p [B][NT], xc [B][Ds]
template <class R>
static void dots(const Plan& pl, const Tile<R>& t, const R* xc, int64_t B, R* p) {
  enum { NR = 2 * Vec<R>::W };
  if (pl.packed) {
    const int64_t used = round_up(t.cnt, NR);
    for (int64_t k = 0; k < pl.D; k += KC)
      for (int64_t j = 0; j < used; j += NR)
        panel<R>(xc + k, pl.Ds, t.y1 + j * pl.D + k * NR, imin(KC, pl.D - k), p + j, pl.NT, B, k > 0);
    return;
  }
  for (int64_t j = 0; j < t.cnt; j++) {
    const R* y = t.y2 + j * pl.Ds;
    int64_t b = 0;
    for (; b + 4 <= B; b += 4) dots_row<R, 4>(xc + b * pl.Ds, pl.Ds, y, pl.Dp, p + b * pl.NT + j, pl.NT);
    for (; b + 2 <= B; b += 2) dots_row<R, 2>(xc + b * pl.Ds, pl.Ds, y, pl.Dp, p + b * pl.NT + j, pl.NT);
    for (; b < B; b++) dots_row<R, 1>(xc + b * pl.Ds, pl.Ds, y, pl.Dp, p + b * pl.NT + j, pl.NT);
  }
}

// acc[b][:] += sum_j p[b][j] yc_j; acc is [Dp/NR][B][NR] (packed) or [B][Ds] (plain)
template <class R>
static void accumulate(const Plan& pl, const Tile<R>& t, const R* p, int64_t B, R* acc) {
  enum { W = Vec<R>::W, NR = 2 * W, J = 8 };
  typedef typename Vec<R>::T V;
  if (pl.packed) {
    for (int64_t d = 0; d < pl.Dp; d += NR)
      panel<R>(p, pl.NT, t.y2 + d * pl.NT, t.cnt, acc + d * pl.B, NR, B, true);
    return;
  }
  for (int64_t j0 = 0; j0 < pl.NT; j0 += J) {  // rows beyond cnt are zero
    for (int64_t b = 0; b < B; b++) {
      V w[J];
      R any = 0;
      for (int j = 0; j < J; j++) {
        R a = p[b * pl.NT + j0 + j];
        w[j] = splat<R>(a);
        any = a != R(0) ? R(1) : any;
      }
      if (any == R(0)) continue;
      const R* y = t.y2 + j0 * pl.Ds;
      R* a = acc + b * pl.Ds;
      for (int64_t d = 0; d < pl.Dp; d += W) {
        V s = load(a + d), s1 = load(y + d) * w[0];
#pragma GCC unroll 8
        for (int j = 1; j < J; j += 2) s += load(y + j * pl.Ds + d) * w[j];
#pragma GCC unroll 8
        for (int j = 2; j < J; j += 2) s1 += load(y + j * pl.Ds + d) * w[j];
        store(a + d, s + s1);
      }
    }
  }
}
// Where feature d of query b lies in acc, in runs of NR features.
template <class R> MK_INLINE R* acc_at(const Plan& pl, R* acc, int64_t b, int64_t d) {
  enum { NR = 2 * Vec<R>::W };
  return pl.packed ? acc + d * pl.B + b * NR : acc + b * pl.Ds + d;
}

} }  // namespace
