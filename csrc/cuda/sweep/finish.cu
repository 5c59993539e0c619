// The last step of a sweep: the parts of the clusters are joined by the monoid of calls.State, and left as a
// state or normalised, with the gate of a regularised score.
//
// One block owns a query and kFinishFeatures features. Each warp streams the parts' states three times, a
// part in each lane: for the smallest key, for the largest m, and for the sums; then each thread streams the
// accumulators of its features. With s = s_acc + s_near and zero the value of u = 0,
//
//     sum w (y - c)         = scale acc + s_acc (zero - c) + (near + s_near (x - alpha c)) / alpha
//     sum w (alpha y - x)   = alpha (scale acc + s_acc zero) - s_acc x + near
#include "common/parts.h"

namespace memokern {
namespace cuda {

enum { kFinishThreads = 128, kFinishEach = kPartFeatures, kFinishFeatures = kFinishThreads * kFinishEach };

// A query's state over all parts, and how to join what the parts hold.
struct Joined {
  double key, m, s, s_v, s_bias, s_sq, near_s;
  bool lost, none;
};
MK_DEVICE double part_number(const FinishParams& p, i64 part, i64 row, i64 b) {
  return p.states[(part * kState + row) * p.queries + b];
}
// Whether a part's numbers count: its key is the smallest.
MK_DEVICE bool is_least(const FinishParams& p, const Joined& j, i64 part, i64 b) {
  return j.key < infinity() && part_number(p, part, Key, b) == j.key;
}
MK_DEVICE PartFactor part_factor(const FinishParams& p, const Joined& j, i64 part, i64 b) {
  if (!is_least(p, j, part, b)) return {0, false};
  return {exp(part_number(p, part, M, b) - j.m), part_number(p, part, NearS, b) > 0};
}
MK_DEVICE Joined join_states(const FinishParams& p, i64 b) {
  Joined j = {infinity(), -infinity(), 0, 0, 0, 0, 0, false, false};
  const i64 first = lane_index();
  for (i64 i = first; i < p.parts; i += 32) j.key = fmin(j.key, part_number(p, i, Key, b));
  j.key = warp_min(j.key);
  for (i64 i = first; i < p.parts; i += 32)
    if (part_number(p, i, Key, b) == j.key) j.m = fmax(j.m, part_number(p, i, M, b));
  j.m = warp_max(j.m);
  if (j.m == -infinity()) j.m = 0;
  for (i64 i = first; i < p.parts; i += 32) {
    if (!is_least(p, j, i, b)) continue;
    // A sum that is NaN makes the query lost, whatever its factor is.
    const double gap = part_number(p, i, M, b) - j.m, f = exp(gap), s = part_number(p, i, S, b);
    j.s += f * s;
    if (f == 0) continue;
    j.s_v += f * (part_number(p, i, SV, b) + s * gap);
    j.s_bias += f * part_number(p, i, SBias, b);
    j.s_sq += f * f * part_number(p, i, SSq, b);
    j.near_s += f * part_number(p, i, NearS, b);
  }
  j.s = warp_sum(j.s);
  j.s_v = warp_sum(j.s_v);
  j.s_bias = warp_sum(j.s_bias);
  j.s_sq = warp_sum(j.s_sq);
  j.near_s = warp_sum(j.near_s);
  j.lost = (int)p.table[(i64)ModeRow * p.queries + b] == kLost || j.s != j.s;
  j.none = j.s == 0 && !j.lost;
  return j;
}

// A thread's features of a query: sums of weights times y - c, and of weights times alpha y - x. Features
// beyond the last one are 0.
struct FeatureSums {
  double values[kFinishEach], residual[kFinishEach];
};
MK_DEVICE i64 feature_of(int i) {
  return (i64)block_y() * kFinishFeatures + i * kFinishThreads + thread_index();
}
MK_DEVICE FeatureSums feature_sums(const FinishParams& p, const Joined& j, i64 b, bool about_center) {
  const i64 at = b * p.dp;
  const PartSums sums =
      sum_parts(p.acc + at, p.near + at, p.parts, p.queries * p.dp, feature_of(0), (i64)kFinishThreads, p.d,
                [&](i64 part) { return part_factor(p, j, part, b); });
  const double alpha = p.alpha[b], near_s = j.near_s > 0 ? j.near_s : 0, rest = fmax(j.s - near_s, 0.0);
  FeatureSums f;
  MK_UNROLL
  for (int i = 0; i < kFinishEach; i++) {
    const i64 d = feature_of(i);
    const double c = about_center && d < p.d ? p.center[d] : 0, x = d < p.d ? p.x[b * p.d + d] : 0;
    f.values[i] = sums.acc[i] * p.scale + rest * (p.zero - c);
    if (near_s > 0) f.values[i] += (sums.near[i] + near_s * (x - alpha * c)) / alpha;
    f.residual[i] = alpha * (sums.acc[i] * p.scale + rest * p.zero) - rest * x + sums.near[i];
  }
  return f;
}

MK_PLAIN_KERNEL(kFinishThreads) memokern_finish_state(MK_PARAMS(FinishParams, p)) {
  const i64 b = block_x();
  const Joined j = join_states(p, b);
  const double nan = not_a_number();
  const FeatureSums f = feature_sums(p, j, b, true);
  MK_UNROLL
  for (int i = 0; i < kFinishEach; i++) {
    const i64 d = feature_of(i);
    if (d >= p.d) continue;
    p.sum[b * p.d + d] = (float)(j.lost ? nan : j.none ? 0 : f.values[i]);
    p.residual[b * p.d + d] = (float)(j.lost ? nan : j.none ? 0 : f.residual[i]);
  }
  if (block_y() != 0 || thread_index() != 0) return;
  p.key[b] = j.lost ? 0 : j.none ? infinity() : j.key;
  p.m[b] = j.lost ? 0 : j.none ? -infinity() : j.m;
  p.s[b] = j.lost ? nan : j.s;
  p.s_v[b] = j.lost ? nan : j.s_v;
  p.s_bias[b] = j.lost ? nan : j.s_bias;
  p.s_sq[b] = j.lost ? nan : j.s_sq;
}

// The normalised logarithms. In the modes kHard and kLog an infinite part is missing: at sigma = 0 the
// distance, unless the nearest row is hit; with weighting "log" that of a hit.
struct Logs {
  double log_z, mean_logit;
};
MK_DEVICE Logs logs_of(const FinishParams& p, const Joined& j, i64 b) {
  const int mode = (int)p.table[(i64)ModeRow * p.queries + b];
  const double t = p.temperature[b], sigma = p.sigma[b];
  Logs l = {t * (j.m + log(j.s)), t * (j.m + j.s_v / j.s)};
  if (mode == kHard && j.key > 0) {
    const double beyond = -0.5 * (j.key / sigma) / sigma;
    l.log_z += beyond;
    l.mean_logit += beyond;
  }
  if (mode == kLog && j.key == 0) l.log_z = l.mean_logit = infinity();
  if (j.lost || j.none) l.mean_logit = not_a_number();
  if (j.lost) l.log_z = not_a_number();
  if (j.none) l.log_z = -infinity();
  return l;
}

MK_PLAIN_KERNEL(kFinishThreads) memokern_finish_sums(MK_PARAMS(FinishParams, p)) {
  const i64 b = block_x();
  const Joined j = join_states(p, b);
  const Logs l = logs_of(p, j, b);
  const double nan = not_a_number();
  const bool unknown = j.lost || j.none;
  double gate = 0;
  if (p.score) gate = fmin(1.0, exp(l.log_z - p.log_threshold)) / (p.sigma[b] * p.sigma[b] + p.tikhonov);
  const FeatureSums f = feature_sums(p, j, b, false);
  MK_UNROLL
  for (int i = 0; i < kFinishEach; i++) {
    const i64 d = feature_of(i);
    if (d >= p.d) continue;
    const double residual = unknown ? nan : f.residual[i] / j.s;
    p.mean[b * p.d + d] = (float)(unknown ? nan : f.values[i] / j.s);
    p.residual[b * p.d + d] = (float)residual;
    if (p.score) p.score[b * p.d + d] = (float)(gate * residual);
  }
  if (block_y() != 0 || thread_index() != 0) return;
  p.log_z[b] = l.log_z;
  p.mean_logit[b] = l.mean_logit;
  p.mean_bias[b] = unknown ? nan : j.s_bias / j.s;
  p.weight_sq[b] = unknown ? nan : j.s_sq / (j.s * j.s);
}

}  // namespace cuda
}  // namespace memokern
