// What is known of a query before the rows are read: its terms, and its column of the table.
//
// One block owns a query and streams its features twice: for their sums, and to write its terms, 16-bit
// numbers whose sum is x - alpha center to the precision of a float, times a power of two that makes the
// largest feature 128 to 256. Queries beyond the last real one become zeros.
#include "common/terms.h"

namespace memokern {
namespace cuda {

// The error of t relative to a1 |x| |y|, in units of 2^-24: as estimated where errors are independent, and as
// bounded for any data.
//
// - The terms: float32's and bfloat16's leave out less than 1, float16's 2^-22; xc is rounded once, and so is
// t.
// - Tensor cores truncate: a run of up to 8 sums is short by 8 halves of a unit of what it adds up, and runs
//   make up the whole. In the bound, 16 products of a step are aligned to the largest too.
// - The sums of runs, of parts of a block, and of blocks are rounded to nearest.
struct ProductError {
  double likely, bound;
};
template <int kType>
MK_DEVICE ProductError product_error(i64 depth) {
  const double rounding = Stored<kType>::kBrain ? 4 : 6, unit = 1.0 / 16777216.0;
  ProductError e;
  e.likely = (rounding + 8 + 0.5 * sqrt((double)depth / 16 + 16)) * unit;
  e.bound = (2 * rounding + 128 + (double)depth / 16) * unit;
  return e;
}

// |xc|^2, <xc, o>, |o|^2, |center|^2 and the largest |xc|, for o = value of u = 0, less the centre.
struct QuerySums {
  double xx, xo, oo, cc, top;
};
MK_DEVICE QuerySums query_sums(const QueriesParams& p, i64 b, double alpha, double zero) {
  double* const shared = (double*)shared_memory();  // [5][kQueryWarps]
  QuerySums s = {0, 0, 0, 0, 0};
  for (i64 d = thread_index(); d < p.d; d += kQueryThreads) {
    const double c = p.center[d], xc = p.x[b * p.d + d] - alpha * c, o = zero - c;
    s.xx += xc * xc;
    s.xo += xc * o;
    s.oo += o * o;
    s.cc += c * c;
    s.top = fmax(s.top, fabs(xc));
  }
  const double all[5] = {warp_sum(s.xx), warp_sum(s.xo), warp_sum(s.oo), warp_sum(s.cc), warp_max(s.top)};
  const int warp = warp_index();
  if (lane_index() == 0)
    for (int i = 0; i < 5; i++) shared[i * kQueryWarps + warp] = all[i];
  block_sync();
  QuerySums t = {0, 0, 0, 0, 0};
  for (int w = 0; w < kQueryWarps; w++) {
    t.xx += shared[w];
    t.xo += shared[kQueryWarps + w];
    t.oo += shared[2 * kQueryWarps + w];
    t.cc += shared[3 * kQueryWarps + w];
    t.top = fmax(t.top, shared[4 * kQueryWarps + w]);
  }
  return t;
}

// Writes the column of query b; `known`: whether all its numbers are finite. Returns the power of two.
template <int kType>
MK_DEVICE double write_table(const QueriesParams& p, const QuerySums& s, i64 b, i64 queries, bool& known) {
  // Up to `steepest` no logit of float32 numbers overflows in float64.
  const double huge = 1e30, steepest = 1e150, unit_roundoff = 1.0 / 16777216.0;
  const double alpha = p.alpha[b], sigma = p.sigma[b], inv_t = 1 / p.temperature[b];
  // Comparisons with NaN are false, so whatever is not a number is lost.
  known = s.xx < infinity() && sigma >= 0 && inv_t > 0 && inv_t < infinity();
  const double soft_unit = inv_t / sigma / sigma;
  const bool soft = soft_unit * s.xx < huge && soft_unit < steepest;
  const int mode = !known ? kLost : p.log ? kLog : soft ? kSoft : kHard;
  const double unit = mode == kSoft ? soft_unit : 1, norm = sqrt(s.xx), a = fabs(alpha);
  const double p2 = known ? (double)power_of_two((float)s.top) : 1;
  const ProductError error = product_error<kType>(p.depth);
  const double a1 = alpha * unit * p.scale * (p2 / 128), a2 = 0.5 * alpha * alpha * unit;
  const double common = (0.5 * s.xx - alpha * s.xo) * unit;
  // What float64 rounds in xc and in the offset, which matters where a row is hit.
  const double hit = 4.5e-16 * a * (sqrt(s.oo) + sqrt(s.cc));
  const double per_row = (mode == kHard ? error.bound : error.likely) * a * unit, e1 = per_row * norm;
  // A query at the center sees no rounding of the offset in its logits, but in its residual.
  const double seen = mode == kSoft ? fmax(norm, sigma / sqrt(inv_t)) : norm;
  const double shared = mode == kSoft ? 0 : 2 * unit_roundoff * fabs(common) + hit * (norm + hit);
  const bool fits = fabs(a1) < huge && a2 < huge && fabs(common) < huge;
  if (thread_index() == 0) {
    double* to = p.table + b;
    to[A1 * queries] = known && fits ? a1 : 0;
    to[A2 * queries] = known && fits ? a2 : 0;
    to[InvT * queries] = known ? inv_t : 0;
    to[Common * queries] = known ? common : 0;
    to[E0 * queries] = !known ? 0 : fits ? per_row * seen * sqrt(s.oo) + shared : infinity();
    to[E1 * queries] = known ? e1 : 0;
    to[E2 * queries] = known ? 4 * unit_roundoff * a2 : 0;
    to[E3 * queries] = mode == kSoft ? 2 * unit_roundoff * inv_t : 0;
    to[ModeRow * queries] = mode;
    to[OffsetNorm * queries] = known ? sqrt(s.oo) : 0;
    to[Dot * queries] = known ? p.scale * (p2 / 128) : 0;
    to[XO * queries] = known ? s.xo : 0;
  }
  return p2;
}

MK_PLAIN_KERNEL(kQueryThreads) memokern_queries(MK_PARAMS(QueriesParams, p)) {
  typedef Stored<MK_ROWS> Numbers;
  const i64 b = block_x(), queries = p.queries;
  const bool real = b < p.b;
  bool known = false;
  double p2 = 1, alpha = 0;
  if (real) {
    alpha = p.alpha[b];
    const QuerySums sums = query_sums(p, b, alpha, p.shift - Numbers::kOffset * p.scale);
    p2 = write_table<MK_ROWS>(p, sums, b, queries, known);
  }
  for (i64 d = thread_index(); d < p.dp; d += kQueryThreads) {
    float rest = 0;
    if (known && d < p.d) rest = (float)((p.x[b * p.d + d] - alpha * p.center[d]) * (128 / p2));
    write_terms<MK_ROWS>(rest, p.terms + b * p.dp + d, queries * p.dp);
  }
}

}  // namespace cuda
}  // namespace memokern
