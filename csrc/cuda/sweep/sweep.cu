// The dense sweep for wide rows in one launch.
//
// One cluster owns every so-manieth tile of rows and streams them past all queries; one block of it owns
// kFeatures features. After each tile m is the largest v = l / T seen, s the sum of e^(v - m), and acc, in
// registers, that of e^(v - m) u for the block's features. A query's state is with the block that owns the
// query. Writes a part for each cluster: states, acc, near. Traffic: each row once, queries once per cluster.
#include "sweep/loop.h"
#include "sweep/weigh.h"

namespace memokern {
namespace cuda {

MK_KERNEL(kCluster, kThreads, kResident) memokern_sweep(MK_PARAMS(SweepParams, p)) { sweep_rows(p); }

}  // namespace cuda
}  // namespace memokern
