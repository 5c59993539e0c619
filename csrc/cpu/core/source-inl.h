// The training rows as the kernels read them.
//
// A row's values are those of Value (convert-inl.h). Where every row is evaluated by itself, by direct
// differences, these are used as they are. A sweep keeps rows as u = raw + offset, in the units they are
// stored in, so that a row costs one addition per feature; the centred value is y - center = unit * u.
// Queries are multiplied by the unit once per sweep, accumulators at its end. For uint8 rows that differs
// from the values by their rounding to float. Of other rows with a scale or a shift, whose raw numbers may be
// large where the values are small, u is the value less the centre, at three operations per feature.
#pragma once
#include "cpu/core/convert-inl.h"
#include "cpu/core/memory-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

template <class R>
struct Source {
  Rows rows;
  bool valued;           // u is the value less the centre, else raw + offset
  double unit;           // of u: 1 or the scale
  const R* offset;       // [Dp] (shift - center) / unit, or -center where valued; zero beyond d
  const double* center;  // [Dp]
  const double* zero;    // [Dp] the value that u = 0 stands for: the centre, less what rounds the offset
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

// A vector of features of a row, as u.
template <class R, class S>
MK_INLINE typename Vec<R>::T centred(const Source<R>& src, const S* raw, const R* off) {
  return (src.valued ? ValueIn<R, S>::vec(raw, src.rows.scale, src.rows.shift) : Convert<R, S>::vec(raw)) +
         load(off);
}
// Writes the features d0 .. d0 + cnt of row n to dst, as u.
template <class R, class S>
MK_INLINE void fetch(const Source<R>& src, int64_t n, int64_t d0, int64_t cnt, R* dst) {
  enum { W = Vec<R>::W };
  const S* raw = (const S*)src.rows.data + n * src.rows.stride + d0;
  const R* off = src.offset + d0;
  int64_t d = 0;
  for (; d + W <= cnt; d += W) store(dst + d, centred(src, raw + d, off + d));
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
    store(out, centred(src, from, off + d));
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
  Vec<double>::T y = Value<S>::vec(raw, scale, shift) * alpha;
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

// sum += w (alpha y - x) for row n: its part of a residual, from the same differences.
template <class R, class S>
static void add_difference_typed(const Source<R>& src, int64_t n, const R* x, double alpha, double w,
                                 R* sum) {
  enum { W = Vec<double>::W };
  typedef typename RawVec<double, R, W>::T Narrow;
  const S* raw = (const S*)src.rows.data + n * src.rows.stride;
  const double scale = src.rows.scale, shift = src.rows.shift;
  int64_t d = 0;
  for (; d + W <= src.rows.d; d += W) {
    const Vec<double>::T e = difference(x + d, raw + d, alpha, scale, shift) * w;
    *(Narrow*)(sum + d) -= __builtin_convertvector(e, Narrow);
  }
  if (d == src.rows.d) return;
  S tail[W];
  R xt[W];
  memset((void*)tail, 0, sizeof tail);
  memset((void*)xt, 0, sizeof xt);
  memcpy((void*)tail, raw + d, (src.rows.d - d) * sizeof(S));
  memcpy((void*)xt, x + d, (src.rows.d - d) * sizeof(R));
  const Vec<double>::T e = difference(xt, tail, alpha, scale, shift) * w;
  for (int64_t i = 0; d + i < src.rows.d; i++) sum[d + i] -= (R)e[i];
}
template <class R>
struct AddDifference {
  typedef void (*F)(const Source<R>&, int64_t, const R*, double, double, R*);
};
template <class R>
static typename AddDifference<R>::F add_difference_for(const Source<R>& src) {
  MK_BY_TYPE(R, add_difference_typed)
}

// Writes the values of the features d0 .. d0 + cnt of row n to dst in double, not centred.
template <class R, class S>
static void values_typed(const Source<R>& src, int64_t n, int64_t d0, int64_t cnt, double* dst) {
  enum { W = Vec<double>::W };
  const S* raw = (const S*)src.rows.data + n * src.rows.stride + d0;
  const double scale = src.rows.scale, shift = src.rows.shift;
  int64_t d = 0;
  for (; d + W <= cnt; d += W) store(dst + d, Value<S>::vec(raw + d, scale, shift));
  if (d == cnt) return;
  S tail[W];
  memset((void*)tail, 0, sizeof tail);
  memcpy((void*)tail, raw + d, (cnt - d) * sizeof(S));
  const Vec<double>::T v = Value<S>::vec(tail, scale, shift);
  for (int64_t i = 0; d + i < cnt; i++) dst[d + i] = v[i];
}
template <class R>
struct Values {
  typedef void (*F)(const Source<R>&, int64_t, int64_t, int64_t, double*);
};
template <class R>
static typename Values<R>::F values_for(const Source<R>& src) {
  MK_BY_TYPE(R, values_typed)
}

// The rows with their centre: the caller's, or one from a few of the rows that can have weight, which centres
// well enough. It is the mean of the middle quarter of their values, feature by feature, so that rows far
// from all others do not move it.
template <class R>
struct CentredRows {
  enum { SAMPLE = 16, W = Vec<R>::W };
  Source<R> src;
  Arena arena;
  // by_values: whether u may be the value less the centre where that is sharper.
  bool prepare(const Rows& rows, const double* bias = nullptr, bool by_values = true) {
    const int64_t Dp = round_up(rows.d, 64);
    if (!arena.reserve(Arena::bytes<R>(Dp) + 2 * Arena::bytes<double>(Dp))) return false;
    R* offset = arena.take<R>(Dp);
    double *center = arena.take<double>(Dp), *zero = arena.take<double>(Dp);
    src.rows = rows;
    src.offset = offset;
    src.center = center;
    src.zero = zero;
    const bool plain = rows.scale == 1 && rows.shift == 0;
    // In float, the values of such rows are off by less than 2^-14 of the scale.
    const bool mild =
        sizeof(R) == 4 && rows.type == kU8 && __builtin_fabs(rows.shift) <= 257 * __builtin_fabs(rows.scale);
    src.valued = by_values && !plain && !mild;
    src.unit = src.valued ? 1 : rows.scale;
    if (rows.center) {
      memcpy(center, rows.center, rows.d * sizeof(double));
    } else {
      src.rows.sq_norms = nullptr;  // they belong to another centre
      if (!choose_center(bias, center)) return false;
    }
    double off = 0, mid = 0;
    for (int64_t d = 0; d < rows.d; d++) {
      const double o = rows.shift - center[d];
      offset[d] = src.valued ? (R)-center[d] : (R)(o / rows.scale);
      zero[d] = src.valued ? -(double)offset[d] : rows.shift - (double)offset[d] * rows.scale;
      off += o * o;
      mid += center[d] * center[d];
    }
    src.center_norms = __builtin_sqrt(off) + __builtin_sqrt(mid);
    return true;
  }

 private:
  bool choose_center(const double* bias, double* center) {
    const int64_t N = src.rows.n, D = src.rows.d, Dp = round_up(D, 64), some = imin(N, (int64_t)SAMPLE);
    Arena sampled;
    if (!sampled.reserve(Arena::bytes<double>(some * Dp))) return false;
    double* row = sampled.take<double>(some * Dp);
    int64_t count = 0;
    for (int64_t i = 0; i < some; i++) {
      int64_t n = N * i / some;
      while (bias && n < N * (i + 1) / some && bias[n] == -kInf) n++;
      if (n < N * (i + 1) / some) values_for(src)(src, n, 0, D, row + count++ * Dp);
    }
    if (count == 0) values_for(src)(src, 0, 0, D, row + count++ * Dp);
    enum { V = Vec<double>::W };
    const int64_t cut = 3 * count / 8;
    for (int64_t d = 0; d < Dp; d += V) {
      for (int64_t i = 1; i < count; i++)
        for (int64_t j = i; j > 0; j--) {
          const Vec<double>::T a = load(row + (j - 1) * Dp + d), b = load(row + j * Dp + d);
          store(row + (j - 1) * Dp + d, vmin(a, b));
          store(row + j * Dp + d, vmax(a, b));
        }
      Vec<double>::T sum = {};
      for (int64_t i = cut; i < count - cut; i++) sum += load(row + i * Dp + d) / (double)(count - 2 * cut);
      for (int64_t i = 0; i < V && d + i < D; i++) center[d + i] = (R)sum[i];
    }
    return true;
  }
};

// The largest |bias| of a row that counts.
[[maybe_unused]] static double largest_bias(const double* bias, int64_t n) {
  double m = 0;
  if (bias)
    for (int64_t i = 0; i < n; i++)
      if (bias[i] != -kInf) m = dmax(m, __builtin_fabs(bias[i]));
  return m;
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
