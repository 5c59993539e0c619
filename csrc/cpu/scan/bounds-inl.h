// What a scan knows of a call: bounds on every logit from few coordinates of a row, and what rounding can do
// to them.
//
// A scan computes in the units of squared distances,
//   s_n = a <xc, yc_n> - a^2 |yc_n|^2 / 2 + sigma^2 b_n = (|xc|^2 - |x - a y_n|^2) / 2 + sigma^2 b_n,
// so that l_n / T = (s_n - |xc|^2 / 2) / (sigma^2 T). A level of the index bounds s_n from above: the
// coordinates below dims[level] give their part of the product exactly, and each band beyond them adds at
// most a |x_b||y_b| (Cauchy and Schwarz). `best` is the largest s_n - |xc|^2 / 2 of the rows that were
// evaluated by direct differences, so it is proven. A row is dropped when its bound, widened by all that
// rounding can do (the slack), is below
//   best + |xc|^2 / 2 - sigma^2 T log(N / eps).
#pragma once
#include "cpu/core/watch-inl.h"
#include "cpu/scan/full_product-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

enum {
  SCAN_B = 64,                     // queries of a block, at most
  SCAN_CHUNK_BYTES = 256 << 10,    // of the bounds of a chunk of rows, which are read again at once, from L2
  SCAN_TILE_ROWS = 10 * ROW_UNIT,  // rows of a tile of the further levels, at most
  SCAN_TILE_NUMBERS = 4096,        // of that tile, about: with a panel of queries and bounds they stay in L1
  SCAN_LIST_ROWS = 4096,           // that any list may grow to before it is cut down
  LOOK_COORDINATES = 16,           // of the first look
  LOOK_MORE = 3,                   // rows that it evaluates beside the best, where few blocks drop out
  SAMPLE_ROWS = 256,               // that show how long a list would be,
  SAMPLE_LEVELS = 64,              // and of those that level 0 leaves so many what the other levels leave
  WORTH_EVALUATING = 24            // rows: a longer list pays for an exact logit, or a full product
};
// Cycles for each feature: of a listed row that has weight; of the full product of a row and a query, and
// once for all queries that have the row, which comes from memory. To read the index costs as much as to
// compute on it for kIndexReading queries. Measured on CIFAR-10, 1 to 64 queries.
static const double kListedCycles = 2.2, kIndexReading = 12;
// As shares of a listed row.
static double full_product_share(const Rows& rows) { return (rows.type == kU8 ? 0.12 : 0.4) / kListedCycles; }
static double row_share(const Rows& rows) { return (rows.type == kU8 ? 0.8 : 3.0) / kListedCycles; }
// A list's length, as a share of what it was expected to be, once the whole index has shown better rows than
// the first look did. It comes from images that were held out, at sigma = 1.9 to 3.3.
static const double kBetterRows = 0.5;
// Where queries have more than this share of the blocks left, all rows are read as they lie: the queries that
// have a block left are fewer than a vector holds, or one by one. On CIFAR-10 both ways take as long at 0.3
// to 0.4 of the blocks.
static const double kBlocksWorth = 0.3;
// With more than this share left, more rows of the first look are evaluated: of images that are not among the
// rows the nearest in a few coordinates may be far, and what a sample of the rows shows then is far too much.
static const double kLookAgain = 0.6;
// How much the bands count in a guess of s_n, against the coordinates. Bounds alone prefer rows of large
// norm, coordinates alone those of small norm. On CIFAR-10 with 32 coordinates, 0.15 to 0.3 find the best row
// for at least 58 of 64 queries up to sigma = 1.1, and for 52 at 1.9.
static const float kBandsInGuess = 0.2f;

// A row that is left, and the upper bound of its s_n.
struct Entry {
  uint32_t n;
  float up;
};
// The rows left to one query, in ascending order.
struct List {
  Entry* e;
  int64_t count, capacity, done;  // the first `done` entries have passed all levels
  double best;                    // the largest s_n - |xc|^2 / 2 of the rows evaluated
  int64_t tried;                  // the last of these rows
  int64_t found;                  // the most promising row at the first look, or -1,
  float guess;                    // and what it promised
  int level;                      // levels used
  double work;                    // cycles spent on its rows by the levels of the index, about
  bool given_up;
  bool push(uint32_t n, float up) {
    if (count == capacity) {
      const int64_t more = imax(256, 2 * capacity);
      Entry* grown = (Entry*)realloc((void*)e, more * sizeof(Entry));
      if (!grown) return false;
      e = grown;
      capacity = more;
    }
    e[count].n = n;
    e[count++].up = up;
    return true;
  }
  void filter(float least) {
    int64_t kept = 0, kept_done = 0;
    for (int64_t i = 0; i < count; i++) {
      if (e[i].up < least) continue;
      kept_done += i < done;
      e[kept++] = e[i];
    }
    count = kept;
    done = kept_done;
  }
};

struct ScanQuery {
  bool active;          // false: it is given up
  double alpha, a, s2;  // a = |alpha|; sigma^2
  double reach, scale;  // |xc|^2 / 2 - sigma^2 T log(N / eps) - slack; sigma^2 T
  // A computed bound below this is that of a row to drop.
  float least(double best) const {
    const float v = (float)(best + reach);
    return active ? v - __builtin_fabsf(v) * 1.3e-7f : (float)kInf;
  }
};

