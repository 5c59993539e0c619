// Rows in, products out, for many queries: the tile, and the two matrix products of the sweep.
//
// A tile is NT rows, less the offset and in compute type, in panels of NR features: y [Dp/NR][NT][NR]. One layout serves both
// products (and avoids that row strides of D floats map to one set of the L1 cache):
//   dots:        P [NT][Ps] = Y X'. Queries lie across the lanes, packed once per sweep in panels of them; a row's
//                feature is a broadcast.
//   accumulate:  ACC [Dp/NR][B][NR] += P' Y. Features lie across the lanes; a weight is a broadcast.
#pragma once
#include "cpu/core/vec-inl.h"

namespace memokern { namespace MEMOKERN_ISA_NS {

enum {
  MR = 6,        // rows or queries of a register block of MR x 2 vectors; 2 MR x 1 for a half panel
  KC = 256,      // depth of a block of the first product: a panel of queries stays in L1
  FEW = 6,       // up to so many queries, few-inl.h
  BLOCK = 512,   // and there, features of a block of the first product: its queries stay in L1
  DEEP = 2048,   // and there, features of a sum in one register
  UNIT = 2 * MR, // rows of a tile are a multiple of it
  MAX_NT = 252,  // and at most so many, where few queries at a time have logits, else
  SOME_NT = 132, // so many: all their logits stay in L1 and L2
  BLOCK_B = 256, // queries of a sweep
  MAX_BLOCKS = (BLOCK_B + MR - 1) / MR
};

// Rows as the kernels read them, in the units they are stored in: u = raw + offset[d], and the centred value is scale u.
// An addition is all that a row costs: queries are multiplied by the scale once, accumulators at the end.
template <class R> struct Source {
  Rows rows;
  const R* offset;       // [Dp] (shift - center) / scale, zero beyond d
  const double* center;  // [Dp]
  double pad;            // |shift - center| + |center|: what centring may add to the rounding of a row
};

template <class R, class S>
MK_INLINE void fetch(const Source<R>& src, int64_t n, int64_t d0, int64_t cnt, R* dst) {
  enum { W = Vec<R>::W };
  const S* raw = (const S*)src.rows.data + n * src.rows.stride + d0;
  const R* off = src.offset + d0;
  int64_t d = 0;
  for (; d + W <= cnt; d += W) store(dst + d, Convert<R, S>::vec(raw + d) + load(off + d));
  if (d < cnt) {
    S tail[W];
    R out[W];
    const S* from = raw + d;
    if ((src.rows.n - 1 - n) * src.rows.stride + src.rows.d - d0 - d < W) {  // nothing to read behind the last row
      memset((void*)tail, 0, sizeof tail);
      memcpy((void*)tail, from, (cnt - d) * sizeof(S));
      from = tail;
    }
    store(out, Convert<R, S>::vec(from) + load(off + d));
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
  int64_t B, Bp, D, Dp, NT;  // queries of a block, padded to whole vectors; features, padded to whole panels; rows of a tile
  int64_t Ps;                // stride of P: an odd number of cache lines, so that a column fits in L1
  int64_t depth;             // most additions that one term of a product goes through
  int64_t group;             // queries that go through a tile together, from products to sums: a column of P each
  bool few;
};

template <class R> struct Tile {
  int64_t n0, cnt;   // rows [n0, n0 + cnt)
  R* y;              // [Dp/NR][NT][NR]; what lies beyond cnt is not used
  R* sq;             // [NT] |yc|^2
  double sq_max, y_max;  // the largest |yc|^2, and |yc|
  void set_norm(int64_t j, double v) {
    sq[j] = (R)v;
    sq_max = dmax(sq_max, v);
  }
};

MK_INLINE int64_t size_of(int type) { return type == kF64 ? 8 : type == kF32 ? 4 : type == kU8 ? 1 : 2; }

// The next rows, asked for ahead of time while a tile is worked on: without it memory and arithmetic take turns. A few
// lines at a time: bursts, or lines left out, throw the processor's own prefetcher off.
struct Ahead {
  enum { STEP = 64 };
  const char *at, *row_end;
  int64_t rows, row_bytes, stride_bytes;
  void lines(int64_t n) __attribute__((always_inline)) {
    for (; n > 0 && rows > 0; n--) {
      __builtin_prefetch(at, 0, 2);
      at += STEP;
      if (at < row_end) continue;
      rows--;
      at = row_end + (stride_bytes - row_bytes);
      row_end += stride_bytes;
    }
  }
  int64_t per(int64_t steps) const {  // lines to ask for in each of so many steps
    steps = steps > 0 ? steps : 1;
    return (rows * ((row_bytes + STEP - 1) / STEP) + steps - 1) / steps;
  }
};
template <class R> static Ahead look_ahead(const Source<R>& src, int64_t n0, int64_t cnt) {
  const int64_t size = size_of(src.rows.type), row = src.rows.d * size, stride = src.rows.stride * size;
  const char* at = (const char*)src.rows.data + n0 * stride;
  const Ahead a = {at, at + row, cnt, row, stride};
  return a;
}

// J rows at a time: few streams to read, and whole lines to write.
template <class R, class S, bool NORMS>
static void pack_rows(const Source<R>& src, const Plan& pl, Tile<R>& t) {
  enum { W = Vec<R>::W, NR = 2 * W, J = 4 };
  typedef typename Vec<R>::T V;
  const int64_t full = pl.D / NR * NR;
  const double sq_unit = src.rows.scale * src.rows.scale;
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
          const V a = Convert<R, S>::vec(raw[j] + d) + o0, b = Convert<R, S>::vec(raw[j] + d + W) + o1;
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
template <class R, class S> static void pack_typed(const Source<R>& src, const Plan& pl, Tile<R>& t) {
  if (src.rows.sq_norms) pack_rows<R, S, false>(src, pl, t);
  else pack_rows<R, S, true>(src, pl, t);
}
// c[i][0 .. V W) (+)= sum_k a(i, k) b[k][0 .. V W): M x V vectors in registers, U of each to hide latency.
// a(i, k) = a[i * AI + k * a_k] within runs of `run`, which are a_next apart; rows of b are b_k apart.
template <class R, int M, int V, int U, int AI>
static void micro(const R* a, int64_t a_k, int64_t run, int64_t a_next, const R* b, int64_t b_k, int64_t K, R* c, int64_t c_i, bool add, Ahead& next, int64_t ahead) {
  enum { W = Vec<R>::W };
  typename Vec<R>::T r[U][M][V];
#pragma GCC unroll 4
  for (int u = 0; u < U; u++)
#pragma GCC unroll 12
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
#pragma GCC unroll 12
        for (int i = 0; i < M; i++)
#pragma GCC unroll 2
          for (int v = 0; v < V; v++) r[u][i][v] += splat<R>(ak[u * a_k + i * AI]) * load(b + u * b_k + v * W);
    }
    for (; U > 1 && left > 0; left--, ak += a_k, b += b_k)
#pragma GCC unroll 12
      for (int i = 0; i < M; i++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) r[0][i][v] += splat<R>(ak[i * AI]) * load(b + v * W);
  }
#pragma GCC unroll 12
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

// Where feature d of query b lies among the packed queries: [B][Dp] if few, else panels [Dp][NR], the last [Dp][W] if
// that holds the rest.
template <class R> MK_INLINE R* query_at(const Plan& pl, R* x, int64_t b, int64_t d) {
  enum { W = Vec<R>::W, NR = 2 * W };
  if (pl.few) return x + b * pl.Dp + d;
  const int64_t b0 = b / NR * NR, lanes = imin(NR, pl.Bp - b0);
  return x + b0 * pl.Dp + d * lanes + (b - b0);
}

// p[j][b - b0] = <yc_j, xc_b> for queries [b0, b0 + B), b0 a multiple of NR; p [NT][Ps], x holds scale xc. Half of the rows in `next`
// are asked for on the way, the rest by accumulate.
template <class R>
static void packed_dots(const Source<R>&, const Plan& pl, const Tile<R>& t, const R* x, int64_t b0, int64_t B, R* p, Ahead& next) {
  enum { W = Vec<R>::W, NR = 2 * W };
  const int64_t groups = (t.cnt + MR - 1) / MR, ahead = next.per(2 * (pl.Dp / NR) * ((B + NR - 1) / NR) * groups);
  p -= b0;
  for (int64_t k = 0; k < pl.Dp; k += KC)
    for (int64_t b = b0; b < b0 + B; b += NR) {
      const int64_t lanes = imin(NR, pl.Bp - b), K = imin(KC, pl.Dp - k);
      const R* xb = x + b * pl.Dp + k * lanes;
      const R* y = t.y + k * pl.NT;
      if (lanes == NR) {
        for (int64_t j = 0; j < t.cnt; j += MR) {
          micro<R, MR, 2, 1, NR>(y + j * NR, 1, NR, pl.NT * NR, xb, NR, K, p + j * pl.Ps + b, pl.Ps, k > 0, next, ahead);
        }
      } else {
        for (int64_t j = 0; j < t.cnt; j += UNIT) {
          micro<R, UNIT, 1, 1, NR>(y + j * NR, 1, NR, pl.NT * NR, xb, W, K, p + j * pl.Ps + b, pl.Ps, k > 0, next, 2 * ahead);
        }
      }
    }
}

// c[i][0 .. NR) += sum_k a[list[k]][i] y[list[k]][0 .. NR), over the rows that have weight in any of M queries.
template <class R, int M> static void micro_listed(const uint8_t* list, int64_t count, const R* a, int64_t a_k, const R* y, R* c) {
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

// acc[.][b][.] += sum_j p[j][b - b0] yc_j / scale, all queries [b0, b0 + B) against one panel of features after another, in even
// blocks. Where few rows have weight in a block, only these.
template <class R>
static void packed_accumulate(const Source<R>&, const Plan& pl, const Tile<R>& t, const R* p, int64_t b0, int64_t B, R* acc, Ahead& next) {
  enum { NR = 2 * Vec<R>::W };
  const int64_t blocks = (B + MR - 1) / MR, ahead = next.per(pl.Dp / NR * blocks);
  uint8_t list[MAX_BLOCKS][MAX_NT];
  int64_t listed[MAX_BLOCKS];
  for (int64_t k = 0; k < blocks; k++) {
    const int64_t first = B * k / blocks, end = B * (k + 1) / blocks;
    listed[k] = pl.D < KC ? t.cnt : 0;  // of so few features, to look would cost what it saves
    for (int64_t j = 0; listed[k] <= j && j < t.cnt; j++) {
      bool any = false;
      for (int64_t b = first; b < end; b++) any |= p[j * pl.Ps + b] != R(0);
      list[k][listed[k]] = (uint8_t)j;
      listed[k] += any;
    }
  }
  for (int64_t d = 0; d < pl.Dp; d += NR) {
    const R* y = t.y + d * pl.NT;
    for (int64_t k = 0; k < blocks; k++) {
      const int64_t b = B * k / blocks, m = B * (k + 1) / blocks - b;
      R* c = acc + d * pl.B + (b0 + b) * NR;
      switch (m) {
#define MK_CASE(M, U)                                                                                          \
  case M:                                                                                                      \
    if (4 * listed[k] < 3 * t.cnt) {                                                                           \
      next.lines(ahead);                                                                                       \
      micro_listed<R, M>(list[k], listed[k], p + b, pl.Ps, y, c);                                              \
    } else {                                                                                                   \
      micro<R, M, 2, U, 1>(p + b, pl.Ps, t.cnt, 0, y, NR, t.cnt, c, NR, true, next, ahead);                    \
    }                                                                                                          \
    break;
        MK_CASE(1, 4)
        MK_CASE(2, 2)
        MK_CASE(3, 2)
        MK_CASE(4, 1)
        MK_CASE(5, 1)
        MK_CASE(6, 1)
#undef MK_CASE
      }
    }
  }
}
// Where feature d of query b lies in acc, in runs of NR features: [B][Dp] if few, else [Dp/NR][B][NR].
template <class R> MK_INLINE R* acc_at(const Plan& pl, R* acc, int64_t b, int64_t d) {
  return pl.few ? acc + b * pl.Dp + d : acc + d * pl.B + b * (2 * Vec<R>::W);
}

} }  // namespace
