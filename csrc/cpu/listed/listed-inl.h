// The posterior over a list of rows for each query. Every logit comes from direct differences in double, so
// that exact hits are exact and ties stay ties.
//
// A query's list is cut into pieces where there are fewer queries than the threads could share evenly. Each
// piece has a State and an accumulator, which merge() joins. A piece goes over its rows twice: for their
// logits, then to add up those that have weight.
#pragma once
#include "cpu/core/watch-inl.h"
#include "cpu/posterior/finish-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

enum {
  PIECE_ROWS = 64,  // of a piece, at least
  SUM_ROWS = 4,     // rows that are added to the accumulator at a time,
  SUM_D = 512,      // and features: these rows stay in L1 as double
  LOOK_ROWS = 64    // that are evaluated between two looks at the watch
};

struct Piece {
  int64_t b, i0, i1;  // rows index[i0] .. index[i1 - 1] of query b
  bool alone;         // the query has no other piece
  State st;
  // [D] sum of e^(v - m) y, or of e^(v - m) (alpha y - x) where `close`; in the backward pass of q y. It is
  // its thread's own where the piece is alone.
  double* sum;
  // Whether all rows of weight are so near to x that nothing is lost of y in x plus a difference; of a
  // difference much would be lost in y.
  bool close;
};

// The rows as they are, without a centre, in double: so are the queries, which changes nothing, and one
// instance of the code serves float and double.
struct ListedRows {
  Source<double> src;
  Exact<double>::F exact;
  Values<double>::F values;
  explicit ListedRows(const Rows& rows) {
    memset((void*)&src, 0, sizeof src);
    src.rows = rows;
    exact = exact_for(src);
    values = values_for(src);
  }
};

// Query b in double: the caller's numbers, or these converted into own [D].
static const double* query_in_double(const Queries& in, int64_t b, int64_t D, double* own) {
  if (in.f64) return (const double*)in.x + b * D;
  const float* x = (const float*)in.x + b * D;
  for (int64_t d = 0; d < D; d++) own[d] = x[d];
  return own;
}
static void write_number(void* out, bool f64, int64_t i, double v) {
  if (f64)
    ((double*)out)[i] = v;
  else
    ((float*)out)[i] = (float)v;
}

// sum += sum_i w_i y_i over the rows n whose |w_i| is more than `least`, or, given x, w_i (alpha y_i - x).
// sum has room for whole vectors. Returns kDone or kStopped.
static int add_rows(const ListedRows& p, const int64_t* n, const double* w, int64_t count, double least,
                    double* sum, Pace& pace, const double* x = nullptr, double alpha = 1) {
  enum { W = Vec<double>::W };
  double buffer[SUM_ROWS * SUM_D];
  int64_t i = 0;
  while (i < count) {
    const double* from[SUM_ROWS];
    double a[SUM_ROWS];
    int64_t rows[SUM_ROWS];
    int m = 0;
    for (; i < count && m < SUM_ROWS; i++) {
      if (!(__builtin_fabs(w[i]) > least)) continue;
      rows[m] = n[i];
      a[m++] = w[i];
    }
    if (m == 0) break;
    if (pace.stopped(SUM_ROWS * p.src.rows.d)) return kStopped;
    for (int e = m; e < SUM_ROWS; e++) a[e] = 0;
    for (int64_t d0 = 0; d0 < p.src.rows.d; d0 += SUM_D) {
      const int64_t cnt = imin(SUM_D, p.src.rows.d - d0);
      for (int e = 0; e < SUM_ROWS; e++) {
        from[e] = buffer + imin(e, m - 1) * SUM_D;
        if (e >= m) continue;
        double* y = buffer + e * SUM_D;
        p.values(p.src, rows[e], d0, cnt, y);
        int64_t d = 0;
        for (; x && d + W <= cnt; d += W) {
          Vec<double>::T v = alpha * load(y + d);
          MK_ROUND(v);  // x may have been computed so
          store(y + d, v - load(x + d0 + d));
        }
        for (; x && d < cnt; d++) {
          double v = alpha * y[d];
          MK_ROUND(v);
          y[d] = v - x[d0 + d];
        }
      }
      if (m == 1) {
        for (int64_t d = 0; d < cnt; d += W)
          store(sum + d0 + d, load(sum + d0 + d) + splat(a[0]) * load(from[0] + d));
        continue;
      }
      for (int64_t d = 0; d < cnt; d += W) {
        const Vec<double>::T first = splat(a[0]) * load(from[0] + d) + splat(a[1]) * load(from[1] + d);
        const Vec<double>::T second = splat(a[2]) * load(from[2] + d) + splat(a[3]) * load(from[3] + d);
        store(sum + d0 + d, load(sum + d0 + d) + first + second);
      }
    }
  }
  return kDone;
}

