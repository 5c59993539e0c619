// The parts of the lists, added up in their order: the mean and the residual, or the gradient for x. One
// block owns a query and kListThreads features.
#include "listed/lists.h"

namespace memokern {
namespace cuda {

MK_PLAIN_KERNEL(kListThreads) memokern_listed_finish(MK_PARAMS(ListedParams, p)) {
  const i64 slabs = (p.d + kListThreads - 1) / kListThreads, b = block_x() / slabs;
  const i64 d = block_x() % slabs * kListThreads + thread_index(), at = b * p.d + d;
  if (d >= p.d) return;
  double sum = 0;
  for (i64 part = 0; part < p.parts; part++) sum += p.part[part * p.b * p.d + at];
  const double* const of = p.known + b;
  const Mode mode = (Mode)(int)of[ListMode * p.b];
  const double nan = not_a_number(), x = p.x[at], alpha = p.alpha[b], sigma = p.sigma[b];
  if (p.backward) {
    const double pull = alpha * sum - x * of[FactorSum * p.b];
    p.grad_x[at] = (float)(mode == kLost ? nan : mode == kHard ? 0 : pull / sigma / sigma);
    return;
  }
  // mean_logit is a number wherever a row has weight.
  const bool nothing = mode == kLost || of[MeanLogit * p.b] != of[MeanLogit * p.b];
  const double mean = nothing ? nan : sum;
  p.mean[at] = (float)mean;
  p.residual[at] = (float)(alpha * mean - x);
}

}  // namespace cuda
}  // namespace memokern
