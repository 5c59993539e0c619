// From products to weights, for the queries that a block owns: one warp takes a query's tile.
//
// mark_rows() adds up the products over the cluster and makes logits of them. A row whose weight the error of
// its logit could change is marked, and evaluated by direct differences (exact.h). weigh_rows() then merges
// the tile into the query's state, and hands its weights to every block of the cluster.
#pragma once
#include "sweep/mark.h"

namespace memokern {
namespace cuda {

MK_DEVICE const u16* terms_of(const SweepParams& p, int) { return p.terms; }

MK_DEVICE void load_query(const SweepParams& p, Owned& o, i64 b) {
  load_table(p, o, b);
  o.key = infinity();
  o.m = -infinity();
  o.s = o.s_v = o.s_bias = o.s_sq = 0;
}

// A thread's part of |x - alpha y_n|^2. The order of the sum depends on d alone, so that equal rows are ties.
MK_DEVICE void add_parts(const SweepParams& p, i64 b, i64 n, double alpha, double (&sum)[kExact]) {
  const float *x = p.x + b * p.d, scale = (float)p.scale, shift = (float)p.shift;
  const i64 row = n * p.stride;
#pragma unroll 8
  for (i64 d = thread_index(); d < p.d; d += kThreads) {
    const double v = difference_at<kType>(p.rows, row + d, x[d], alpha, scale, shift);
    sum[0] += v * v;
  }
}

// Makes the logits of query b, without the part of the bias, and marks rows. Returns whether there are any.
MK_DEVICE bool mark_rows(const SweepParams& p, const Shared& s, int own, const LaneRows& r) {
  Owned& o = s.owned[own];
  const int lane = lane_index(), b = (int)cluster_rank() + own * kCluster;
  const float inf = (float)infinity();
  const bool lost = o.mode == kLost, hard = o.mode == kHard;
  float t[kLaneRows], largest_sq = 0, largest_bias = 0, top = -inf;
  const Parts parts = parts_of(s, b);
  MK_UNROLL
  for (int i = 0; i < kLaneRows; i++) {
    const float dot = product_of(parts, lane + 32 * i);
    t[i] = dot * o.a1 - r.sq[i] * o.a2;
    if (!r.counts[i]) continue;
    largest_sq = fmaxf(largest_sq, r.sq[i]);
    largest_bias = fmaxf(largest_bias, fabsf((float)r.bias[i]));
    top = fmaxf(top, t[i] + (o.mode == kSoft ? (float)r.bias[i] * (float)o.inv_t : 0.0f));
  }
  largest_sq = warp_max(largest_sq);
  largest_bias = warp_max(largest_bias);
  top = warp_max(top);
  float err = o.e0 + o.e1 * sqrtf(largest_sq) + o.e2 * largest_sq + o.e3 * largest_bias;
  if (!(err < huge() && largest_sq < huge())) err = inf;
  bool marked[kLaneRows];
  if (kLogWeights) {
    double known = o.s > 0 ? o.m + log(o.s) : -infinity();
    if (o.key == 0 && o.s > 0) known = infinity();
    mark_log(o, r, t, err, known, (double)p.d, marked);
  } else {
    // Below log sum e^t of the rows so far, whose t are exact; at sigma = 0 below the largest t.
    float known = -inf;
    if (o.s > 0) known = hard ? below(o.common - 0.5 * o.key) : below(o.m + o.common + log(o.s));
    float low = fmaxf(top - err, known);
    if (!hard && err > theta() && err < inf && top >= exact_from(low, err, false)) {
      // So many rows may share the weight that none of them has much: below log sum e^t of the tile.
      double sum = 0;
      MK_UNROLL
      for (int i = 0; i < kLaneRows; i++)
        if (r.counts[i]) sum += expf(t[i] + (float)r.bias[i] * (float)o.inv_t - top);
      low = fmaxf(low, below((double)top + log(warp_sum(sum)) - 1e-5) - err);
    }
    const float from = exact_from(low, err, hard);
    MK_UNROLL
    for (int i = 0; i < kLaneRows; i++) {
      const float whole = t[i] + (hard ? 0.0f : (float)r.bias[i] * (float)o.inv_t);
      marked[i] = r.counts[i] && (err == inf || whole >= from);
    }
  }
  MK_UNROLL
  for (int i = 0; i < kLaneRows; i++) {
    marked[i] &= !lost;
    if (lane + 32 * i < kRows) s.logit[own * kRows + lane + 32 * i] = t[i];
  }
  return put_marks(o, marked);
}

// Merges the tile into the state of query b, and writes its weights into slot `slot` of all blocks.
MK_DEVICE void weigh_rows(const SweepParams& p, const Shared& s, int own, const LaneRows& r, int slot) {
  Owned& o = s.owned[own];
  const int lane = lane_index(), b = (int)cluster_rank() + own * kCluster;
  const double inf = infinity();
  const bool hard = o.mode == kHard, lost = o.mode == kLost;
  double v_r[kLaneRows], key[kLaneRows], r2[kLaneRows], least = inf;
  bool exact[kLaneRows];
  MK_UNROLL
  for (int i = 0; i < kLaneRows; i++) {
    const int j = lane + 32 * i;
    const bool counts = r.counts[i] && !lost;
    exact[i] = o.marked[i] >> lane & 1;
    const double t = j < kRows ? (double)s.logit[own * kRows + j] : 0;
    r2[i] = exact[i] ? s.exact[own * kRows + j] : 0;
    if (kLogWeights) {
      const double far = exact[i] ? r2[i] : 2.0 * (o.common - t);
      const bool hit = exact[i] && far == 0;
      v_r[i] = -0.5 * (double)p.d * log((hit ? (double)p.d : far) / (double)p.d) * o.inv_t;
      key[i] = counts ? (hit ? 0.0 : 1.0) : inf;
    } else {
      // Multiplied by 1 / sigma twice, because sigma^2 underflows long before sigma does.
      v_r[i] = exact[i] ? (hard ? 0.0 : -0.5 * (r2[i] * o.inv_sigma) * o.inv_sigma * o.inv_t) : t - o.common;
      key[i] = !counts ? inf : !hard ? 0.0 : exact[i] ? r2[i] : inf;
    }
    least = fmin(least, key[i]);
  }
  least = fmin(o.key, warp_min(least));
  const bool stays = o.s != 0 && o.key == least;
  double m = stays ? o.m : -inf;
  MK_UNROLL
  for (int i = 0; i < kLaneRows; i++)
    if (key[i] == least && least < inf) m = fmax(m, v_r[i] + r.bias[i] * o.inv_t);
  m = warp_max(m);
  const double m_safe = m == -inf ? 0.0 : m, drop = stays ? o.m - m_safe : 0;
  const double f = stays ? exp(drop) : 0;
  const Slots slots = slots_of(s, slot, b);
  double sum = 0, sum_r = 0, sum_bias = 0, sum_sq = 0, sum_near = 0;
  MK_UNROLL
  for (int i = 0; i < kLaneRows; i++) {
    const int j = lane + 32 * i;
    const bool counts = key[i] == least && least < inf;
    float w = counts ? expf((float)(v_r[i] + r.bias[i] * o.inv_t - m_safe)) : 0.0f;
    const bool near = exact[i] && w > 0 && is_near(o, r.sq[i], r2[i]);
    WeightTerms terms = {0, 0};
    if (near) {
      s.exact[own * kRows + j] = w;
      sum_near += w;
    } else {
      // As the products will have it, so that a part that all rows share cancels exactly.
      terms = weight_terms(w);
      w = weight_value(terms.high) + weight_value(terms.low);
    }
    sum += w;
    sum_r += w == 0 ? 0 : w * v_r[i];
    sum_bias += w == 0 ? 0 : w * r.bias[i];
    sum_sq += (double)w * w;
    const u32 bits = warp_ballot(near);
    if (lane == 0) o.marked[i] = bits;
    store_weight(slots, j, terms);
  }
  sum = warp_sum(sum);
  sum_r = warp_sum(sum_r);
  sum_bias = warp_sum(sum_bias);
  sum_sq = warp_sum(sum_sq);
  sum_near = warp_sum(sum_near);
  store_factor(s, slot, b, (float)f);
  warp_sync();  // every lane has read the state
  if (lane == 0) {
    o.s_v = (f > 0 ? f * (o.s_v + o.s * drop) : 0) + (sum_r + o.inv_t * sum_bias - m_safe * sum);
    o.s = (stays ? o.s * f : 0) + sum;
    o.s_bias = (stays ? o.s_bias * f : 0) + sum_bias;
    o.s_sq = (stays ? o.s_sq * f * f : 0) + sum_sq;
    o.near_before = o.near_s > 0;
    o.near_s = o.near_s * f + sum_near;
    o.factor = (float)f;
    o.key = least;
    o.m = m;
  }
  warp_sync();
}

MK_DEVICE void store_sums(const SweepParams& p, const Shared& s) {
  for (int own = thread_index(); own < kOwned; own += kThreads) {
    const i64 b = cluster_rank() + own * kCluster;
    if (b >= p.b) break;
    const Owned& o = s.owned[own];
    double* to = p.states + (i64)cluster_index() * kState * kQueries + b;
    to[Key * kQueries] = o.key;
    to[M * kQueries] = o.m;
    to[S * kQueries] = o.s;
    to[SV * kQueries] = o.s_v;
    to[SBias * kQueries] = o.s_bias;
    to[SSq * kQueries] = o.s_sq;
    to[NearS * kQueries] = o.near_s;
  }
}

}  // namespace cuda
}  // namespace memokern
