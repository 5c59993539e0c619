// What the host hands to the kernels of listed/, as in common/abi.h.
#pragma once
#include "common/abi.h"

namespace memokern {
namespace cuda {

// The rows of what is known of a list, [kListed][b] float64: the sums of calls.Sums, before a query that is
// lost makes them NaN; E and L - E, mean_logit and log_z without the distance that is infinite at sigma = 0;
// the query's mode; and the sum of the factors in the gradient.
enum ListedRow : int { LogZ, MeanLogit, MeanBias, WeightSq, Middle, Above, ListMode, FactorSum, kListed };

// Of every kernel in listed/.
struct ListedParams {
  const void* rows;                                    // [n][d], `stride` elements from a row to the next
  const double* bias;                                  // [n] or null
  const float* x;                                      // [b][d]
  const double* sigma;                                 // [b]
  const double* alpha;                                 // [b]
  const double* temperature;                           // [b]
  const i64* start;                                    // [b + 1] where lists begin in `index`
  const i64* index;                                    // [m] rows
  double* r2;                                          // [m] |x - alpha y|^2
  double* weight;                                      // [m]
  double* known;                                       // [kListed][b]
  double* part;                                        // [parts][b][d] sums of rows times weights, or factors
  float *mean, *residual;                              // [b][d] out
  double *log_z, *mean_logit, *mean_bias, *weight_sq;  // [b] out
  // The gradients for the sums, and what they become.
  const double* grad_mean;                                                       // [b][d]
  const double *grad_log_z, *grad_mean_logit, *grad_mean_bias, *grad_weight_sq;  // [b]
  double *gy, *xy;                                     // [m] <g, y>, <x - alpha y, y>
  double* factor;                                      // [m] of a row in grad_x
  double* pair_bias;                                   // [m] out
  float* grad_x;                                       // [b][d] out
  double *grad_sigma, *grad_alpha, *grad_temperature;  // [b] out
  double scale, shift;
  i64 b, n, d, stride, m, parts;
  i64 backward;  // 1 where `factor` takes the place of `weight`
};

}  // namespace cuda
}  // namespace memokern