// What is known of query b over its list. Its mode is kZeroSigma where sigma is 0, or as good as.
static Query<double> listed_query(const Queries& in, const double* x, int64_t b, int64_t D) {
  Query<double> q;
  memset((void*)&q, 0, sizeof q);
  q.x = x;
  q.d = (double)D;
  q.alpha = in.alpha[b];
  q.sigma = in.sigma[b];
  q.temperature = in.temperature[b];
  q.inv_t = 1 / q.temperature;
  enum { W = Vec<double>::W };
  Vec<double>::T sum = {};
  int64_t d = 0;
  for (; d + W <= D; d += W) sum += load(x + d) * load(x + d);
  double xx = hsum<double>(sum);
  for (; d < D; d++) xx += x[d] * x[d];
  q.xx = xx;
  if (!(xx < kInf) || !(q.sigma >= 0) || !(q.inv_t > 0) || !(q.inv_t < kInf))
    q.mode = kNotFinite;
  else
    q.mode = q.inv_t / q.sigma / q.sigma * (xx + 1) < Precision<double>::big ? kSoftmax : kZeroSigma;
  return q;
}

// t [count] receives the squared distances of the rows n. Returns kDone or kStopped.
static int distances(const ListedRows& p, const Query<double>& q, const int64_t* n, int64_t count, double* t,
                     Pace& pace) {
  for (int64_t i0 = 0; i0 < count; i0 += LOOK_ROWS) {
    const int64_t i1 = imin(count, i0 + LOOK_ROWS);
    if (pace.stopped((i1 - i0) * p.src.rows.d)) return kStopped;
    for (int64_t i = i0; i < i1; i++) t[i] = p.exact(p.src, n[i], q.x, q.alpha);
  }
  return kDone;
}

// A state of which nothing is known, and no state that it is merged with either.
static State lost_state() {
  const double nan = __builtin_nan("");
  const State lost = {-kInf, nan, nan, nan, nan, nan};
  return lost;
}

// The state of the `count` rows n of a piece. t holds their squared distances, and becomes their weights.
static State weigh_listed(const Query<double>& q, const double* bias, const int64_t* n, double* t,
                          int64_t count) {
  State st = empty_state();
  double least = kInf;  // relative to the nearest row, since a bias is lost beside a large distance
  bool lost = false;    // a row is NaN
  for (int64_t i = 0; i < count; i++) {
    if (bias && bias[n[i]] == -kInf) continue;
    lost |= t[i] != t[i];
    least = dmin(least, t[i]);
  }
  if (lost) return lost_state();
  const bool zero_sigma = q.mode == kZeroSigma;
  const double key = zero_sigma ? least : 0;
  double m = -kInf;
  for (int64_t i = 0; i < count; i++) {
    const double b = bias ? bias[n[i]] : 0;
    if (zero_sigma)
      t[i] = t[i] == key ? b * q.inv_t : -kInf;
    else
      t[i] = (b - 0.5 * ((t[i] - least) / q.sigma) / q.sigma) * q.inv_t;
    m = dmax(m, t[i]);
  }
  if (!(m > -kInf)) return st;
  st.key = key;
  st.m = zero_sigma ? m : m - 0.5 * (least / q.sigma) / q.sigma * q.inv_t;
  for (int64_t i = 0; i < count; i++) {
    const double d = t[i] - m, w = __builtin_exp(d);
    t[i] = w;
    if (w == 0) continue;
    st.s += w;
    st.s_v += w * d;
    st.s_sq += w * w;
    if (bias) st.s_bias += w * bias[n[i]];
  }
  return st;
}

// Whether the lists are lists: offsets that begin at 0 and do not fall, and rows that exist.
static bool valid(const RowLists& list, int64_t B, int64_t N) {
  if (list.start[0] != 0 || list.start[B] != list.count) return false;
  for (int64_t b = 0; b < B; b++)
    if (list.start[b + 1] < list.start[b]) return false;
  bool good = true;
  for (int64_t i = 0; i < list.count; i++) good &= (uint64_t)list.index[i] < (uint64_t)N;
  return good;
}

