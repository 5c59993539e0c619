// What the clusters' parts hold of a query's features, added up in the order of the parts.
//
// A warp knows of 32 parts at a time what they are multiplied by, one in each lane, so that no thread waits
// for one part's numbers before it asks for those of the next.
#pragma once
#include "common/warp.h"

namespace memokern {
namespace cuda {

enum { kPartFeatures = 4, kPartsAhead = 4 };  // of a thread; whose numbers are on the way together

// How a part's sums enter: `factor` is what they are multiplied by, 0 where they are not read.
struct PartFactor {
  double factor;
  bool has_near;
};

// acc and near [parts][..] of a query, `step` numbers from a part to the next, at the thread's features,
// first and every `apart`, of which those below d exist. factor_of(part) is asked in the part's lane.
struct PartSums {
  double acc[kPartFeatures], near[kPartFeatures];
};
template <class FactorOf>
MK_DEVICE PartSums sum_parts(const float* acc, const float* near, i64 parts, i64 step, i64 first, i64 apart,
                             i64 d, const FactorOf& factor_of) {
  PartSums sums = {};
  for (i64 from = 0; from < parts; from += 32) {
    const i64 own = from + lane_index();
    PartFactor mine = {0, false};
    if (own < parts) mine = factor_of(own);
    if (!(mine.factor > 0)) mine = {0, false};
    const u32 read = warp_ballot(mine.factor > 0), read_near = warp_ballot(mine.has_near);
    for (int i = 0; i < 32 && read >> i; i += kPartsAhead) {
      float a[kPartsAhead][kPartFeatures], n[kPartsAhead][kPartFeatures];
      MK_UNROLL
      for (int u = 0; u < kPartsAhead; u++)
        for (int k = 0; k < kPartFeatures; k++) {
          const i64 at = first + k * apart, to = (from + i + u) * step + at;
          a[u][k] = at < d && read >> (i + u) & 1 ? acc[to] : 0;
          n[u][k] = at < d && read_near >> (i + u) & 1 ? near[to] : 0;
        }
      MK_UNROLL
      for (int u = 0; u < kPartsAhead; u++) {
        const double f = warp_from(mine.factor, i + u);
        MK_UNROLL
        for (int k = 0; k < kPartFeatures; k++) {
          sums.acc[k] += f * a[u][k];
          sums.near[k] += f * n[u][k];
        }
      }
    }
  }
  return sums;
}

}  // namespace cuda
}  // namespace memokern
