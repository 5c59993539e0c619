// What a list's distances make: weights and sums, and the rows' factors in the gradient, all in float64. One
// block owns a query and streams its list, a row in each thread.
#include "listed/lists.h"

namespace memokern {
namespace cuda {

MK_DEVICE constexpr i64 listed_shared_bytes() { return array_bytes(8 * kListWarps); }

// How a query weighs its list. s and t: its noise, 1 where only the nearest rows count, and temperature.
struct Weighing {
  Mode mode;
  double s, t;
};
MK_DEVICE Weighing weighing_of(const ListedParams& p, i64 b, double* shared) {
  // sigma counts as 0 where r^2 / (sigma^2 T) could come near 1.8e308, where float64 overflows.
  const double most_logit = 1e280;
  double sum = 0;
  for (i64 d = thread_index(); d < p.d; d += kListThreads) sum += (double)p.x[b * p.d + d] * p.x[b * p.d + d];
  const double xx = block_sum(sum, shared, kListWarps), sigma = p.sigma[b], inverse = 1 / p.temperature[b];
  // Comparisons with NaN are false.
  const bool known = xx < infinity() && sigma >= 0 && inverse > 0 && inverse < infinity();
  const bool soft = inverse / sigma / sigma * (xx + 1) < most_logit;
  const Mode mode = !known ? kLost : soft ? kSoft : kHard;
  return {mode, mode == kHard ? 1 : sigma, p.temperature[b]};
}

// A row's part of the logit that comes from its distance.
MK_DEVICE double far_of(const Weighing& w, double r2, double key) {
  if (w.mode == kHard) return r2 == key ? 0 : infinity();
  return 0.5 * (r2 / w.s) / w.s;
}

// The largest t of a list, and the least distance of a row that may have weight. bad: NaN where a distance
// is not finite, which a maximum would pass over.
struct Top {
  double key, m, bad;
};
MK_DEVICE Top top_of(const ListedParams& p, const List& list, const Weighing& w, double* shared) {
  Top top = {infinity(), -infinity(), 0};
  for (i64 i = list.first + thread_index(); i < list.last; i += kListThreads) {
    const double r2 = p.r2[i], bias = bias_at(p, i);
    top.bad += r2 - r2;
    if (bias > -infinity()) top.key = fmin(top.key, r2);
    top.m = fmax(top.m, (bias - 0.5 * (r2 / w.s) / w.s) / w.t);
  }
  top.key = block_min(top.key, shared, kListWarps);
  if (w.mode == kHard) {  // only the nearest rows count, and only their biases
    top.m = -infinity();
    for (i64 i = list.first + thread_index(); i < list.last; i += kListThreads)
      if (p.r2[i] == top.key) top.m = fmax(top.m, bias_at(p, i) / w.t);
  }
  top.m = block_max(top.m, shared, kListWarps);
  top.bad = block_sum(top.bad, shared, kListWarps);
  return top;
}

MK_PLAIN_KERNEL(kListThreads) memokern_listed_weights(MK_PARAMS(ListedParams, p)) {
  u8* next = shared_memory();
  double* const shared = next_array<double>(next, kListWarps);
  const i64 b = block_x();
  const List list = list_of(p, b);
  const Weighing w = weighing_of(p, b, shared);
  const Top top = top_of(p, list, w, shared);
  const bool some = top.m > -infinity();
  const double m = some ? top.m : 0, nan = not_a_number();
  double s = 0, s_t = 0, s_bias = 0, s_sq = 0;
  for (i64 i = list.first + thread_index(); i < list.last; i += kListThreads) {
    const double bias = bias_at(p, i), t = (bias - far_of(w, p.r2[i], top.key)) / w.t - m, e = exp(t);
    s += e;
    if (e > 0) s_t += e * t;
    if (e > 0) s_bias += e * bias;
    s_sq += e * e;
    p.weight[i] = e;
  }
  s = block_sum(s, shared, kListWarps) + top.bad;
  s_t = block_sum(s_t, shared, kListWarps);
  s_bias = block_sum(s_bias, shared, kListWarps);
  s_sq = block_sum(s_sq, shared, kListWarps);
  for (i64 i = list.first + thread_index(); i < list.last; i += kListThreads)
    p.weight[i] = some ? p.weight[i] / s : 0;
  if (thread_index() != 0) return;
  const double mean = s_t / s, middle = w.t * (m + mean), above = w.t * (log(s) - mean);
  const double sigma = p.sigma[b];
  const double away = w.mode == kHard && top.key > 0 ? 0.5 * (top.key / sigma) / sigma : 0;
  double* const to = p.known + b;
  const double sums[4] = {some ? middle + above - away : -infinity(), some ? middle - away : nan,
                          some ? s_bias / s : nan, some ? s_sq / s / s : nan};
  to[LogZ * p.b] = sums[0];
  to[MeanLogit * p.b] = sums[1];
  to[Middle * p.b] = some ? middle : 0;
  to[Above * p.b] = some ? above : 0;
  to[ListMode * p.b] = w.mode;
  if (p.backward) return;
  const bool lost = w.mode == kLost;
  p.log_z[b] = lost ? nan : sums[0];
  p.mean_logit[b] = lost ? nan : sums[1];
  p.mean_bias[b] = lost ? nan : sums[2];
  p.weight_sq[b] = lost ? nan : sums[3];
}

// With h = <g, y> + gE l + gb b + 2 gS w it is factor = w (gL + gE + (h - sum w h) / T),
// grad_sigma = sum factor r^2 / sigma^3, grad_alpha = sum factor <x - alpha y, y> / sigma^2,
// grad_T = gL (L - E) / T - sum w (l - E) h / T^2, and a pair adds factor + gb w to its row's bias. At sigma
// = 0 only bias and temperature still move the weights.
MK_PLAIN_KERNEL(kListThreads) memokern_listed_factors(MK_PARAMS(ListedParams, p)) {
  u8* next = shared_memory();
  double* const shared = next_array<double>(next, kListWarps);
  const i64 b = block_x();
  const List list = list_of(p, b);
  const double* const of = p.known + b;
  const Mode mode = (Mode)(int)of[ListMode * p.b];
  const bool hard = mode == kHard, lost = mode == kLost;
  const double s = hard ? 1 : p.sigma[b], t = p.temperature[b], middle = of[Middle * p.b];
  const double above = of[Above * p.b], nan = not_a_number();
  // At sigma = 0 log_z and mean_logit are infinite, unless a row is hit exactly.
  const bool finite = !hard || of[LogZ * p.b] > -infinity();
  const double g_l = finite ? p.grad_log_z[b] : 0, g_e = finite ? p.grad_mean_logit[b] : 0;
  const double g_b = p.grad_mean_bias[b], g_s = p.grad_weight_sq[b];
  double mean_h = 0;
  for (i64 i = list.first + thread_index(); i < list.last; i += kListThreads) {
    const double w = p.weight[i], bias = bias_at(p, i), far = hard ? 0 : 0.5 * (p.r2[i] / s) / s;
    const double h = w == 0 ? 0 : p.gy[i] + g_e * (bias - far - middle) + g_b * bias + 2 * g_s * w;
    mean_h += w * h;
    p.gy[i] = h;
  }
  mean_h = block_sum(mean_h, shared, kListWarps);
  double by_sigma = 0, by_alpha = 0, by_t = 0, all = 0;
  for (i64 i = list.first + thread_index(); i < list.last; i += kListThreads) {
    const double w = p.weight[i], bias = bias_at(p, i), r2 = hard ? 0 : (p.r2[i] / s) / s;
    const double h = p.gy[i] - mean_h, c = w == 0 ? 0 : w * (g_l + g_e + h / t), moved = hard ? 0 : c;
    if (w != 0) {
      by_t += w * (bias - 0.5 * r2 - middle) * h;
      by_sigma += moved * r2;
      by_alpha += moved * p.xy[i];
    }
    all += moved;
    p.factor[i] = moved;
    p.pair_bias[i] = lost ? nan : c + g_b * w;
  }
  by_sigma = block_sum(by_sigma, shared, kListWarps);
  by_alpha = block_sum(by_alpha, shared, kListWarps);
  by_t = block_sum(by_t, shared, kListWarps);
  all = block_sum(all, shared, kListWarps);
  if (thread_index() != 0) return;
  p.grad_sigma[b] = lost ? nan : by_sigma / s;
  p.grad_alpha[b] = lost ? nan : by_alpha / s / s;
  p.grad_temperature[b] = lost ? nan : g_l * above / t - by_t / t / t;
  p.known[FactorSum * p.b + b] = all;
}

}  // namespace cuda
}  // namespace memokern
