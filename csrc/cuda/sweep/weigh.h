// From products to weights, for the queries that a block owns: one warp takes a query's tile.
//
// mark_rows() adds up the products over the cluster and makes logits of them. A row whose weight the error of
// its logit could change is marked, and evaluated by direct differences (exact.h). weigh_rows() then merges
// the tile into the query's state, and hands its weights to every block of the cluster.
#pragma once
#include "common/warp.h"
#include "sweep/variant.h"

namespace memokern {
namespace cuda {

// A row whose weight the error of its logit could change by more than kTheta is evaluated exactly. Weights
// are promised to 1e-4, which leaves a factor of a hundred.
MK_DEVICE constexpr float theta() { return 1e-6f; }
MK_DEVICE constexpr float log_theta() { return -13.815511f; }
// Numbers beyond could overflow a float: nothing is then taken to be known from products.
MK_DEVICE constexpr float huge() { return 1e30f; }

// What a lane knows of its rows of a tile, lane and every 32nd: |y - center|^2, the bias, and whether the row
// counts.
struct LaneRows {
  float sq[kLaneRows];
  double bias[kLaneRows];
  bool counts[kLaneRows];
};
MK_DEVICE LaneRows lane_rows(const SweepParams& p, i64 n0) {
  LaneRows r;
  MK_UNROLL
  for (int i = 0; i < kLaneRows; i++) {
    const int j = lane_index() + 32 * i;
    r.counts[i] = j < kRows && n0 + j < p.n;
    r.sq[i] = r.counts[i] ? (float)p.sq_norms[n0 + j] : 0;
    r.bias[i] = r.counts[i] && p.bias ? p.bias[n0 + j] : 0;
    if (r.bias[i] == -infinity()) {
      r.counts[i] = false;
      r.bias[i] = 0;
    }
  }
  return r;
}

// A little below v, as far as rounding to float can go.
MK_DEVICE float below(double v) { return (float)v - 1.2e-7f * fabsf((float)v); }

// Rows with t at or above the result must be evaluated exactly; low is below log sum e^t, or, where the
// nearest row takes all, below the largest exact t.
MK_DEVICE float exact_from(float low, float err, bool hard) {
  if (hard) {
    const float from = low - err;
    return from - 1.2e-7f * fabsf(from);
  }
  if (err <= theta()) return (float)infinity();
  return low + (log_theta() - logf(fminf(err, 1.0f))) - err;
}

// Weighting "log", v = -D / 2 log(r^2 / D) / T + bias / T: which rows must be evaluated, whose r^2 is known
// up to delta.
MK_DEVICE void mark_log(const Owned& o, const LaneRows& r, const float (&t)[kLaneRows], float err,
                        double dims, bool (&marked)[kLaneRows]) {
  const double half = 0.5 * dims, delta = 2.0 * (double)err, inf = infinity();
  const bool all = err == (float)inf;
  double least = -inf;
  MK_UNROLL
  for (int i = 0; i < kLaneRows; i++) {
    if (all || !r.counts[i]) continue;
    const double far = fmax(2.0 * (o.common - (double)t[i]) + delta, 1e-300);
    least = fmax(least, (r.bias[i] - half * log(far / dims)) * o.inv_t);
  }
  least = fmax(o.s > 0 ? o.m + log(o.s) : -inf, warp_max(least));
  if (o.key == 0 && o.s > 0) least = inf;
  MK_UNROLL
  for (int i = 0; i < kLaneRows; i++) {
    const double near = all ? 0.0 : 2.0 * (o.common - (double)t[i]) - delta;
    marked[i] = r.counts[i] && near <= 0;
    if (near > 0) {
      const double off = half * o.inv_t * delta / near;
      const double high = (r.bias[i] - half * log(near / dims)) * o.inv_t;
      const double margin = (double)log_theta() - log(fmin(fmax(off, 1e-30), 1.0));
      marked[i] = r.counts[i] && off > (double)theta() && high > least + margin;
    }
  }
}

// Makes the logits of query b, without the part of the bias, and marks rows. Returns whether there are any.
MK_DEVICE bool mark_rows(const SweepParams& p, const Shared& s, int own, const LaneRows& r) {
  Owned& o = s.owned[own];
  const int lane = lane_index(), b = (int)cluster_rank() + own * kCluster;
  const float inf = (float)infinity();
  const bool lost = o.mode == kLost, hard = o.mode == kHard;
  float t[kLaneRows], largest_sq = 0, largest_bias = 0, top = -inf;
  Remote from[kCluster];
  MK_UNROLL
  for (int rank = 0; rank < kCluster; rank++) from[rank] = remote(s.part + b * kPartPitch, rank);
  MK_UNROLL
  for (int i = 0; i < kLaneRows; i++) {
    const int j = lane + 32 * i;
    float parts[kSplits * kCluster], dot = 0;
    MK_UNROLL
    for (int k = 0; k < kSplits * kCluster; k++)
      parts[k] = j < kRows ? load_float(from[k % kCluster], k / kCluster * kQueries * kPartPitch + j) : 0;
    MK_UNROLL
    for (int k = 0; k < kSplits * kCluster; k++) dot += parts[k];
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
    mark_log(o, r, t, err, (double)p.d, marked);
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
  bool any = false;
  MK_UNROLL
  for (int i = 0; i < kLaneRows; i++) {
    const u32 bits = warp_ballot(marked[i] && !lost);
    any |= bits != 0;
    if (lane == 0) o.marked[i] = bits;
    if (lane + 32 * i < kRows) s.logit[own * kRows + lane + 32 * i] = t[i];
  }
  return any;
}

MK_DEVICE float weight_value(u32 bits) {
  return Numbers::kBrain ? as_float(bits << 16) : half_value((u16)bits) * (1.0f / 32768.0f);
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
  Remote to[kCluster];
  MK_UNROLL
  for (int rank = 0; rank < kCluster; rank++)
    to[rank] = remote(s.weights + (slot * 2 * kQueries + b) * kWeightPitch, rank);
  double sum = 0, sum_r = 0, sum_bias = 0, sum_sq = 0, sum_near = 0;
  MK_UNROLL
  for (int i = 0; i < kLaneRows; i++) {
    const int j = lane + 32 * i;
    const bool counts = key[i] == least && least < inf;
    float w = counts ? expf((float)(v_r[i] + r.bias[i] * o.inv_t - m_safe)) : 0.0f;
    // A row is at least as large as it enters products; what accumulators round is a part of that. Not near
    // where x is so far off that the mean, which is x plus a difference over alpha, would lose.
    const double norm = fmax(sqrt((double)r.sq[i]), o.offset_norm - sqrt((double)r.sq[i]));
    const bool near = exact[i] && w > 0 && o.alpha != 0 &&
                      (r2[i] == 0 || (r.sq[i] < huge() && r2[i] < 16 * o.alpha * o.alpha * norm * norm));
    u32 high = 0, low = 0;
    if (near) {
      s.exact[own * kRows + j] = w;
      sum_near += w;
    } else {
      // As the products will have it, so that a part that all rows share cancels exactly.
      const float scaled = Numbers::kBrain ? w : w * 32768.0f, back = Numbers::kBrain ? 1.0f : 32768.0f;
      high = pack<Numbers::kBrain>(scaled, 0) & 0xffff;
      low = pack<Numbers::kBrain>(scaled - weight_value(high) * back, 0) & 0xffff;
      w = weight_value(high) + weight_value(low);
    }
    sum += w;
    sum_r += w == 0 ? 0 : w * v_r[i];
    sum_bias += w == 0 ? 0 : w * r.bias[i];
    sum_sq += (double)w * w;
    const u32 bits = warp_ballot(near);
    if (lane == 0) o.marked[i] = bits;
    if (j < kRows) {
      MK_UNROLL
      for (int rank = 0; rank < kCluster; rank++) {
        store_u16(to[rank], j, (u16)high);
        store_u16(to[rank], kQueries * kWeightPitch + j, (u16)low);
      }
    }
  }
  sum = warp_sum(sum);
  sum_r = warp_sum(sum_r);
  sum_bias = warp_sum(sum_bias);
  sum_sq = warp_sum(sum_sq);
  sum_near = warp_sum(sum_near);
  if (lane < kCluster) store_float(remote(s.factor + slot * kQueries + b, lane), 0, (float)f);
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

}  // namespace cuda
}  // namespace memokern