// Cuts all lists into pieces and returns how many: each query has at least one, and no thread is left with
// much more than its share. Without `pieces` it only counts them.
static int64_t cut_lists(const RowLists& list, int64_t B, int threads, Piece* pieces) {
  const int64_t size = imax(PIECE_ROWS, list.start[B] / (4 * threads) + 1);
  int64_t k = 0;
  for (int64_t b = 0; b < B; b++) {
    const int64_t count = list.start[b + 1] - list.start[b];
    const int64_t n = threads == 1 ? 1 : imax(1, (count + size - 1) / size);
    for (int64_t i = 0; i < n; i++, k++) {
      if (!pieces) continue;
      pieces[k].b = b;
      pieces[k].alone = n == 1;
      pieces[k].i0 = list.start[b] + count * i / n;
      pieces[k].i1 = list.start[b] + count * (i + 1) / n;
    }
  }
  return k;
}

// Gives the pieces that are to be joined an accumulator each, from `sums`, and returns how many there are.
// Where only the number is wanted, Dp may be 0.
static int64_t place_sums(Piece* pieces, int64_t count, int64_t Dp, double* sums) {
  int64_t k = 0;
  for (int64_t i = 0; i < count; i++) {
    if (pieces[i].alone) continue;
    pieces[i].sum = sums + k * Dp;
    k += 1;
  }
  return k;
}

// |x - alpha y| of all rows of weight is at most `reach`. |alpha y| is then at least a quarter of it.
// Not where |x|^2 is below the normal numbers: alpha y may have few digits there, and no division by alpha
// gives the others back.
static bool is_close(const Query<double>& q, double reach) {
  return q.alpha != 0 && q.xx >= 0x1p-1022 && reach <= 0.8 * __builtin_sqrt(q.xx);
}

// Makes a piece's sum one of y.
static void of_values(const Query<double>& q, Piece& c, int64_t D) {
  if (c.close && c.st.s > 0)
    for (int64_t d = 0; d < D; d++) c.sum[d] = (c.sum[d] + c.st.s * q.x[d]) / q.alpha;
  c.close = false;
}

// Mean and residual of a query whose rows have weight.
template <class R>
static void listed_vectors(const Query<double>& q, const Piece& c, int64_t D, const Sums& out) {
  enum { W = Vec<double>::W };
  typedef Vec<double>::T V;
  typedef R Narrow __attribute__((vector_size(W * sizeof(R)), aligned(sizeof(R)), may_alias));
  R* mean = out.mean ? (R*)out.mean + c.b * D : nullptr;
  R* residual = out.residual ? (R*)out.residual + c.b * D : nullptr;
  const double s = c.st.s, alpha = q.alpha;
  const bool whole = s == 1, plain = alpha == 1, close = c.close;  // a division by 1 takes as long as any
  const auto vectors = [&](V sum, V x, V& m, V& r) {
    const V v = whole ? sum : sum / s;
    m = !close ? v : plain ? v + x : (v + x) / alpha;
    r = close ? v : alpha * v - x;
  };
  int64_t d = 0;
  V m, r;
  for (; d + W <= D; d += W) {
    vectors(load(c.sum + d), load(q.x + d), m, r);
    if (mean) *(Narrow*)(mean + d) = __builtin_convertvector(m, Narrow);
    if (residual) *(Narrow*)(residual + d) = __builtin_convertvector(r, Narrow);
  }
  if (d == D) return;
  double sum[W] = {}, x[W] = {};
  memcpy((void*)sum, c.sum + d, (D - d) * sizeof(double));
  memcpy((void*)x, q.x + d, (D - d) * sizeof(double));
  vectors(load(sum), load(x), m, r);
  for (int64_t i = 0; d + i < D; i++) {
    if (mean) mean[d + i] = (R)m[i];
    if (residual) residual[d + i] = (R)r[i];
  }
}

static void listed_finish(const Query<double>& q, const Piece& c, int64_t D, const Sums& out, bool f64) {
  const bool none = q.mode == kNotFinite || !(c.st.s > 0);
  write_stats(q, c.st, c.b, out);
  if (none) {
    for (int64_t d = 0; d < D; d++) {
      if (out.mean) write_number(out.mean, f64, c.b * D + d, __builtin_nan(""));
      if (out.residual) write_number(out.residual, f64, c.b * D + d, __builtin_nan(""));
    }
  } else if (f64) {
    listed_vectors<double>(q, c, D, out);
  } else {
    listed_vectors<float>(q, c, D, out);
  }
}

