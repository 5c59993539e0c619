// The backward sweep for wide rows in one launch: the gradients for the queries, given those for their sums.
//
// The loop of the dense sweep (sweep/loop.h) once more, with weights taken from log_z. A tile is multiplied
// by the queries and by the gradients of their means at once, and from both products comes the coefficient of
// every pair (coefficients.h). After each tile acc, in registers, is the sum of q c u for the block's
// features, and the owner of a query has its other sums. Writes a part for each cluster: sums, acc, near; and
// the pairs' gradients for the biases. Traffic: each row once, queries and their gradients once per cluster.
#include "gradient/coefficients.h"
#include "sweep/loop.h"

namespace memokern {
namespace cuda {

MK_KERNEL(kCluster, kThreads, kResident) memokern_gradient(MK_PARAMS(GradientParams, p)) { sweep_rows(p); }

}  // namespace cuda
}  // namespace memokern
