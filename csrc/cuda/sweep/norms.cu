// |y_n - center|^2 in float64, where the rows' owner keeps none. One warp owns a row.
#include "common/rows.h"
#include "common/warp.h"

namespace memokern {
namespace cuda {

enum { kNormThreads = 256 };

MK_PLAIN_KERNEL(kNormThreads) memokern_sq_norms(MK_PARAMS(NormsParams, p)) {
  const i64 n = (i64)block_x() * (kNormThreads / 32) + warp_index();
  if (n >= p.n) return;
  double sum = 0;
#pragma unroll 4
  for (i64 d = lane_index(); d < p.d; d += 32) {
    const double v =
        value_at<MK_ROWS>(p.rows, n * p.stride + d, (float)p.scale, (float)p.shift) - p.center[d];
    sum += v * v;
  }
  sum = warp_sum(sum);
  if (lane_index() == 0) p.sq_norms[n] = sum;
}

}  // namespace cuda
}  // namespace memokern
