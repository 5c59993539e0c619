// What the binding and the kernels agree on: plain structs of pointers and sizes, and one table of functions
// for each instruction set. They correspond to the call objects of memokern/calls, field by field.
//
// Every source file that is compiled for one instruction set includes this header, so it includes no torch,
// no pybind11 and nothing of the C++ library. [n], [b] and [d] are the numbers of rows, queries and features.
#pragma once
#include <stdint.h>

#include "memokern/constants.h"

namespace memokern {

// Whether a call is to end early. All of its threads ask, at the same time.
struct Watch {
  bool (*stopped)(Watch*);
};

// The training rows, y[i][j] = data[i * stride + j] * scale + shift.
struct Rows {
  const void* data;  // [n] rows of [d] numbers, `stride` numbers apart
  int64_t n, d, stride;
  int type;  // RowType
  double scale, shift;
  const double* center;    // [d], or null: the kernel takes the mean of a few rows
  const double* sq_norms;  // [n] |y - center|^2, or null: computed in the sweep
};

// The rows' conditions, and what each query asks of them: its logit of row i gets
// -(|c - rows[i]|^2 - |c - a|^2) / (2 h^2), which is at most 0.
struct Conditions {
  const double* rows;  // [n][k], or null: nothing is asked
  const double* c;     // [b][k]
  const double* h;     // [b] >= 0; at 0 the limit
  const double* a;     // [b][k] the condition of the nearest of all rows
  int64_t k;
};

// `x` and whatever else has "the type of x" hold double where `f64`, else float. It is the type that a sweep
// computes in: double where the queries or the rows are.
struct Queries {
  const void* x;  // [b][d]
  bool f64;
  int64_t b;
  const double* sigma;        // [b]
  const double* alpha;        // [b]
  const double* temperature;  // [b]
  const double* bias;         // [n] or null
  int weighting;              // Weighting
  Conditions conditions;      // of posterior, posterior_state and posterior_backward only, as is leave_out
  const int64_t* leave_out;   // [b] a row that does not count, -1 for none; or null
  Watch* watch;               // or null
};

// Normalised sums over the rows, to be written.
struct Sums {
  void* mean;          // [b][d] the type of x, or null
  double* log_z;       // [b]
  double* mean_logit;  // [b]
  double* mean_bias;   // [b]
  double* weight_sq;   // [b]
  void* residual;      // [b][d] the type of x: alpha mean - x, from the differences alpha y - x; or null
};

// The same, to be read: the results of a forward call, or the gradients that arrive for them.
struct SumsIn {
  const double* mean;        // [b][d]
  const double* log_z;       // [b]
  const double* mean_logit;  // [b]
  const double* mean_bias;   // [b]
  const double* weight_sq;   // [b]
};

// Sums that are not normalised, to be written: one State (memokern/state.h) for each query, and its
// accumulator.
struct States {
  double* key;     // [b]
  double* m;       // [b]
  double* s;       // [b]
  double* s_v;     // [b]
  double* s_bias;  // [b]
  double* s_sq;    // [b]
  void* acc;       // [b][d] the type of x: the sum of e^(v - m) (y - center)
  void* residual;  // [b][d] the type of x: the sum of e^(v - m) (alpha y - x)
  double* center;  // [d] the center of the accumulator
};

// Gradients for the queries, to be written.
struct Gradients {
  void* x;              // [b][d] the type of x
  double* sigma;        // [b]
  double* alpha;        // [b]
  double* temperature;  // [b]
  double* bias;         // [n], or null where there is no bias
  double* condition;    // [b][k], and
  double* bandwidth;    // [b]: for c and h, or null where there are no conditions
};

// The k nearest rows of each query, to be written.
struct Neighbours {
  double* sq_dist;  // [b][k] ascending
  int64_t* index;   // [b][k]
  int64_t k;
};

// For each query a list of rows: those of query i are index[start[i]] .. index[start[i + 1] - 1].
struct RowLists {
  const int64_t* start;  // [b + 1]
  const int64_t* index;  // [count]
  int64_t count;
};

// For each query a segment of the rows: query i sees rows first[i] .. end[i] - 1.
struct Segments {
  const int64_t* first;  // [b]
  const int64_t* end;    // [b]
};

// The index of the rows, and the queries in its coordinates (memokern/index): they bound every product.
struct LogitBounds {
  const float* coarse;   // [n][dims[0] + bands + 1] coordinates, band norms, error of the stored coordinates
  const void* fine;      // [n][dims[levels - 1] - dims[0]] the other coordinates, float16 or float
  bool fine_is_half;     // float16
  const float* z;        // [b][dims[levels - 1]] coordinates of the queries
  const float* norms;    // [b][bands + 1] their band norms, then |xc|
  const double* margin;  // [b] what rounding may do to a product
  const double* sq;      // [b] |xc|^2
  const int64_t* dims;   // [levels] ascending
  const int64_t* first_band;  // [levels] the first band beyond dims[level]
  int64_t levels, bands;
  double eps;           // the share of the weight that all rows left out may carry together
  int64_t most_listed;  // the rows of a list that cost as much as a query more in a dense sweep
  double reading;       // what a sweep costs beside its queries, in queries
  // Blocks of rows that lie near each other, or null. A box has the least and the largest value that a
  // block's rows have in the first kBoxCoordinates coordinates, in the norm of the others below dims[0] if
  // there are any, and in each band's norm: `box` numbers, as box_numbers() in cpu/scan/blocks-inl.h counts.
  const int32_t* order;  // [n] rows, block by block
  const float* ordered;  // [n][dims[0] + bands + 1] what `coarse` has of them, in this order
  const float* half;     // [n] -|yc|^2 / 2, in this order
  const float* boxes;    // [panels][box][2][kPanelBlocks] of the blocks
  const float* hulls;    // [groups of panels][box][2][kPanelBlocks] the same of whole panels
  double excess;         // the most that a row's coordinates at level 0 and norms, squared, exceed |yc|^2
};

// What a scan finds, to be written.
struct ScanResult {
  int64_t* start;     // [b + 1]
  double* threshold;  // [b] every row that is not listed has l / T <= threshold
  int64_t* level;     // [b] levels used; 0 where the query was given up
  int64_t* index;     // from malloc: the caller frees it
};

// The basis of an index of images: a cosine transform of x - alpha center (memokern/index/basis.py).
struct CosineTransform {
  int64_t channels, height, width;
  bool channels_last;    // x is [height][width][channels]
  const float* turn;     // [channels][channels] the transform along the channels
  const float* down;     // [height][height] the transform along the columns, a frequency per row
  const float* across;   // [width][width] the transform along the rows
  const int64_t* box;    // [channels][2] frequencies down and across that are computed of a turned channel
  int64_t numbers;       // of all boxes together, each of them [across][down, padded to kProjectionSide]
  const int32_t* place;  // [size] where in the boxes each coordinate lies
  int64_t size, kept;    // coordinates computed, and handed out
  const int64_t* edges;  // [bands + 1] of the bands; the last band is not computed where size < d
  int64_t bands;
  const float* center;  // [d]
  // [3][4] what |xc|, |alpha| and 1 count in four bounds (memokern/index/projection.py)
  const double* bound_weights;
  double largest;  // up to which |xc| no product overflows a float