// What each thread has for its pieces.
struct ListedWork {
  double *sum, *x;  // [D], with room for whole vectors: a sum, a query in double
  Pace pace;
  Arena arena;
  bool reserve(const Queries& in, int64_t D) {
    const int64_t Dp = round_up(D, 64);
    if (!arena.reserve(2 * Arena::bytes<double>(Dp))) return false;
    sum = arena.take<double>(Dp);
    x = arena.take_raw<double>(Dp);
    pace = {in.watch, 0};
    return true;
  }
};

static int run_posterior_listed(const Rows& rows, const Queries& in, const RowLists& list, const Sums& out,
                                int threads) {
  if (in.b == 0) return kDone;
  if (!valid(list, in.b, rows.n)) return kNotLists;
  const ListedRows p(rows);
  Arena arena, joined;
  const int64_t D = rows.d, Dp = round_up(D, 64), count = cut_lists(list, in.b, threads, nullptr);
  if (!arena.reserve(Arena::bytes<Piece>(count) + 2 * Arena::bytes<double>(list.count))) return kNoMemory;
  Piece* pieces = arena.take<Piece>(count);
  double *t = arena.take<double>(list.count), *r2 = arena.take<double>(list.count);
  cut_lists(list, in.b, threads, pieces);
  const int64_t joins = place_sums(pieces, count, 0, nullptr);
  if (!joined.reserve(Arena::bytes<double>(joins * Dp) + Arena::bytes<double>(Dp))) return kNoMemory;
  place_sums(pieces, count, Dp, joined.take<double>(joins * Dp));
  double* wide = joined.take<double>(Dp);
  const int workers = (int)imax(1, imin(threads, count));
  WorkSpaces<ListedWork> own(workers);
  if (!own.reserve(in, D)) return kNoMemory;
  const int failed = for_parts(workers, count, [&](int64_t k, int worker) {
    ListedWork& w = own.items[worker];
    Piece& c = pieces[k];
    if (c.alone) {
      c.sum = w.sum;
      memset((void*)w.sum, 0, D * sizeof(double));
    }
    c.st = empty_state();
    const Query<double> q = listed_query(in, query_in_double(in, c.b, D, w.x), c.b, D);
    const int64_t* n = list.index + c.i0;
    int status = kDone;
    if (q.mode != kNotFinite) {
      status |= distances(p, q, n, c.i1 - c.i0, r2 + c.i0, w.pace);
      memcpy(t + c.i0, r2 + c.i0, (c.i1 - c.i0) * sizeof(double));
      c.st = weigh_listed(q, in.bias, n, t + c.i0, c.i1 - c.i0);
    }
    double reach = 0;
    for (int64_t i = c.i0; c.st.s > 0 && i < c.i1; i++)
      if (t[i] > 0) reach = dmax(reach, r2[i]);
    c.close = c.st.s > 0 && is_close(q, __builtin_sqrt(reach));
    // All weights that are left out, together, are below 2^-60 of the largest.
    if (c.st.s > 0 && !status)
      status |= add_rows(p, n, t + c.i0, c.i1 - c.i0, 8e-19 / (c.i1 - c.i0), c.sum, w.pace,
                         c.close ? q.x : nullptr, q.alpha);
    if (c.alone && !status) listed_finish(q, c, D, out, in.f64);
    return status;
  });
  for (int64_t k = 0; k < count && !failed;) {
    Piece& a = pieces[k++];
    if (a.alone) continue;
    const Query<double> q = listed_query(in, query_in_double(in, a.b, D, wide), a.b, D);
    bool all = true;
    for (int64_t i = k - 1; i < count && pieces[i].b == a.b; i++)
      all &= pieces[i].close || !(pieces[i].st.s > 0);
    for (int64_t i = k - 1; !all && i < count && pieces[i].b == a.b; i++) of_values(q, pieces[i], D);
    a.close = all;
    for (; k < count && pieces[k].b == a.b; k++) {
      double fa, fb;
      merge(a.st, pieces[k].st, fa, fb);
      for (int64_t d = 0; d < D; d++)
        a.sum[d] = (fa == 0 ? 0 : fa * a.sum[d]) + (fb == 0 ? 0 : fb * pieces[k].sum[d]);
    }
    listed_finish(q, a, D, out, in.f64);
  }
  return failed;
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
