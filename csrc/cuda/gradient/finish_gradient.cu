// The last step of a backward sweep: the parts of the clusters are added up, and make the gradients of a
// query. One block owns a query and streams its parts. With qc, acc and near their sums, and zero the value
// of u = 0,
//
//     grad_x sigma^2 = alpha (scale acc + qc (zero - c)) - qc (x - alpha c) + near - drift (alpha mean - x)
#include "common/parts.h"

namespace memokern {
namespace cuda {

enum { kGradientThreads = 512, kGradientWarps = kGradientThreads / 32 };

MK_DEVICE double part_sum(const GradientParams& p, i64 part, i64 row, i64 b) {
  return p.sums[(part * (kGradientSums + 1) + row) * p.queries + b];
}

MK_PLAIN_KERNEL(kGradientThreads) memokern_gradient_finish(MK_PARAMS(GradientParams, p)) {
  const i64 b = block_x(), q = p.queries;
  double* const shared = (double*)shared_memory();  // [kGradientWarps]
  const double nan = not_a_number(), alpha = p.alpha[b], sigma = p.sigma[b], t = p.temperature[b];
  const double log_z = p.log_z[b], mean_logit = p.mean_logit[b];
  const int mode = (int)p.table[ModeRow * q + b];
  // NaN: one of the rows is not finite.
  const bool lost = mode == kLost || log_z != log_z, soft = mode == kSoft;
  const bool still = lost || mode == kHard || log_z == infinity();  // nothing moves the query
  double sums[kGradientSums] = {};
  for (i64 part = lane_index(); part < p.parts; part += 32) {
    MK_UNROLL
    for (int k = 0; k < kGradientSums; k++) sums[k] += part_sum(p, part, k, b);
  }
  MK_UNROLL
  for (int k = 0; k < kGradientSums; k++) sums[k] = warp_sum(sums[k]);
  // Without the rounding of the mean and of the weights this would be zero.
  const double drift = soft && sums[W] > 0 ? sums[Drift] : 0, unit = soft ? 1 / sigma / sigma : 1;
  double along = 0;  // <center, sum of q c (x - alpha y)>
  for (i64 d0 = 0; d0 < p.d; d0 += kGradientThreads * kPartFeatures) {
    const i64 first = d0 + thread_index(), at = b * p.dp;
    const PartSums of =
        sum_parts(p.acc + at, p.near + at, p.parts, q * p.dp, first, (i64)kGradientThreads, p.d,
                  [&](i64 part) -> PartFactor { return {1, part_sum(p, part, HasNear, b) > 0}; });
    MK_UNROLL
    for (int i = 0; i < kPartFeatures; i++) {
      const i64 d = first + i * kGradientThreads;
      if (d >= p.d) continue;
      const double c = p.center[d], xc = p.x[b * p.d + d] - alpha * c;
      double g = alpha * (p.scale * of.acc[i] + sums[QC] * (p.zero - c)) - sums[QC] * xc + of.near[i];
      if (drift != 0) g -= drift * (alpha * (p.mean[b * p.d + d] - c) - xc);
      along -= c * g;
      p.grad_x[b * p.d + d] = (float)(lost ? nan : still ? 0 : g * unit);
    }
  }
  along = warp_sum(along);
  const int warp = warp_index();
  if (lane_index() == 0) shared[warp] = along;
  block_sync();
  if (thread_index() != 0) return;
  along = 0;
  for (int w = 0; w < kGradientWarps; w++) along += shared[w];
  const double share = drift == 0 ? 0 : drift / sums[W];
  const double ql = sums[QL] - (drift == 0 ? 0 : drift * (mean_logit - p.mean_bias[b]));
  const double qa = sums[QA] - share * sums[WA] + along;
  const bool infinite = log_z == infinity() || log_z == -infinity();
  const double by_t = (infinite ? 0 : p.grad_log_z[b] * (log_z - mean_logit) / t) - sums[Temp] / t;
  p.grad_sigma[b] = lost ? nan : still || !soft ? 0 : -2 / sigma * ql;
  p.grad_alpha[b] = lost ? nan : still ? 0 : qa * unit;
  p.grad_temperature[b] = lost ? nan : by_t;
}

}  // namespace cuda
}  // namespace memokern
