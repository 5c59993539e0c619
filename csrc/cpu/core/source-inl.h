// The training rows as the kernels read them.
//
// Kernels keep rows in the units they are stored in, u = raw + offset, so that a row costs one addition per
// feature; the centred value is y - center = scale * u. Queries are multiplied by the scale once per sweep,
// accumulators at its end.
#pragma once
#include "cpu/core/convert-inl.h"
#include "cpu/core/memory-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

template <class R>
struct Source {
  Rows rows;
  const R* offset;       // [Dp] (shift - center) / scale, zero beyond d
  const double* center;  // [Dp]
  double center_norms;   // |shift - center| + |center|, whose rounding comes on top of that of a centred row
};

MK_INLINE int64_t size_of(int type) { return type == kF64 ? 8 : type == kF32 ? 4 : type == kU8 ? 1 : 2; }

// The type of the rows is looked up once per sweep. Each function below has an instance for each type, and a
// function `..._for(src)` returns the right one.
#define MK_BY_TYPE(R, call)            \
  switch (src.rows.type) {             \
    case kF32: return call<R, float>;  \
    case kBF16: return call<R, BF16>;  \
    case kF16: return call<R, F16>;    \
    case kU8: return call<R, uint8_t>; \
    default: return call<R, double>;   \
  }

// Writes the features d0 .. d0 + cnt of row n to dst, as raw + offset.
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
    // A whole vector is read in place, unless that would read behind the last row.
    if ((src.rows.n - 1 - n) * src.rows.stride + src.rows.d - d0 - d < W) {
      memset((void*)tail, 0, sizeof tail);
      memcpy((void*)tail, from, (cnt - d) * sizeof(S));
      from = tail;
    }
    store(out, Convert<R, S>::vec(from) + load(off + d));
    for (int i = 0; i < W; i++) dst[d + i] = i < cnt - d ? out[i] : R(0);
  }
}
template <class R, class S>
static void fetch_typed(const Source<R>& src, int64_t n, int64_t d0, int64_t cnt, R* dst) {
  fetch<R, S>(src, n, d0, cnt, dst);
}
template <class R>
struct Fetch {
  typedef void (*F)(const Source<R>&, int64_t, int64_t, int64_t, R*);
};
template <class R>
static typename Fetch<R>::F fetch_for(const Source<R>& src) {
  MK_BY_TYPE(R, fetch_typed)
}

// |x - alpha y_n|^2 by direct differences in double. The values are those that were given, not centred ones,
// and each operation is rounded as in plain arithmetic: a query that was computed as alpha * y_n is at
// distance exactly 0.
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
    const V e0 = difference(x + d, raw + d, alpha, scale, shift);
    const V e1 = difference(x + d + W, raw + d + W, alpha, scale, shift);
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
template <class R>
struct Exact {
  typedef double (*F)(const Source<R>&, int64_t, const R*, double);
};
template <class R>
static typename Exact<R>::F exact_for(const Source<R>& src) {
  MK_BY_TYPE(R, exact_typed)
}

// Writes the values of row n to dst in double, as they were given and not centred.
template <class R, class S>
static void values_typed(const Source<R>& src, int64_t n, double* dst) {
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
template <class R>
struct Values {
  typedef void (*F)(const Source<R>&, int64_t, double*);
};
template <class R>
static typename Values<R>::F values_for(const Source<R>& src) {
  MK_BY_TYPE(R, values_typed)
}

// The rows with their centre: the caller's, or the mean of at most 64 rows, which centres well enough.
template <class R>
struct CentredRows {
  Source<R> src;
  Arena arena;
  bool prepare(const Rows& rows) {
    const int64_t Dp = round_up(rows.d, 64);
    if (!arena.reserve(Arena::bytes<R>(Dp) * 2 + Arena::bytes<double>(Dp))) return false;
    R* offset = arena.take<R>(Dp);
    R* row = arena.take<R>(Dp);
    double* center = arena.take<double>(Dp);
    src.rows = rows;
    src.offset = offset;
    src.center = center;
    if (rows.center) {
      memcpy(center, rows.center, rows.d * sizeof(double));
    } else {
      src.rows.sq_norms = nullptr;  // they belong to another centre
      const typename Fetch<R>::F fetch_row = fetch_for(src);
      const int64_t some = imin(rows.n, 64);
      for (int64_t i = 0; i < some; i++) {
        fetch_row(src, rows.n * i / some, 0, rows.d, row);
        for (int64_t d = 0; d < rows.d; d++) center[d] += row[d];
      }
      for (int64_t d = 0; d < rows.d; d++) center[d] = (R)(center[d] / some * rows.scale + rows.shift);
    }
    double off = 0, mid = 0;
    for (int64_t d = 0; d < rows.d; d++) {
      const double o = rows.shift - center[d];
      offset[d] = (R)(o / rows.scale);
      off += o * o;
      mid += center[d] * center[d];
    }
    src.center_norms = __builtin_sqrt(off) + __builtin_sqrt(mid);
    return true;
  }
};

// The largest |bias| of a row that counts.
static double largest_bias(const double* bias, int64_t n) {
  double m = 0;
  if (bias)
    for (int64_t i = 0; i < n; i++)
      if (bias[i] != -kInf) m = dmax(m, __builtin_fabs(bias[i]));
  return m;
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
