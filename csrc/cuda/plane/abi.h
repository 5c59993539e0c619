// What the host hands to the kernels of plane/, as in common/abi.h.
#pragma once
#include "common/abi.h"

namespace memokern {
namespace cuda {

// The rows of a part's sums, [kPlaneSums + 2 F][b] float64 for rows of F features: the fields of calls.State;
// then F of sum e^(v - m) y, and F of sum e^(v - m) (alpha y - x). A query that is lost has sums of NaN.
enum PlaneRow : int { PKey, PM, PS, PSV, PSBias, PSSq, kPlaneSums };

// Of every kernel in plane/.
struct PlaneParams {
  const void* rows;           // [n][d], `stride` elements from a row to the next
  const double* bias;         // [n] or null
  const float* x;             // [b][d]
  const double* sigma;        // [b]
  const double* alpha;        // [b]
  const double* temperature;  // [b]
  const double* center;       // [d]
  const double* largest;      // [3] the largest |y - center|^2, |center|^2, the largest |bias| but -inf
  double* part;               // [parts][kPlaneSums + 2 F][b]
  float* residual;            // [b][d] out
  double *key, *m, *s, *s_v, *s_bias, *s_sq;           // [b] out of memokern_plane_state
  float* sum;                                          // [b][d] out of memokern_plane_state: calls.State.acc
  float* mean;                                         // [b][d] out of memokern_plane_sums
  double *log_z, *mean_logit, *mean_bias, *weight_sq;  // [b] out of memokern_plane_sums
  double scale, shift;
  i64 b, n, d, stride, parts;
  i64 log;       // 1 for the weighting "log"
  i64 features;  // F
};

}  // namespace cuda
}  // namespace memokern
