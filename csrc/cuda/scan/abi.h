// What the host hands to the kernels of scan/, as in common/abi.h.
#pragma once
#include "common/abi.h"

namespace memokern {
namespace cuda {

// Of every kernel in scan/. A query's numbers are scaled once, [X] with X = kept + bands + 1 and kept =
// k0 + fine_width: alpha z, |alpha| |x_b| of each band, |alpha| |xc|.
//
// A query's list lies in its own n places of `index` and `left`, as many as `count` says, so that no kernel
// waits for another query's.
struct ScanParams {
  const void* rows;           // [n][d], `stride` elements from a row to the next
  const double* sq_norms;     // [n] |y - center|^2
  const double* bias;         // [n] or null
  const float* x;             // [b][d]
  const double* sigma;        // [b]
  const double* alpha;        // [b]
  const double* temperature;  // [b]
  const float* coarse;        // [n][k0 + bands + 1] coordinates, norms of the bands, pad
  const void* fine;           // [n][fine_width] float16 or float32: further coordinates
  const float* z;             // [b][kept]
  const float* norms;         // [b][bands + 1]
  const double* margin;       // [b]
  const double* sq;           // [b]
  const double* largest;      // [3] the largest |y - center|^2, |center|^2, the largest |bias|
  float* scaled;              // [b][X]
  double* reach;              // [b] from the best sum to the least bound of a row that is kept; inf: lost
  double* best;               // [b] the largest s_n - |xc|^2 / 2 that is known to be reached
  float* least;               // [b] what a bound must not lie below; inf: nothing is kept
  float* bound;               // [b][n] of every row, at the first level
  float* guess;               // [b][groups] the most that the first level promises in a group of rows
  u32* place;                 // [b][groups] and the row that does
  u32* chunk;                 // [b][chunks] rows of each chunk that the first level leaves
  u32* index;                 // [b][n] rows that are left, ascending
  float* left;                // [b][n] and their bounds
  i64* count;                 // [b] how many there are
  i64* level;                 // [b] out
  double* threshold;          // [b] out
  i64* start;                 // [b + 1] out: where lists begin in `out`
  i64* out;                   // [start[b]] out: the lists, one after the other
  double scale, shift;
  double span;  // log(n / eps)
  i64 b, n, d, stride;
  i64 k0, bands, fine_width;
  i64 most_listed;
  i64 parts;           // blocks that share a query's list
  i64 k1, k2, b1, b2;  // of a later level: its coordinates in `fine`, and the bands that they replace
  i64 first;           // 1 for the first of the later levels, where the error of stored coordinates comes in
};

}  // namespace cuda
}  // namespace memokern
