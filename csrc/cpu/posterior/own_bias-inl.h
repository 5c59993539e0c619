// The bias that a query has of its own: what its condition adds to each logit, and the row that it leaves
// out.
//
// A condition adds -(|c - c_n|^2 - |c - a|^2) / (2 h^2), at most 0; at h = 0 that is 0 for rows as near as a
// and -inf for the others. The squares are sums of squared differences in double, each operation rounded and
// in the same order wherever they are formed, so that equal conditions are ties to the bit, and the part of a
// row whose condition is a is 0 whatever h is.
//
// A sweep makes the biases of a tile for W queries at a time, just before it weighs the tile for these: K +
// 10 operations for each of them and each row, and nothing that is N x B.
#pragma once
#include "cpu/core/query-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

MK_INLINE bool has_own_bias(const Queries& in) { return in.conditions.rows || in.leave_out; }
MK_INLINE bool is_biased(const Queries& in) { return in.bias || has_own_bias(in); }

// |p - q|^2, as the vectors below form it.
static double condition_square(const double* p, const double* q, int64_t k) {
  double sum = 0;
  for (int64_t i = 0; i < k; i++) {
    double e = p[i] - q[i];
    e *= e;
    MK_ROUND(e);
    sum += e;
  }
  return sum;
}
MK_INLINE double anchor_square(const Conditions& c, int64_t b) {
  return condition_square(c.c + b * c.k, c.a + b * c.k, c.k);
}

// 1 / h, or 0 at h = 0. Below 1e-300 the smallest square that is not 0 is as good as infinite.
MK_INLINE double condition_factor(double h) { return h > 0 ? 1 / dmax(h, 1e-300) : 0; }

// What the condition of query b adds to row n, where base is its anchor_square.
static double condition_part(const Conditions& c, int64_t b, double base, int64_t n) {
  const double over = dmax(condition_square(c.c + b * c.k, c.rows + n * c.k, c.k) - base, 0), h = c.h[b];
  const double f = condition_factor(h);
  return f > 0 ? -0.5 * (over * f) * f : over > 0 ? -kInf : 0;
}

// All biases of query b [n], with those that the queries share.
static void own_column(const Queries& in, int64_t b, int64_t n, double* out) {
  const Conditions& c = in.conditions;
  const double base = c.rows ? anchor_square(c, b) : 0;
  for (int64_t i = 0; i < n; i++)
    out[i] = (c.rows ? condition_part(c, b, base, i) : 0) + (in.bias ? in.bias[i] : 0);
  if (in.leave_out && in.leave_out[b] >= 0 && in.leave_out[b] < n) out[in.leave_out[b]] = -kInf;
}

// The sums of which the gradient for c of query b is made, for rows n .. n + count: to [2][k] gets those of
// g (c_n - a), where g is the gradient for the query's bias for a row, and of w (c_n - a). Without w it is
// [k].
MK_INLINE void add_condition_gradients(const Conditions& c, int64_t b, int64_t n, int count, const double* g,
                                       const double* w, double* to) {
  const double *rows = c.rows + n * c.k, *a = c.a + b * c.k;
  for (int64_t i = 0; i < c.k; i++) {
    double of_g = 0, of_w = 0;
    for (int r = 0; r < count; r++) {
      const double e = rows[r * c.k + i] - a[i];
      of_g += g[r] * e;
      if (w) of_w += w[r] * e;
    }
    to[i] += of_g;
    if (w) to[c.k + i] += of_w;
  }
}
// of_c: those sums; of_h: the sum of g times the condition's part of the bias. Each g is too large by drift
// w. At h = 0, and where 1 / h^2 is as good as infinite, nothing moves.
static void finish_condition_gradient(const Conditions& c, int64_t b, const double* of_c, double of_h,
                                      double drift, double lost, const Gradients& out) {
  const double h = c.h[b];
  const bool moves = 1 / h / h < kInf;
  for (int64_t i = 0; i < c.k; i++) {
    const double of_b = of_c[i] - (drift != 0 ? drift * of_c[c.k + i] : 0);
    out.condition[b * c.k + i] = lost + (moves ? of_b / h / h : 0);
  }
  out.bandwidth[b] = lost + (moves ? -2 * of_h / h : 0);
}

// The biases of a tile for W queries, and what they are made of.
template <class R>
struct OwnBias {
  enum { W = Vec<R>::W, V = Vec<double>::W, VECTORS = W / V, ROWS = 4 };
  typedef Vec<double>::T T;
  const Queries* in = nullptr;                // null where no query has a bias of its own
  double* c = nullptr;                        // [Bp / W][k][W] the conditions, queries across the lanes
  double *base = nullptr, *factor = nullptr;  // [Bp] |c - a|^2 and condition_factor(h)
  int64_t* left_out = nullptr;                // [Bp]
  double *part = nullptr, *exact = nullptr;   // [NT][W] what the conditions add, and all of it
  R *rounded = nullptr, *finite = nullptr;    // [NT][W] the same as R, and with 0 for -inf

