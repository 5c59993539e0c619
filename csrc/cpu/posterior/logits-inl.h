// The approximate logits of a tile, and which of them must be evaluated exactly.
//
// A logit is handled as t (query-inl.h), whose error is error_of(). Every row whose weight that error could
// change by more than theta is evaluated again by direct differences in double. The m of a state is the full
// l / T, so that exact logits lose nothing to the part that t leaves out. Queries lie side by side in P
// [NT][Ps], W to a vector.
//
// What is evaluated so is near, as a rule, and its difference alpha y - x small beside alpha (y - center).
// The accumulator would round it away. So these rows stay out of it: their weighted differences are added up
// in Near, from which residual and mean get back what they need (finish-inl.h).
#pragma once
#include "cpu/core/exp-inl.h"
#include "cpu/core/products-inl.h"
#include "cpu/posterior/own_bias-inl.h"
#include "memokern/state.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

// Of one query, the rows that are left out of its accumulator.
template <class R>
struct Near {
  R* sum;    // [Dp] the sum of w (alpha y - x)
  double s;  // the sum of w; where it is 0, `sum` is not set
};
// What a change of m makes of it.
template <class R>
MK_INLINE void rescale(Near<R>& near, double f, int64_t D) {
  if (near.s == 0 || f == 1) return;
  near.s *= f;
  for (int64_t d = 0; f != 0 && d < D; d++) near.sum[d] *= (R)f;
}

// A tile, and what its weighing needs to know and to write on.
template <class R>
struct TileContext {
  const Source<R>* src;
  typename Exact<R>::F exact;
  typename AddDifference<R>::F add_difference;
  const Tile<R>* tile;
  int64_t NT, D, Ps;
  const double* bias;      // [N] or null
  const double* own_bias;  // [NT][W] the biases of the W queries that are weighed, or null: they share them
  const R* tile_bias;      // [NT] the bias of the tile's rows; of own ones [NT][W]; or null
  const R* finite_bias;    // the same with 0 for -inf
  double b_max;            // the largest |bias| that is not infinite
  R least;  // where t - m is below it, e^(t - m) may be 0: at it, all N rows together would move the sum,
            // which is at least 1, by less than a tenth of theta
  int* exact_row;       // [W][NT] rows that are evaluated exactly,
  double* exact_value;  // [W][NT] their logits (at sigma = 0 first their squared distances)
  bool* exact_near;     // [W][NT] whether they are kept in Near
  // Where a tile holds integers:
  PairQueries<R>* pairs;
  const Plan* pl;
  int64_t* refined;  // how many products were refined
  R* columns;        // [W][NT] the products of a query, side by side
};

// The error of t for a row of norm y, where that of its product is e0 + e1 y. It is infinite where a product
// could overflow: then every row is evaluated exactly.
template <class R>
MK_INLINE double error_with(double e0, double e1, const Query<R>& q, const TileContext<R>& s, double y) {
  const double y2 = y * y, err = e0 + e1 * y + q.e2 * y2 + q.e3 * (s.own_bias ? q.b_max : s.b_max);
  return q.xx < Precision<R>::safe && y2 < Precision<R>::safe && err < Precision<R>::big ? err : kInf;
}
template <class R>
MK_INLINE double error_in_pairs(const Query<R>& q, const TileContext<R>& s, double y) {
  return error_with(q.e0 + q.i0, q.e1 + q.i1, q, s, y);
}
// That of no row in the tile is larger.
template <class R>
MK_INLINE double error_of(const Query<R>& q, const TileContext<R>& s) {
  const double y = s.tile->y_max;
  return s.tile->in_pairs ? error_in_pairs(q, s, y) : error_with(q.e0, q.e1, q, s, y);
}
// Weighting "log": the error of r^2.
template <class R>
MK_INLINE double error_of_r2(const Query<R>& q, const TileContext<R>& s) {
  return 2 * error_of(q, s) + 4e-6 * Precision<R>::u * q.xx;
}
// At sigma = 0: a row whose t = (|xc|^2 - r^2) / 2 is computed to be below this is surely farther away than
// r^2 = key.
template <class R>
MK_INLINE double nearness(const Query<R>& q, double key, double err) {
  return 0.5 * (q.xx - key) - err - (key < kInf ? (q.d + 16) * 1.2e-16 * key : 0);
}
template <class R>
MK_INLINE double bias_of(const Query<R>& q, const TileContext<R>& s, int64_t j) {
  if (s.own_bias) return s.own_bias[j * Vec<R>::W + q.lane];
  return s.bias ? s.bias[s.tile->n0 + j] : 0;
}
template <class R>
MK_INLINE double exact_r2(const Query<R>& q, const TileContext<R>& s, int64_t j) {
  return s.exact(*s.src, s.tile->n0 + j, q.x, q.alpha);
}
// Whether a row that was evaluated exactly is kept in Near: not where x is so far off that the mean would
// lose by it, which is then x plus a difference, over alpha. There the accumulator loses the residual
// nothing, but for the rounding of raw + offset, which a row at the center has too: it matters where x is
// nearer than some 2^17 times that.
template <class R>
MK_INLINE bool is_near(const Query<R>& q, const TileContext<R>& s, int64_t j, double r2) {
  const double c = s.src->unit == 1 ? 0 : s.src->center_norms * 0x1p-7;
  const double sq = s.tile->sq[j] + c * c / s.D;  // infinite where a float cannot hold it
  return (sq < Precision<R>::safe && r2 < 16 * q.alpha * q.alpha * sq) || (r2 == 0 && q.alpha != 0);
}
// At most ln x, and at least ln x - 0.06, for a normal x > 0 and without a call: log2 of (1 + f) 2^k is at
// least k + f.
MK_INLINE double log_below(double x) {
  int64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return ((double)bits * 0x1p-52 - 1023.001) * 0.6931471805599453;
}
// A row whose t is computed to be at most this may stay as it is, where `lower` is a lower bound of log sum
// e^t.
template <class R>
MK_INLINE double threshold(double lower, double err) {
  return lower + log_below(Precision<R>::theta / dmin(1, err)) - err;
}

