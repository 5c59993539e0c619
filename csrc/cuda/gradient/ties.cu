// Queries of which only the nearest rows have weight, in the backward sweep: at sigma = 0, and where a row is
// hit with the weighting "log". Only the biases and the temperature still move them.
//
// One block owns a query, and ends at once for all others; a warp streams every so-manieth row, twice: for
// the least |x - alpha y|^2, the largest bias m of the rows that share it and the sum z of their e^((b - m) /
// T); then for these rows' parts of the gradients. A query that is lost makes the first of them NaN. Launched
// where there is a bias, after the sweep, which has written zeros.
#include "common/rows.h"
#include "common/warp.h"

namespace memokern {
namespace cuda {

enum { kTieThreads = 256, kTieWarps = kTieThreads / 32 };

// The rows that share the least distance so far.
struct Ties {
  double least, m, z;
};
MK_DEVICE Ties join_ties(const Ties& a, const Ties& b, double inv_t) {
  if (a.z == 0 || (b.z != 0 && b.least < a.least)) return b;
  if (b.z == 0 || a.least < b.least) return a;
  Ties both = {a.least, fmax(a.m, b.m), 0};
  both.z = a.z * exp((a.m - both.m) * inv_t) + b.z * exp((b.m - both.m) * inv_t);
  return both;
}

MK_DEVICE double row_distance(const GradientParams& p, i64 b, i64 n, double alpha) {
  double sum = 0;
#pragma unroll 4
  for (i64 d = lane_index(); d < p.d; d += 32) {
    const double v = difference_at<MK_ROWS>(p.rows, n * p.stride + d, p.x[b * p.d + d], alpha, (float)p.scale,
                                            (float)p.shift);
    sum += v * v;
  }
  return warp_sum(sum);
}

MK_PLAIN_KERNEL(kTieThreads) memokern_gradient_ties(MK_PARAMS(GradientParams, p)) {
  const i64 b = block_x(), q = p.queries;
  const int mode = (int)p.table[ModeRow * q + b], warp = warp_index(), lane = lane_index();
  double* const shared = (double*)shared_memory();  // [4][kTieWarps]
  const double log_z = p.log_z[b];
  const bool lost = mode == kLost || log_z != log_z;
  if (lost && thread_index() == 0) p.pairs[b * p.n] = (float)not_a_number();
  if (lost || (mode != kHard && !(mode == kLog && log_z == infinity()))) return;
  const double alpha = p.alpha[b], t = p.temperature[b], inv_t = 1 / t, inf = infinity();
  Ties ties = {inf, -inf, 0};
  for (i64 n = warp; n < p.n; n += kTieWarps) {
    if (p.bias[n] == -inf) continue;
    const Ties one = {row_distance(p, b, n, alpha), p.bias[n], 1};
    ties = join_ties(ties, one, inv_t);
  }
  if (lane == 0) {
    shared[warp] = ties.least;
    shared[kTieWarps + warp] = ties.m;
    shared[2 * kTieWarps + warp] = ties.z;
  }
  block_sync();
  ties = {inf, -inf, 0};
  for (int w = 0; w < kTieWarps; w++)
    ties = join_ties(ties, {shared[w], shared[kTieWarps + w], shared[2 * kTieWarps + w]}, inv_t);
  // Where log_z and mean_logit are finite, at distance 0 or a sigma above 0, they follow the bias.
  const bool finite = log_z > -inf && log_z < inf;
  const double g_l = finite ? p.grad_log_z[b] : 0, g_e = finite ? p.grad_mean_logit[b] : 0;
  const double g_b = p.grad_mean_bias[b], mean_bias = p.mean_bias[b], weight_sq = p.weight_sq[b];
  double temp = 0;
  for (i64 n = warp; n < p.n; n += kTieWarps) {
    if (ties.z == 0 || p.bias[n] == -inf || row_distance(p, b, n, alpha) != ties.least) continue;
    double gy = 0;
    for (i64 d = lane; d < p.d; d += 32)
      gy +=
          p.grad_mean[b * p.d + d] *
          (value_at<MK_ROWS>(p.rows, n * p.stride + d, (float)p.scale, (float)p.shift) - p.mean[b * p.d + d]);
    gy = warp_sum(gy);
    const double w = exp((p.bias[n] - ties.m) * inv_t) / ties.z, off = p.bias[n] - mean_bias;
    const double h = (gy + (g_e + g_b) * off + 2 * p.grad_weight_sq[b] * (w - weight_sq)) * inv_t;
    temp += w * off * h;
    if (lane == 0) p.pairs[b * p.n + n] = (float)(w * (g_l + g_e + g_b + h));
  }
  if (lane == 0) shared[3 * kTieWarps + warp] = temp;
  block_sync();
  if (thread_index() != 0) return;
  temp = 0;
  for (int w = 0; w < kTieWarps; w++) temp += shared[3 * kTieWarps + w];
  p.sums[Temp * q + b] += temp;  // of the first part
}

}  // namespace cuda
}  // namespace memokern