  int64_t d() const { return channels * height * width; }
};

// Queries in the coordinates of an index, to be written; the fields are as in LogitBounds.
struct Projected {
  float* z;
  float* norms;
  double* margin;
  double* sq;
};

// What a row of a list costs, and a dense sweep of g > 0 queries: sweep + g query. In one unit.
struct SplitCosts {
  double listed, sweep, query;
};

// What pruning found of each query, to be written.
struct Pruned {
  double* threshold;  // as in ScanResult
  int64_t* level;     // the same; 0 where the query is to be swept densely
  int64_t* count;     // rows of its list; 0 for such a query
};

// kNotLists: RowLists that are none. kStopped: the watch said so, and the results are worth nothing. Threads
// may find different ones: the bits of a status are those of all of them.
enum Status : int { kDone = 0, kNoMemory = 1, kNotLists = 2, kStopped = 4 };

// The kernels of one instruction set. Every function returns a Status.
struct Table {
  int64_t abi;  // kAbi of the source that it was compiled from
  const char* name;
  int width;           // floats of one vector
  bool (*integers)();  // whether rows of bytes are multiplied in integers on this processor (pair_vec-inl.h),
  bool (*vnni)();      // and with VNNI
  int (*posterior)(const Rows&, const Queries&, const Sums&, int threads);
  int (*posterior_segments)(const Rows&, const Queries&, const Segments&, const Sums&, int threads);
  int (*posterior_state)(const Rows&, const Queries&, const States&, int threads);
  int (*posterior_backward)(const Rows&, const Queries&, const SumsIn& sums, const SumsIn& grads,
                            const Gradients&, int threads);
  int (*nearest)(const Rows&, const Queries&, const Neighbours&, int threads);
  int (*bound_scan)(const Rows&, const Queries&, const LogitBounds&, ScanResult&, int threads);
  int (*posterior_listed)(const Rows&, const Queries&, const RowLists&, const Sums&, int threads);
  int (*posterior_listed_backward)(const Rows&, const Queries&, const RowLists&, const SumsIn& grads,
                                   const Gradients&, int threads);
  int (*project)(const CosineTransform&, const float* x, const double* alpha, int64_t b, const Projected&,
                 Watch*, int threads);
  int (*posterior_pruned)(const Rows&, const Queries&, const CosineTransform*, const LogitBounds&,
                          const SplitCosts*, const Sums&, const Pruned&, int threads);
};

// A number that changes when a struct does, so that a table of another build is refused and not called.
static constexpr int64_t kAbi =
    sizeof(Rows) + 3 * sizeof(Queries) + 5 * sizeof(Sums) + 7 * sizeof(SumsIn) + 11 * sizeof(States) +
    13 * sizeof(Gradients) + 17 * sizeof(Neighbours) + 19 * sizeof(RowLists) + 23 * sizeof(LogitBounds) +
    29 * sizeof(ScanResult) + 31 * sizeof(CosineTransform) + 37 * sizeof(Projected) + 41 * sizeof(Table) +
    43 * sizeof(Watch) + 47 * sizeof(SplitCosts) + 53 * sizeof(Pruned) + 59 * sizeof(Segments);

const Table* table_baseline();
const Table* table_avx2();
const Table* table_avx512();

}  // namespace memokern
