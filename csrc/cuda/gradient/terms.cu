// The gradients g of the means, as 16-bit terms, as queries.cu has the queries; and what <g, y - mean> is
// with them. One block owns a query and streams its features twice. Those beyond the last one become zeros.
#include "common/rows.h"
#include "common/terms.h"

namespace memokern {
namespace cuda {

MK_PLAIN_KERNEL(kQueryThreads) memokern_gradient_terms(MK_PARAMS(GradientParams, p)) {
  const i64 b = block_x();
  float p2 = 1;
  if (b < p.b) {
    double* const shared = (double*)shared_memory();  // [2][kQueryWarps]
    double rest = 0, top = 0;
    for (i64 d = thread_index(); d < p.d; d += kQueryThreads) {
      const double g = p.grad_mean[b * p.d + d];
      rest += g * (p.zero - p.mean[b * p.d + d]);
      top = fmax(top, fabs(g));
    }
    const double all[2] = {warp_sum(rest), warp_max(top)};
    const int warp = warp_index();
    if (lane_index() == 0)
      for (int i = 0; i < 2; i++) shared[i * kQueryWarps + warp] = all[i];
    block_sync();
    rest = top = 0;
    for (int w = 0; w < kQueryWarps; w++) {
      rest += shared[w];
      top = fmax(top, shared[kQueryWarps + w]);
    }
    p2 = power_of_two((float)top);
    if (thread_index() == 0) {
      p.grad_table[GScale * p.queries + b] = p.scale * (p2 / 128.0);
      p.grad_table[GRest * p.queries + b] = rest;
    }
  }
  for (i64 d = thread_index(); d < p.dp; d += kQueryThreads)
    write_terms<MK_ROWS>(b < p.b && d < p.d ? (float)(p.grad_mean[b * p.d + d] * (128.0 / p2)) : 0.0f,
                         p.grad_terms + b * p.dp + d, p.queries * p.dp);
}

}  // namespace cuda
}  // namespace memokern
