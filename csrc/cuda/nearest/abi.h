// What the host hands to the kernels of nearest/, as in common/abi.h.
#pragma once
#include "common/abi.h"

namespace memokern {
namespace cuda {

// Of every kernel in nearest/.
struct NearestParams {
  const void* rows;       // [n][d], `stride` elements from a row to the next
  const float* x;         // [b][d]
  float* about;           // [b][n] |x - y|^2 in float32
  float* least;           // [b][groups] the smallest of a group of kNearRows rows
  float* most;            // [b] what a row's may be at most
  double* part_distance;  // [b][parts][k] of the nearest rows of each part, ascending
  i64* part_index;        // [b][parts][k]
  double* distance;       // [b][k] out
  i64* index;             // [b][k] out
  double scale, shift;
  i64 b, n, d, stride, k, parts;
};

}  // namespace cuda
}  // namespace memokern
