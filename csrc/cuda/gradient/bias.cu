// The gradients for the biases: of a row, the sum over the queries of the pairs' parts. A thread owns a row
// and streams the queries, so that the order of the sums is always the same.
#include "common/device.h"

namespace memokern {
namespace cuda {

enum { kBiasThreads = 256 };

MK_PLAIN_KERNEL(kBiasThreads) memokern_gradient_bias(MK_PARAMS(GradientParams, p)) {
  const i64 n = (i64)block_x() * kBiasThreads + thread_index();
  if (n >= p.n) return;
  double sum = p.first ? 0 : p.grad_bias[n];
  for (i64 b = 0; b < p.b; b++) sum += p.pairs[b * p.n + n];
  p.grad_bias[n] = sum;
}

}  // namespace cuda
}  // namespace memokern
