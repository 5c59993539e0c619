// What the clusters' parts hold of a query's features, added up in the order of the parts.
#pragma once
#include "common/warp.h"

namespace memokern {
namespace cuda {

// Features of a thread, and parts whose numbers are on the way together: no part waits for the one before.
enum { kPartFeatures = 4, kPartsAhead = 4 };

// How a part's sums enter: `factor` is what they are multiplied by, 0 where they are not read.
struct PartFactor {
  double factor;
  bool has_near;
};

// Of acc and near [parts][..] of a query, `step` numbers from a part to the next, the thread's features:
// `first` and every `apart`, of which those below d exist. factor_of(part) is the part's PartFactor.
struct PartSums {
  double acc[kPartFeatures], near[kPartFeatures];
};
template <class FactorOf>
MK_DEVICE PartSums sum_parts(const float* acc, const float* near, i64 parts, i64 step, i64 first, i64 apart,
                             i64 d, const FactorOf& factor_of) {
  PartSums sums = {};
  for (i64 part = 0; part < parts; part += kPartsAhead) {
    PartFactor how[kPartsAhead];
    float a[kPartsAhead][kPartFeatures], n[kPartsAhead][kPartFeatures];
    MK_UNROLL
    for (int u = 0; u < kPartsAhead; u++) {
      how[u] = {0, false};
      if (part + u < parts) how[u] = factor_of(part + u);
    }
    MK_UNROLL
    for (int u = 0; u < kPartsAhead; u++)
      for (int k = 0; k < kPartFeatures; k++) {
        const i64 at = first + k * apart, from = (part + u) * step + at;
        const bool read = at < d && how[u].factor > 0;
        a[u][k] = read ? acc[from] : 0;
        n[u][k] = read && how[u].has_near ? near[from] : 0;
      }
    MK_UNROLL
    for (int u = 0; u < kPartsAhead; u++)
      for (int k = 0; k < kPartFeatures; k++) {
        if (!(how[u].factor > 0)) continue;
        sums.acc[k] += how[u].factor * a[u][k];
        sums.near[k] += how[u].factor * n[u][k];
      }
  }
  return sums;
}

}  // namespace cuda
}  // namespace memokern