// What a squared distance adds to l / T.
template <class R>
MK_INLINE double pull_of_distance(const Query<R>& q, double r2) {
  return -0.5 * (r2 / q.sigma) / q.sigma * q.inv_t;
}
// Lets l / T, and so m, count from that of a row at the squared distance r2.
template <class R>
static void count_from(Query<R>& q, State& st, double r2) {
  const double step = pull_of_distance(q, r2 - q.from);
  st.m -= step;
  q.shared += step;
  q.from = r2;
}
// Beyond it a bias would be rounded away beside l / T.
static const double kFar = 1e9;

// What the bias of row j adds to t.
template <class R>
MK_INLINE R pull_of_bias(const Query<R>& q, const TileContext<R>& s, int64_t j) {
  if (!s.tile_bias || q.mode == kZeroSigma) return R(0);
  return s.tile_bias[s.own_bias ? j * Vec<R>::W + q.lane : j] * (R)q.inv_t;
}
// Makes t, but for the bias, of the products of one query with the rows; p may be dot. Returns the largest t.
// The bias stays apart because it may be far larger than what the distances leave of t where sigma is large:
// with it, that would be rounded away.
template <class R>
MK_INLINE R logits(const Query<R>& q, const TileContext<R>& s, const R* dot, R* p) {
  const R a1 = (R)q.a1, a2 = (R)q.a2, inv_t = (R)q.inv_t, *sq = s.tile->sq;
  const R* b = q.mode != kZeroSigma ? s.tile_bias : nullptr;
  const int64_t cnt = s.tile->cnt;
  R best = (R)-kInf;
  const int64_t step = s.own_bias ? Vec<R>::W : 1, lane = s.own_bias ? q.lane : 0;
  for (int64_t j = 0; j < cnt; j++) {
    const R t = dot[j] * a1 - sq[j] * a2, whole = b ? t + b[j * step + lane] * inv_t : t;
    p[j] = t;
    best = whole > best ? whole : best;
  }
  return best;
}

// W queries side by side, as the lanes see them: t = a1 dot - a2 |yc|^2 + inv_t b; m is the largest t so far,
// top the largest of the tile without its bias.
template <class R>
struct QueryGroup {
  typename Vec<R>::T a1, a2, inv_t, m, top;
};
template <class R>
MK_INLINE void set_lane(QueryGroup<R>& g, int e, const Query<R>& q) {
  g.a1[e] = (R)q.a1;
  g.a2[e] = (R)q.a2;
  g.inv_t[e] = (R)q.inv_t;
}
// The same for W queries. It reads copies of its arguments' fields, because as far as the compiler knows the
// store of a vector may change anything.
template <class R>
MK_INLINE typename Vec<R>::T logits(QueryGroup<R>& g, const TileContext<R>& s, R* p) {
  typedef typename Vec<R>::T V;
  const V a1 = g.a1, a2 = g.a2, inv_t = g.inv_t;
  const R *sq = s.tile->sq, *b = s.tile_bias;
  const int64_t cnt = s.tile->cnt, Ps = s.Ps;
  const bool own = s.own_bias;
  V top = splat<R>((R)-kInf), best = top;
  for (int64_t j = 0; j < cnt; j++, p += Ps) {
    const V t = load(p) * a1 - splat<R>(sq[j]) * a2;
    store(p, t);
    top = vmax(t, top);
    if (b) best = vmax(t + (own ? load(b + j * Vec<R>::W) : splat<R>(b[j])) * inv_t, best);
  }
  g.top = top;
  return b ? best : top;
}