// The call, and what all its tasks share.
struct ScanCall {
  const Rows* rows;
  const Queries* in;
  const LogitBounds* bound;
  Source<float> src;       // for direct differences of float queries, and full products
  Source<double> src_f64;  // for direct differences of double queries: only its `rows` is set
  Exact<float>::F exact;
  Exact<double>::F exact_f64;
  FullProduct::F full_product;
  double y_max;  // the largest |yc|
  ScanQuery* q;  // [b]
  int64_t N, D;
  int64_t k0, K, bands;        // coordinates of level 0, coordinates of all levels, bands
  int64_t stride, last_level;  // of coarse; of the index
  int64_t* order;              // [count] the queries that are not given up, the noisiest first
  int64_t* begin;              // [blocks + 1] where in `order` each block begins
  double* expected;            // [b] the length of a list, as some rows show
  int64_t count, lanes;        // queries in `order`; queries of a block, at most
  int64_t blocks, parts;       // of the queries; of the rows
  int64_t NT, chunks;          // rows of a chunk
  float* sample;  // [SAMPLE_ROWS][stride] some rows of the index, or null: no list can become too long
  List* lists;    // [parts][b]
  bool no_bias;
  bool in_blocks;                   // the index has blocks, and there is no bias, which boxes know nothing of
  int64_t all_blocks, panels, box;  // of the rows; numbers of a box
  float* w;                         // [b][box] the queries as boxes take them
  double* box_q;                    // [b] q of blocks-inl.h
  float* left;                      // [b] the share of the blocks that is left, about
  int64_t* next;  // [b][LOOK_MORE] the rows next to the best of a first look by blocks, or -1

  int64_t sampled(int64_t j) const { return N * j / SAMPLE_ROWS; }
  int64_t rows_of_block(int64_t block) const { return imin(kBlockRows, N - block * kBlockRows); }
  // Whether a sample is worth its time: a query with few blocks left has no long list.
  bool may_be_long(int64_t b) const { return !in_blocks || left[b] >= kBlocksWorth; }
  const float* rows_from(int64_t block) const { return bound->ordered + block * kBlockRows * stride; }
  double bias(int64_t n) const { return no_bias ? 0 : in->bias[n]; }
  // A proven lower bound of s_n - |xc|^2 / 2: the direct difference, less its own rounding.
  double evaluate(int64_t b, int64_t n) const {
    const double r2 = in->f64 ? exact_f64(src_f64, n, (const double*)in->x + b * D, q[b].alpha)
                              : exact(src, n, (const float*)in->x + b * D, q[b].alpha);
    const double v = q[b].s2 * bias(n) - 0.5 * r2;
    const double less = (D + 16) * 2.3e-16 * r2 + 1e-15 * __builtin_fabs(q[b].s2 * bias(n));
    return v == v && v > -kInf ? v - less : -kInf;
  }
  void consider(int64_t b, int64_t n, List& l) const {
    if (n == l.tried) return;
    l.tried = n;
    l.best = dmax(l.best, evaluate(b, n));
  }
};

// Query b of a scan, with its slack: what rounding can do to a computed bound of any row, u = 2^-24. c is
// |center|, b_max the largest |bias|. The parts of the slack are:
// - the products: `margin`, which is given, and 64 u of their size for the query times alpha, its norms, and
//   the sum of at most kMostLevels levels;
// - |yc|^2 and the bias, which are rounded, multiplied, and part of each of the sums that follow:
//   (stride + 64) u of their size;
// - in double: sq_norms, |xc|^2, and direct differences x - alpha y of values that lie off the centre.
static ScanQuery scan_query(const ScanCall& s, int64_t b, double y_max, double c, double b_max) {
  const Queries& in = *s.in;
  ScanQuery q;
  const double sigma = in.sigma[b], T = in.temperature[b], sq = s.bound->sq[b], margin = s.bound->margin[b];
  q.alpha = in.alpha[b];
  q.a = __builtin_fabs(q.alpha);
  q.s2 = sigma * sigma;
  q.scale = q.s2 * T;
  const double u = 6e-8, x = __builtin_sqrt(sq), span = q.scale * __builtin_log(s.N / s.bound->eps);
  const double product = q.a * x * y_max, rest = 0.5 * q.a * q.a * y_max * y_max + q.s2 * b_max;
  const double slack = q.a * margin + 64 * u * product + (s.stride + 64) * u * rest + 1e-12 * sq +
                       1e-15 * q.a * (c + y_max) * (x + q.a * y_max) + 1e-35;
  q.reach = 0.5 * sq - span - slack;
  // Outside of these ranges a float could overflow, or lose sigma^2 b. The query is given up then, which is
  // no loss of correctness: the caller has a way for every query.
  q.active = sigma > 1e-15 && sigma < 1e15 && T > 1e-15 && T < 1e15 && q.a < 1e15 && sq < 1e30 &&
             margin >= 0 && slack < 1e30 && span < 1e30 && product + rest < 1e30;
  return q;
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
