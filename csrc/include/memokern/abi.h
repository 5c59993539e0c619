// What the binding and the kernels agree on: plain structs and one table of functions for each instruction set.
// No torch, no pybind11, no C++ library here: this header is included by every per-ISA translation unit.
#pragma once
#include <stdint.h>

namespace memokern {

enum RowType : int { kF64 = 0, kF32 = 1, kBF16 = 2, kF16 = 3, kU8 = 4 };
enum Kernel : int { kGaussian = 0, kLog = 1 };

// The training rows: y[n][d] = raw[n * stride + d] * scale + shift.
struct Rows {
  const void* data;          // [n] rows of [d], `stride` elements apart
  int64_t n, d, stride;
  int type;                  // RowType
  double scale, shift;
  const double* center;      // [d], or null: the kernel takes the mean of a few rows
  const double* sq_norms;    // [n] |y - center|^2, or null: computed in the sweep
};

struct Queries {
  const void* x;             // [b, d] contiguous, float or double: the compute type
  int64_t b;
  const double* sigma;       // [b]
  const double* alpha;       // [b]
  const double* temperature; // [b]
  const double* bias;        // [n] or null
  int kernel;                // Kernel
};

struct Posterior {
  void* mean;                // [b, d] the type of x
  double* log_z;             // [b], as the three below
  double* mean_logit;
  double* mean_bias;
  double* weight_sq;
};

struct Gradients {
  const double* mean;        // [b, d] forward results
  const double* log_z;       // [b] ...
  const double* mean_logit;
  const double* mean_bias;
  const double* weight_sq;
  const double* g_mean;      // [b, d] incoming gradients
  const double* g_log_z;     // [b] ...
  const double* g_mean_logit;
  const double* g_mean_bias;
  const double* g_weight_sq;
  void* grad_x;              // [b, d] the type of x
  double* grad_sigma;        // [b] ...
  double* grad_alpha;
  double* grad_temperature;
  double* grad_bias;         // [n] or null
};

struct Nearest {
  int64_t k;
  double* sq_dist;           // [b, k] ascending
  int64_t* index;            // [b, k]
};

// The index of the rows, and the queries in its coordinates (memokern/index.py): what bounds every product.
struct Bounds {
  const float* coarse;       // [n, dims[0] + bands + 1]: coordinates, norms of the bands beyond, error of the stored coordinates
  const void* fine;          // [n, dims[levels - 1] - dims[0]]: the other coordinates, float16 or float
  const float* z;            // [b, dims[levels - 1]] the query's coordinates
  const float* norms;        // [b, bands + 1] its norms, the last |xc|
  const double* margin;      // [b] what rounding may do to a product
  const double* sq;          // [b] |xc|^2
  const int64_t* dims;       // [levels] ascending
  const int64_t* first_band; // [levels] the first band beyond dims[level]
  int64_t levels, bands;
  bool half;                 // fine is float16
  double eps;                // weight that the rows left out may carry together
  int64_t cap;               // rows of a list, at most
};

// The basis of an index of images: a cosine transform of x - alpha center (memokern/bases.py).
struct Cosine {
  int64_t channels, height, width, dim;
  bool channels_last;        // x is [h, w, c]
  const float* turn;         // [channels][channels]
  const float* down;         // [frequency][height]
  const float* across;       // [frequency][width]
  const int64_t* box;        // [channels][2] of each rotated channel, how many frequencies down and across are computed
  int64_t boxes;             // numbers of all boxes, each [across][down, padded]
  const int32_t* place;      // [size] where in the boxes each coordinate lies
  int64_t size, kept;        // coordinates computed, and handed out
  const int64_t* edges;      // [bands + 1]; the last band is not computed where size < dim
  int64_t bands;
  const float* center;       // [dim]
  const double* worth;       // [3][4] what |xc|, |alpha| and 1 are worth in four bounds (memokern/projection.py)
  double largest;            // |xc| up to which a product stays in float
};

struct Lists {
  int64_t* start;            // [b + 1] rows of query i: index[start[i] .. start[i + 1])
  double* threshold;         // [b] every other row has l / T <= threshold
  int64_t* level;            // [b] levels used; 0: given up
  int64_t* index;            // malloc'ed: the caller frees it
};

struct Support {             // the rows that count, as in Lists
  const int64_t* start;
  const int64_t* index;
  int64_t count;             // of index
};

// Every function returns 0, 1 when memory could not be had, or 2 when a Support is not one. `f64`: x is double (compute in double).
struct Table {
  const char* name;
  int width;                 // floats of one vector
  int (*posterior)(const Rows&, const Queries&, const Posterior&, bool f64, int threads);
  int (*backward)(const Rows&, const Queries&, const Gradients&, bool f64, int threads);
  int (*nearest)(const Rows&, const Queries&, const Nearest&, bool f64, int threads);
  int (*bound_scan)(const Rows&, const Queries&, const Bounds&, Lists&, bool f64, int threads);
  int (*support)(const Rows&, const Queries&, const Support&, const Posterior&, bool f64, int threads);
  int (*support_backward)(const Rows&, const Queries&, const Support&, const Gradients&, bool f64, int threads);
  int (*project)(const Cosine&, const float* x, const double* alpha, int64_t b, float* z, float* norms, double* margin, double* sq, int threads);
  void (*exp_f32)(const float* x, float* y, int64_t n, bool two);  // e^x, or 2^x
  void (*exp_f64)(const double* x, double* y, int64_t n, bool two);
  void (*merge)(double* a, const double* b, double* factors);  // [6] states (State in logits-inl.h), [2]
};

const Table* table_baseline();
const Table* table_avx2();
const Table* table_avx2w16();
const Table* table_avx512();

}  // namespace memokern
