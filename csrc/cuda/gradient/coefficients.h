// From products to coefficients, in the backward sweep: one warp takes a query's tile.
//
// Let w = softmax(l / T), and gL, gE, gb, gS the gradients for log_z, mean_logit, mean_bias and weight_sq,
// whose values are L, E, Eb and S, and g that for the mean. With
//
//     h_n = (<g, y_n - mean> + gE (l_n - E) + gb (b_n - Eb) + 2 gS (w_n - S)) / T,
//     q_n = w_n (gL + gE + h_n),
//
// q_n is the gradient for the logit l_n, so grad_x = sum q dl/dx, and so on for sigma and alpha; and
// grad_bias_n = q_n + gb w_n, grad_T = gL (L - E) / T - sum w (l - E) h / T. As L is known, a row is marked
// by the weight that it has in the end.
#pragma once
#include "sweep/mark.h"

namespace memokern {
namespace cuda {

MK_DEVICE const u16* terms_of(const GradientParams& p, int which) { return which ? p.grad_terms : p.terms; }

MK_DEVICE void load_query(const GradientParams& p, Owned& o, i64 b) {
  load_table(p, o, b);
  o.dot = p.table[Dot * kQueries + b];
  o.xo = p.table[XO * kQueries + b];
  o.g_scale = p.grad_table[GScale * kQueries + b];
  o.g_rest = p.grad_table[GRest * kQueries + b];
  o.t = p.temperature[b];
  o.log_z = p.log_z[b];
  o.mean_logit = p.mean_logit[b];
  o.mean_bias = p.mean_bias[b];
  o.weight_sq = p.weight_sq[b];
  o.g_log_z = p.grad_log_z[b];
  o.g_logit = p.grad_mean_logit[b];
  o.g_bias = p.grad_mean_bias[b];
  o.g_sq = p.grad_weight_sq[b];
  for (int i = 0; i < kGradientSums; i++) o.sums[i] = 0;
  // What `near` is multiplied by with each tile.
  o.factor = 1;
}

// Whether a query's gradients are sums over the rows: not at sigma = 0, and not where a row is hit with the
// weighting "log". There ties.cu has the rest.
MK_DEVICE bool moves(const Owned& o) { return (o.mode == kSoft || o.mode == kLog) && o.log_z < infinity(); }

// A thread's part of |x - alpha y|^2, as in the forward sweep, of <x - alpha y, y - center>, and of
// <g, y - mean>.
MK_DEVICE void add_parts(const GradientParams& p, i64 b, i64 n, double alpha, double (&sum)[kExact]) {
  const float *x = p.x + b * p.d, *mean = p.mean + b * p.d, *g = p.grad_mean + b * p.d;
  const float scale = (float)p.scale, shift = (float)p.shift;
  const i64 row = n * p.stride;
#pragma unroll 4
  for (i64 d = thread_index(); d < p.d; d += kThreads) {
    const double y = value_at<kType>(p.rows, row + d, scale, shift);
    const double v = add(multiply(alpha, y), -(double)x[d]);
    sum[0] += v * v;
    sum[1] -= v * (y - p.center[d]);
    sum[2] += g[d] * (y - mean[d]);
  }
}

// Keeps the products of query b and of its gradient with the rows, and marks rows. Returns whether there are
// any.
MK_DEVICE bool mark_rows(const GradientParams& p, const Shared& s, int own, const LaneRows& r) {
  Owned& o = s.owned[own];
  const int lane = lane_index(), b = (int)cluster_rank() + own * kCluster;
  const float inf = (float)infinity();
  float t[kLaneRows], largest_sq = 0, largest_bias = 0;
  const Parts parts = parts_of(s, b), parts_g = parts_of(s, kQueries + b);
  MK_UNROLL
  for (int i = 0; i < kLaneRows; i++) {
    const int j = lane + 32 * i;
    const float dot = product_of(parts, j), dot_g = product_of(parts_g, j);
    if (j < kRows) s.logit[own * kRows + j] = dot;
    if (j < kRows) s.logit[(kOwned + own) * kRows + j] = dot_g;
    t[i] = dot * o.a1 - r.sq[i] * o.a2;
    if (!r.counts[i]) continue;
    largest_sq = fmaxf(largest_sq, r.sq[i]);
    largest_bias = fmaxf(largest_bias, fabsf((float)r.bias[i]));
  }
  largest_sq = warp_max(largest_sq);
  largest_bias = warp_max(largest_bias);
  float err = o.e0 + o.e1 * sqrtf(largest_sq) + o.e2 * largest_sq + o.e3 * largest_bias;
  if (!(err < huge() && largest_sq < huge())) err = inf;
  bool marked[kLaneRows];
  if (kLogWeights) {
    mark_log(o, r, t, err, o.log_z * o.inv_t, (double)p.d, marked);
  } else {
    const float from = exact_from(below(o.log_z * o.inv_t + o.common), err, false);
    MK_UNROLL
    for (int i = 0; i < kLaneRows; i++)
      marked[i] = r.counts[i] && (err == inf || t[i] + (float)r.bias[i] * (float)o.inv_t >= from);
  }
  const bool moving = moves(o);
  MK_UNROLL
  for (int i = 0; i < kLaneRows; i++) marked[i] &= moving;
  return put_marks(o, marked);
}

// What a row gives: q, q c, w, and its part of each sum.
struct RowGradient {
  double q, qc, w;
  double parts[kGradientSums];
};
// Of row j, whose |y - center|^2 and bias are given.
MK_DEVICE RowGradient row_gradient(const GradientParams& p, const Shared& s, int own, int j, bool exact,
                                   double sq, double bias) {
  const Owned& o = s.owned[own];
  enum { kPlane = kOwned * kRows };
  const float dot = s.logit[own * kRows + j], dot_g = s.logit[kPlane + own * kRows + j];
  const double* const found = s.exact + own * kRows + j;
  const double t = dot * o.a1 - (float)sq * o.a2;
  double l = 0, c = 1;  // the logit without the bias
  if (kLogWeights) {
    const double r2 = exact ? found[0] : 2.0 * (o.common - t), dims = (double)p.d;
    l = -0.5 * dims * log(r2 / dims);
    c = dims / r2;
  } else {
    l = exact ? -0.5 * (found[0] * o.inv_sigma) * o.inv_sigma : (t - o.common) * o.t;
  }
  const double xy = exact ? found[kPlane] : dot * o.dot + o.xo - o.alpha * sq;
  const double gy = exact ? found[2 * kPlane] : dot_g * o.g_scale + o.g_rest;
  const double w = expf((float)fmin((l + bias - o.log_z) * o.inv_t, 80.0)), off = l + bias - o.mean_logit;
  const double of_mean = gy * o.inv_t;
  const double of_rest =
      (o.g_logit * off + o.g_bias * (bias - o.mean_bias) + 2 * o.g_sq * (w - o.weight_sq)) * o.inv_t;
  RowGradient f;
  f.w = w;
  f.q = w * (o.g_log_z + o.g_logit + of_mean + of_rest);
  f.qc = f.q * c;
  f.parts[W] = w;
  f.parts[Drift] = w * of_mean;
  f.parts[QC] = 0;
  f.parts[QL] = f.q * l;
  f.parts[QA] = f.qc * xy;
  f.parts[WA] = w * xy;
  f.parts[Temp] = w * off * (of_mean + of_rest);
  return f;
}

// A power of two that float16 has the number v over, however small or large it is.
MK_DEVICE float coefficient_unit(float v) {
  if (Numbers::kBrain) return 1;
  const u32 bits = as_bits(fminf(fmaxf(v, 1e-25f), 1e35f)) & 0x7f800000u;
  return as_float(bits) * 2;
}

// Adds the tile to the sums of query b, and writes its coefficients into slot `slot` of all blocks.
MK_DEVICE void weigh_rows(const GradientParams& p, const Shared& s, int own, const LaneRows& r, int slot) {
  Owned& o = s.owned[own];
  const int lane = lane_index(), b = (int)cluster_rank() + own * kCluster;
  const bool moving = moves(o);
  const i64 n0 = r.first;
  double sums[kGradientSums] = {};
  float largest = 0, qc[kLaneRows];
  bool any_near = false;
  MK_UNROLL
  for (int i = 0; i < kLaneRows; i++) {
    const int j = lane + 32 * i;
    const bool counts = r.counts[i] && moving, exact = o.marked[i] >> lane & 1;
    double pair = 0;
    bool near = false;
    qc[i] = 0;
    if (counts) {
      const RowGradient f = row_gradient(p, s, own, j, exact, r.sq[i], r.bias[i]);
      MK_UNROLL
      for (int k = 0; k < kGradientSums; k++) sums[k] += f.parts[k];
      pair = f.q + o.g_bias * f.w;
      near = exact && is_near(o, r.sq[i], s.exact[own * kRows + j]);
      if (near)
        s.exact[own * kRows + j] = f.qc;
      else
        qc[i] = (float)f.qc;
    }
    if (p.pairs && j < kRows && n0 + j < p.n) p.pairs[b * p.n + n0 + j] = (float)pair;
    largest = fmaxf(largest, fabsf(qc[i]));
    const u32 bits = warp_ballot(near);
    any_near |= bits != 0;
    if (lane == 0) o.marked[i] = bits;
  }
  const float unit = coefficient_unit(warp_max(largest));
  const Slots slots = slots_of(s, slot, b);
  MK_UNROLL
  for (int i = 0; i < kLaneRows; i++) {
    const WeightTerms terms = weight_terms(qc[i] / unit);
    sums[QC] += (double)(weight_value(terms.high) + weight_value(terms.low)) * unit;
    store_weight(slots, lane + 32 * i, terms);
  }
  // What weight_terms() multiplies by is taken off here.
  store_factor(s, slot, b, Numbers::kBrain ? 1.0f : unit * (1.0f / 32768.0f));
  MK_UNROLL
  for (int k = 0; k < kGradientSums; k++) sums[k] = warp_sum(sums[k]);
  warp_sync();  // every lane has read the sums
  if (lane == 0) {
    for (int k = 0; k < kGradientSums; k++) o.sums[k] += sums[k];
    o.near_before = o.near_s > 0;
    if (any_near) o.near_s = 1;
  }
  warp_sync();
}

MK_DEVICE void store_sums(const GradientParams& p, const Shared& s) {
  for (int own = thread_index(); own < kOwned; own += kThreads) {
    const i64 b = cluster_rank() + own * kCluster;
    if (b >= p.b) break;
    const Owned& o = s.owned[own];
    double* to = p.sums + (i64)cluster_index() * (kGradientSums + 1) * kQueries + b;
    for (int k = 0; k < kGradientSums; k++) to[k * kQueries] = o.sums[k];
    to[HasNear * kQueries] = o.near_s;
  }
}

}  // namespace cuda
}  // namespace memokern
