// Which rows of a tile products are not enough for: what both sweeps have of it.
#pragma once
#include "common/warp.h"
#include "sweep/variant.h"

namespace memokern {
namespace cuda {

// What both sweeps take from the table of queries.
template <class Params>
MK_DEVICE void load_table(const Params& p, Owned& o, i64 b) {
  const double* table = p.table + b;
  o.a1 = (float)table[A1 * kQueries];
  o.a2 = (float)table[A2 * kQueries];
  o.e0 = (float)table[E0 * kQueries];
  o.e1 = (float)table[E1 * kQueries];
  o.e2 = (float)table[E2 * kQueries];
  o.e3 = (float)table[E3 * kQueries];
  o.inv_t = table[InvT * kQueries];
  o.common = table[Common * kQueries];
  o.offset_norm = table[OffsetNorm * kQueries];
  o.mode = (int)table[ModeRow * kQueries];
  o.alpha = p.alpha[b];
  o.inv_sigma = o.mode == kSoft ? 1 / p.sigma[b] : 1;
  o.near_s = 0;
  o.factor = 0;
  o.near_before = 0;
}

// A row whose weight the error of its logit could change by more than kTheta is evaluated exactly. Weights
// are promised to 1e-4, which leaves a factor of a hundred.
MK_DEVICE constexpr float theta() { return 1e-6f; }
MK_DEVICE constexpr float log_theta() { return -13.815511f; }
// Numbers beyond could overflow a float: nothing is then taken to be known from products.
MK_DEVICE constexpr float huge() { return 1e30f; }

// What a lane knows of its rows of a tile, lane and every 32nd: |y - center|^2, the bias, and whether the row
// counts.
struct LaneRows {
  i64 first;  // row of the tile
  float sq[kLaneRows];
  double bias[kLaneRows];
  bool counts[kLaneRows];
};
template <class Params>
MK_DEVICE LaneRows lane_rows(const Params& p, i64 n0) {
  LaneRows r;
  r.first = n0;
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
// up to delta. known is below log sum e^v.
MK_DEVICE void mark_log(const Owned& o, const LaneRows& r, const float (&t)[kLaneRows], float err,
                        double known, double dims, bool (&marked)[kLaneRows]) {
  const double half = 0.5 * dims, delta = 2.0 * (double)err, inf = infinity();
  const bool all = err == (float)inf;
  double least = -inf;
  MK_UNROLL
  for (int i = 0; i < kLaneRows; i++) {
    if (all || !r.counts[i]) continue;
    const double far = fmax(2.0 * (o.common - (double)t[i]) + delta, 1e-300);
    least = fmax(least, (r.bias[i] - half * log(far / dims)) * o.inv_t);
  }
  least = fmax(known, warp_max(least));
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

// A vector's products with the rows, added up over the cluster in the order of its blocks.
struct Parts {
  Remote from[kCluster];
};
MK_DEVICE Parts parts_of(const Shared& s, int vector) {
  Parts parts;
  MK_UNROLL
  for (int rank = 0; rank < kCluster; rank++) parts.from[rank] = remote(s.part + vector * kPartPitch, rank);
  return parts;
}
MK_DEVICE float product_of(const Parts& parts, int j) {
  float each[kSplits * kCluster], sum = 0;
  MK_UNROLL
  for (int k = 0; k < kSplits * kCluster; k++)
    each[k] = j < kRows ? load_float(parts.from[k % kCluster], k / kCluster * kVectors * kPartPitch + j) : 0;
  MK_UNROLL
  for (int k = 0; k < kSplits * kCluster; k++) sum += each[k];
  return sum;
}

// Leaves what was found in the query's bits. Returns whether there are any.
MK_DEVICE bool put_marks(Owned& o, const bool (&marked)[kLaneRows]) {
  bool any = false;
  MK_UNROLL
  for (int i = 0; i < kLaneRows; i++) {
    const u32 bits = warp_ballot(marked[i]);
    any |= bits != 0;
    if (lane_index() == 0) o.marked[i] = bits;
  }
  return any;
}

// Whether an evaluated row is near. A row is at least as large as it enters products; what accumulators round
// is a part of that. Not near where x is so far off that the mean, which is x plus a difference over alpha,
// would lose.
MK_DEVICE bool is_near(const Owned& o, float sq, double r2) {
  const double norm = fmax(sqrt((double)sq), o.offset_norm - sqrt((double)sq));
  return o.alpha != 0 && (r2 == 0 || (sq < huge() && r2 < 16 * o.alpha * o.alpha * norm * norm));
}

// A weight as two 16-bit numbers. float16's are those of 2^15 times the weight.
struct WeightTerms {
  u32 high, low;
};
MK_DEVICE float weight_value(u32 bits) {
  return Numbers::kBrain ? as_float(bits << 16) : half_value((u16)bits) * (1.0f / 32768.0f);
}
MK_DEVICE WeightTerms weight_terms(float w) {
  const float scaled = Numbers::kBrain ? w : w * 32768.0f, back = Numbers::kBrain ? 1.0f : 32768.0f;
  WeightTerms terms;
  terms.high = pack<Numbers::kBrain>(scaled, 0) & 0xffff;
  terms.low = pack<Numbers::kBrain>(scaled - weight_value(terms.high) * back, 0) & 0xffff;
  return terms;
}

// Where query b's weights lie in slot `slot` of all blocks.
struct Slots {
  Remote to[kCluster];
};
MK_DEVICE Slots slots_of(const Shared& s, int slot, int b) {
  Slots slots;
  MK_UNROLL
  for (int rank = 0; rank < kCluster; rank++)
    slots.to[rank] = remote(s.weights + (slot * 2 * kQueries + b) * kWeightPitch, rank);
  return slots;
}
MK_DEVICE void store_weight(const Slots& slots, int j, const WeightTerms& terms) {
  if (j >= kRows) return;
  MK_UNROLL
  for (int rank = 0; rank < kCluster; rank++) {
    store_u16(slots.to[rank], j, (u16)terms.high);
    store_u16(slots.to[rank], kQueries * kWeightPitch + j, (u16)terms.low);
  }
}
// What the tile multiplies by, at all blocks.
MK_DEVICE void store_factor(const Shared& s, int slot, int b, float factor) {
  if (lane_index() < kCluster) store_float(remote(s.factor + slot * kQueries + b, lane_index()), 0, factor);
}

}  // namespace cuda
}  // namespace memokern