  static int64_t bytes(const Plan& pl, const Queries& q) {
    if (!has_own_bias(q)) return 0;
    return Arena::bytes<double>(pl.Bp * q.conditions.k) + 2 * Arena::bytes<double>(pl.Bp) +
           Arena::bytes<int64_t>(pl.Bp) + 2 * Arena::bytes<double>(pl.NT * W) +
           2 * Arena::bytes<R>(pl.NT * W);
  }
  void take(const Plan& pl, const Queries& q, Arena& arena) {
    if (!has_own_bias(q)) return;
    in = &q;
    c = arena.take<double>(pl.Bp * q.conditions.k);
    base = arena.take<double>(pl.Bp);
    factor = arena.take<double>(pl.Bp);
    left_out = arena.take<int64_t>(pl.Bp);
    part = arena.take<double>(pl.NT * W);
    exact = arena.take<double>(pl.NT * W);
    rounded = arena.take<R>(pl.NT * W);
    finite = arena.take<R>(pl.NT * W);
  }
  // Query b of the block, which is query `at` of the call.
  void set(int64_t b, int64_t at) {
    const Conditions& from = in->conditions;
    const int64_t k = from.k;
    for (int64_t i = 0; i < k; i++) c[(b / W * k + i) * W + b % W] = from.c[at * k + i];
    base[b] = k ? anchor_square(from, at) : 0;
    factor[b] = k ? condition_factor(from.h[at]) : 1;
    left_out[b] = in->leave_out ? in->leave_out[at] : -1;
  }
  // The biases of the tile for the queries b .. b + W of the block, b a multiple of W.
  void make(int64_t b, const Tile<R>& tile) {
    for (int64_t j = 0; j < tile.cnt; j += ROWS) {
      T b_j[ROWS][VECTORS];
      conditions_of(b, tile.n0, tile.cnt, j, b_j);
      for (int64_t r = 0; r < imin(ROWS, tile.cnt - j); r++) {
        const double shared = in->bias ? in->bias[tile.n0 + j + r] : 0;
        for (int v = 0; v < VECTORS; v++) {
          store(part + (j + r) * W + v * V, b_j[r][v]);
          store(exact + (j + r) * W + v * V, b_j[r][v] + shared);
        }
      }
    }
    for (int e = 0; e < W && in->leave_out; e++) {
      const int64_t j = left_out[b + e] - tile.n0;
      if (left_out[b + e] >= 0 && j >= 0 && j < tile.cnt) exact[j * W + e] = -kInf;
    }
  }
  // The same for rows n0 .. n0 + cnt, at most NT, as R alone: they go to `rounded`.
  void make_rounded(int64_t b, int64_t n0, int64_t cnt) {
    typedef typename RawVec<double, R, V>::T Out;
    for (int64_t j = 0; j < cnt; j += ROWS) {
      T b_j[ROWS][VECTORS];
      conditions_of(b, n0, cnt, j, b_j);
      for (int64_t r = 0; r < imin(ROWS, cnt - j); r++) {
        const double shared = in->bias ? in->bias[n0 + j + r] : 0;
        for (int v = 0; v < VECTORS; v++) {
          const T sum = b_j[r][v] + shared;
          *(Out*)(rounded + (j + r) * W + v * V) = __builtin_convertvector(sum, Out);
        }
      }
    }
    for (int e = 0; e < W && in->leave_out; e++) {
      const int64_t j = left_out[b + e] - n0;
      if (left_out[b + e] >= 0 && j >= 0 && j < cnt) rounded[j * W + e] = (R)-kInf;
    }
  }
  // Of query q, in lane q.lane, whose log sum of e^t is `known` at least: takes out the rows that have no
  // weight whatever their distance is, so that the largest bias left, q.b_max, has something to do with the
  // logits that matter, and with it the error of t.
  void cut(Query<R>& q, const Tile<R>& tile, double known) {
    const double nothing = sizeof(R) == 4 ? 110 : 800, y = tile.y_max;
    const double pull = __builtin_fabs(q.a1) * __builtin_sqrt(q.xx) * y;  // |t| but for |yc|^2 and the bias
    const double err = q.e0 + q.e1 * y + q.e2 * y * y;
    double* column = exact + q.lane;
    double top = -kInf;
    for (int64_t j = 0; j < tile.cnt; j++) top = dmax(top, column[j * W]);
    double lowest = dmax(known, top * q.inv_t - pull - q.a2 * y * y - err) - pull - err - nothing;
    lowest = lowest * q.temperature;
    if (!(lowest > -kInf)) lowest = -kInf;  // also where nothing is known
    double largest = 0;
    for (int64_t j = 0; j < tile.cnt; j++) {
      double& v = column[j * W];
      if (v < lowest) v = -kInf;
      if (v > -kInf) largest = dmax(largest, __builtin_fabs(v));
    }
    q.b_max = largest;
  }
  void round(int64_t cnt) {
    for (int64_t i = 0; i < cnt * W; i++) {
      const double v = exact[i];
      rounded[i] = (R)v;
      finite[i] = v == -kInf ? R(0) : (R)v;
    }
  }

 private:
  // What the conditions add to ROWS rows; those beyond the tile are its last one again.
  void conditions_of(int64_t b, int64_t n0, int64_t cnt, int64_t j, T (*out)[VECTORS]) {
    const int64_t k = in->conditions.k;
    const double *mine = c + b * k, *row[ROWS];
    T sum[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++) {
      row[r] = in->conditions.rows + (n0 + imin(j + r, cnt - 1)) * k;
      for (int v = 0; v < VECTORS; v++) sum[r][v] = T{};
    }
    for (int64_t i = 0; i < k; i++, mine += W)
      for (int v = 0; v < VECTORS; v++) {
        const T at = load(mine + v * V);
        for (int r = 0; r < ROWS; r++) {
          T e = at - splat(row[r][i]);
          e *= e;
          MK_ROUND(e);
          sum[r][v] += e;
        }
      }
    for (int v = 0; v < VECTORS; v++) {
      const T f = load(factor + b + v * V), from = load(base + b + v * V), zero = {};
      for (int r = 0; r < ROWS; r++) {
        const T over = vmax(sum[r][v] - from, zero), part = -0.5 * (over * f) * f;
        out[r][v] = f > zero ? part : over > zero ? zero - kInf : zero;
      }
    }
  }
};

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
