// The parts of the rows joined by the monoid of calls.State, and left as a state or normalised. A thread owns
// a query and streams its parts three times: for the smallest key, for the largest m, and for the sums.
#include "common/device.h"
#include "plane/abi.h"

namespace memokern {
namespace cuda {

enum { kPlaneFinishThreads = 128, kMostFeatures = 8 };

struct PlaneJoined {
  double key, m, s, s_v, s_bias, s_sq, acc[kMostFeatures], pull[kMostFeatures];
  bool lost, none;
};
MK_DEVICE double part_number(const PlaneParams& p, i64 part, i64 row, i64 b) {
  return p.part[(part * (kPlaneSums + 2 * p.features) + row) * p.b + b];
}
MK_DEVICE PlaneJoined join_parts(const PlaneParams& p, i64 b) {
  PlaneJoined j = {infinity(), -infinity(), 0, 0, 0, 0, {}, {}, false, false};
  for (i64 i = 0; i < p.parts; i++) j.key = fmin(j.key, part_number(p, i, PKey, b));
  for (i64 i = 0; i < p.parts; i++)
    if (part_number(p, i, PKey, b) == j.key) j.m = fmax(j.m, part_number(p, i, PM, b));
  if (j.m == -infinity()) j.m = 0;
  for (i64 i = 0; i < p.parts; i++) {
    if (!(j.key < infinity()) || part_number(p, i, PKey, b) != j.key) continue;
    // A sum that is NaN makes the query lost, whatever its factor is.
    const double gap = part_number(p, i, PM, b) - j.m, f = exp(gap), s = part_number(p, i, PS, b);
    j.s += f * s;
    if (f == 0) continue;
    j.s_v += f * (part_number(p, i, PSV, b) + s * gap);
    j.s_bias += f * part_number(p, i, PSBias, b);
    j.s_sq += f * f * part_number(p, i, PSSq, b);
    MK_UNROLL
    for (int d = 0; d < kMostFeatures; d++) {
      if (d >= p.d) continue;
      j.acc[d] += f * part_number(p, i, kPlaneSums + d, b);
      j.pull[d] += f * part_number(p, i, kPlaneSums + p.features + d, b);
    }
  }
  j.lost = j.s != j.s;
  j.none = j.s == 0;
  return j;
}

MK_PLAIN_KERNEL(kPlaneFinishThreads) memokern_plane_state(MK_PARAMS(PlaneParams, p)) {
  const i64 b = (i64)block_x() * kPlaneFinishThreads + thread_index();
  if (b >= p.b) return;
  const PlaneJoined j = join_parts(p, b);
  const double nan = not_a_number();
  MK_UNROLL
  for (int d = 0; d < kMostFeatures; d++) {
    if (d >= p.d) continue;
    p.sum[b * p.d + d] = (float)(j.lost ? nan : j.none ? 0 : j.acc[d] - j.s * p.center[d]);
    p.residual[b * p.d + d] = (float)(j.lost ? nan : j.none ? 0 : j.pull[d]);
  }
  p.key[b] = j.lost ? 0 : j.none ? infinity() : j.key;
  p.m[b] = j.lost ? 0 : j.none ? -infinity() : j.m;
  p.s[b] = j.lost ? nan : j.s;
  p.s_v[b] = j.lost ? nan : j.s_v;
  p.s_bias[b] = j.lost ? nan : j.s_bias;
  p.s_sq[b] = j.lost ? nan : j.s_sq;
}

MK_PLAIN_KERNEL(kPlaneFinishThreads) memokern_plane_sums(MK_PARAMS(PlaneParams, p)) {
  const i64 b = (i64)block_x() * kPlaneFinishThreads + thread_index();
  if (b >= p.b) return;
  const PlaneJoined j = join_parts(p, b);
  const double nan = not_a_number(), t = p.temperature[b], sigma = p.sigma[b];
  const bool unknown = j.lost || j.none;
  // Infinite parts are missing: at sigma = 0 the distance, unless the nearest row is hit; with weighting
  // "log" that of a hit.
  const double beyond = !p.log && j.key > 0 && !unknown ? -0.5 * (j.key / sigma) / sigma : 0;
  const bool hit = p.log && j.key == 0;
  MK_UNROLL
  for (int d = 0; d < kMostFeatures; d++) {
    if (d >= p.d) continue;
    p.mean[b * p.d + d] = (float)(unknown ? nan : j.acc[d] / j.s);
    p.residual[b * p.d + d] = (float)(unknown ? nan : j.pull[d] / j.s);
  }
  p.log_z[b] = j.lost ? nan : j.none ? -infinity() : hit ? infinity() : t * (j.m + log(j.s)) + beyond;
  p.mean_logit[b] = unknown ? nan : hit ? infinity() : t * (j.m + j.s_v / j.s) + beyond;
  p.mean_bias[b] = unknown ? nan : j.s_bias / j.s;
  p.weight_sq[b] = unknown ? nan : j.s_sq / (j.s * j.s);
}

}  // namespace cuda
}  // namespace memokern