// At least log sum e^t of a query: from its state, from the largest t of the tile, and from what the tile's
// rows have together, e^(t - top).
template <class R>
MK_INLINE double least_sum(const Query<R>& q, const State& st, double top, double err, double together) {
  const double known = st.s > 0 ? st.m + q.shared : -kInf;
  return dmax(known + (st.s > 1e-300 ? log_below(st.s) : 0), top - err + log_below(together));
}
// At least how far the rows of a tile are, of which `top` is the largest t without its bias.
template <class R>
MK_INLINE double least_distance(const Query<R>& q, double top, double err) {
  const double r2 = q.xx - 2 * (top + err) * q.sigma * q.sigma * q.temperature;
  return r2 > 0 ? __builtin_sqrt(r2) : 0;
}
// The share of the sum, as a logarithm, above which a row is not left as the product in integers has it, on
// top of what threshold() asks for. Unlike roundings of rows, that product's error is alike for rows that are
// alike, and adds up: of rows whose weights together are a share g, it moves a feature of the mean by up to g
// times the error and the range of the feature. Allowed is half of the contract (csrc/README.md), and all
// rows may be left. `top` is that of least_distance().
template <class R>
MK_INLINE double most_alike(const Query<R>& q, const TileContext<R>& s, double top) {
  const double y = s.tile->y_max, a = __builtin_fabs(q.alpha);
  const double moved = (q.i0 + q.i1 * y) * 255 * __builtin_fabs(s.src->unit);
  const double r = least_distance(q, top, error_in_pairs(q, s, y)) + q.sigma * __builtin_sqrt(q.temperature);
  const double allowed = 5e-6 * dmin(s.tile->whole.largest, r / a);
  return moved <= allowed ? kInf : log_below(allowed / moved / (double)s.src->rows.n);
}
// Above which t a row is evaluated again, exactly or, in a tile of integers, by a sharper product first:
// `lower` is a lower bound of log sum e^t, `alike` what most_alike() says, or infinite.
template <class R>
MK_INLINE double inexact_above(double lower, double err, double alike) {
  return dmin(threshold<R>(lower, err), lower + alike - err);
}
template <class R>
MK_INLINE double alike_of(const Query<R>& q, const TileContext<R>& s, double top) {
  return s.tile->in_pairs ? most_alike(q, s, top) : kInf;
}
// Whether there is any such row in a tile, whose largest t is `top`, and without its bias `apart`. 1 is the
// least that a tile has together.
template <class R>
MK_INLINE bool has_inexact(const Query<R>& q, const TileContext<R>& s, const State& st, double top,
                           double apart, double err, double together) {
  return err > Precision<R>::theta &&
         (err == kInf ||
          top > inexact_above<R>(least_sum(q, st, top, err, together), err, alike_of(q, s, apart)));
}

// Takes the rows that must be evaluated exactly out of a column of t without the bias, whose numbers lie
// `stride` apart; the largest t is `top`. Their logits go to `value`. m is raised to the largest logit that
// is left, exact or not. Returns how many rows were taken. Where these are far for the noise, logits count
// from the nearest of them from here on, so that equal rows differ by their biases, however far they are.
template <class R>
static int take_inexact(Query<R>& q, const TileContext<R>& s, State& st, R* p, int64_t stride, double top,
                        double top_apart, double err, double together, int* row, double* value, bool* near,
                        double& m) {
  const bool all = err == kInf;
  const double lower = least_sum(q, st, top, err, together), alike = alike_of(q, s, top_apart);
  const double any = inexact_above<R>(lower, err, alike);
  double rest = -kInf, least = kInf;
  int count = 0;
  for (int64_t j = 0; j < s.tile->cnt; j++) {
    R& apart = p[j * stride];
    const double b = bias_of(q, s, j);
    double t = apart + pull_of_bias(q, s, j), lo = any;
    // The errors are those of the tile and not of the row: rows at the same distance must be taken alike, or
    // ties would be broken.
    if (s.pl->pairs && q.r1 < kInf && !all && t > any) {
      const double dot = s.pairs->refined(*s.src, *s.pl, *s.tile, q, q.index, j);
      apart = (R)(q.a1 * dot - q.a2 * s.tile->sq[j]);
      t = apart + pull_of_bias(q, s, j);
      lo = threshold<R>(lower, error_with(q.e0, q.r1, q, s, s.tile->y_max));
      ++*s.refined;
    }
    if (all ? b == -kInf : !(t > lo)) {
      if (all)
        apart = (R)-kInf;
      else
        rest = dmax(rest, t);
      continue;
    }
    const double r2 = exact_r2(q, s, j);
    row[count] = (int)j;
    near[count] = is_near(q, s, j, r2);
    value[count++] = r2;
    least = dmin(least, r2);
    apart = (R)-kInf;
  }
  if (least < kInf && (q.from > 0 ? least < q.from : -pull_of_distance(q, least) > kFar))
    count_from(q, st, least);
  m = dmax(st.m, rest - q.shared);
  for (int i = 0; i < count; i++) {
    value[i] = pull_of_distance(q, value[i] - q.from) + bias_of(q, s, row[i]) * q.inv_t;
    m = dmax(m, value[i]);
  }
  return count;
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
