// What the host hands to the kernels: plain structs of 8-byte fields, passed by value as each kernel's only
// argument, and the codes that pick a variant. The host's copy is memokern/backends/cuda/abi.py; a test holds
// both to the same offsets.
//
// Pointers carry their shapes. Q is the block of queries that a launch is compiled for, of which the first b
// are real; DP = C * DS is the number of features that a cluster holds, of which the first d are real.
#pragma once

namespace memokern {
namespace cuda {

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// How rows are stored, MK_ROWS: the codes of csrc/include/memokern/constants.h.
enum RowType : int { kF32 = 1, kBF16 = 2, kF16 = 3, kU8 = 4 };

// The rows of the table of queries, [kTable][Q] float64. With <x, u> the product of a query's terms and a row
// as it enters products,
//
//     t = A1 <x, u> - A2 |yc|^2  (+ InvT bias, where the mode is kSoft)
//
// is l / T + Common, up to an error of at most E0 + E1 |yc| + E2 |yc|^2 + E3 |bias|. In the modes kHard and
// kLog, t lacks the bias and stands for the distance: r^2 = 2 (Common - t). Offset is how far the rows'
// centre is from the row that enters products as 0.
//
// With yc a row less the centre and xc = x - alpha centre, <xc, yc> is Dot <x, u> + XO.
enum TableRow : int { A1, A2, InvT, Common, E0, E1, E2, E3, ModeRow, OffsetNorm, Dot, XO, kTable };

// How a query weighs the rows: by its sigma; by the nearest row alone, because sigma is 0 or so small that
// logits would overflow; by the weighting "log"; or not at all, because one of its numbers is not finite.
enum Mode : int { kSoft = 0, kHard = 1, kLog = 2, kLost = 3 };

// The rows of a part's states, [kState][Q] float64: the fields of calls.State, and the weight of the rows
// that the part's accumulator lacks because `near` has them.
enum StateRow : int { Key, M, S, SV, SBias, SSq, NearS, kState };

// The rows of the table of gradients, [kGradientTable][Q] float64: <g, y - mean> is GScale <g, u> + GRest.
enum GradientTableRow : int { GScale, GRest, kGradientTable };

// The rows of a part's sums in the backward sweep, [kGradientSums + 1][Q] float64; the last one is more than
// 0 where `near` has rows. w are the weights, q the gradients for the logits l, and dl / dx is
// c (alpha y - x) / sigma^2, or c (alpha y - x) in the mode kLog:
//   W: of w. Drift: of w <g, y - mean> / T, which is 0 but for rounding, and is taken off at the end.
//   QC: of q c, but for the rows in `near`. QL: of q (l - bias). QA: of q c <x - alpha y, yc>.
//   WA: of w <x - alpha y, yc>. Temp: of w (l - mean_logit) h.
enum GradientRow : int { W, Drift, QC, QL, QA, WA, Temp, kGradientSums, HasNear = kGradientSums };

struct QueriesParams {
  const float* x;             // [b][d]
  const double* sigma;        // [b]
  const double* alpha;        // [b]
  const double* temperature;  // [b]
  const double* center;       // [d]
  u16* terms;                 // [TERMS][Q][DP] out, zero beyond b and d
  double* table;              // [kTable][Q] out
  double scale, shift;        // of the rows
  i64 b, d, dp;
  i64 queries;  // Q
  i64 depth;    // features of a block of the sweep: DS, on which the error of a product depends
  i64 log;      // 1 for the weighting "log"
};

struct SweepParams {
  const void* rows;        // [n][d], `stride` elements from a row to the next
  const double* sq_norms;  // [n] |y - center|^2
  const double* bias;      // [n] or null
  const u16* terms;        // [TERMS][Q][DP]
  const double* table;     // [kTable][Q]
  const float* x;          // [b][d]
  const double* sigma;     // [b]
  const double* alpha;     // [b]
  double* states;          // [clusters][kState][Q] out
  float* acc;              // [clusters][Q][DP] out: sums of e^(v - m) u
  float* near;             // [clusters][Q][DP] out where NearS > 0: sums of e^(v - m) (alpha y - x)
  double scale, shift;
  i64 b, n, d, stride;
};

struct FinishParams {
  const double* states;       // [parts][kState][Q]
  const float* acc;           // [parts][Q][DP]
  const float* near;          // [parts][Q][DP]
  const double* table;        // [kTable][Q]
  const float* x;             // [b][d]
  const double* sigma;        // [b]
  const double* alpha;        // [b]
  const double* temperature;  // [b]
  const double* center;       // [d]
  double scale;
  double zero;  // the value of a row that enters products as 0: shift, and for uint8 shift + 128 scale
  i64 b, d, dp, parts;
  i64 queries;                                         // Q
  float* residual;                                     // [b][d] out
  double *key, *m, *s, *s_v, *s_bias, *s_sq;           // [b] out of memokern_finish_state
  float* sum;                                          // [b][d] out of memokern_finish_state: calls.State.acc
  float* mean;                                         // [b][d] out of memokern_finish_sums
  double *log_z, *mean_logit, *mean_bias, *weight_sq;  // [b] out of memokern_finish_sums
  float* score;                                        // [b][d] out of memokern_finish_sums, or null
  double tikhonov;                                     // c: the score is residual / (sigma^2 + c); 0 for none
  double log_threshold;  // log tau of empirical Bayes: times min(1, Z / tau); -inf for none
};

// Of every kernel in gradient/.
struct GradientParams {
  const void* rows;           // [n][d], `stride` elements from a row to the next
  const double* sq_norms;     // [n]
  const double* bias;         // [n] or null
  const double* center;       // [d]
  const u16* terms;           // [TERMS][Q][DP] of the queries
  const double* table;        // [kTable][Q]
  u16* grad_terms;            // [TERMS][Q][DP] of the gradients of the means: out of memokern_gradient_terms
  double* grad_table;         // [kGradientTable][Q] out of memokern_gradient_terms
  const float* x;             // [b][d]
  const double* sigma;        // [b]
  const double* alpha;        // [b]
  const double* temperature;  // [b]
  // [b][d] and [b]: the sums that the forward sweep gave, and the gradients for them.
  const float *mean, *grad_mean;
  const double *log_z, *mean_logit, *mean_bias, *weight_sq;
  const double *grad_log_z, *grad_mean_logit, *grad_mean_bias, *grad_weight_sq;
  double* sums;                                        // [parts][kGradientSums + 1][Q]
  float* acc;                                          // [parts][Q][DP] sums of q c u
  float* near;                                         // [parts][Q][DP] sums of q c (alpha y - x)
  float* pairs;                                        // [Q][n] q + grad_mean_bias w, or null
  float* grad_x;                                       // [b][d] out
  double *grad_sigma, *grad_alpha, *grad_temperature;  // [b] out
  double* grad_bias;                                   // [n] out, or null
  double scale, shift;
  double zero;  // the value of a row that enters products as 0
  i64 b, n, d, dp, stride, parts;
  i64 queries;  // Q
  i64 first;    // 1 for the first block of queries, whose gradients of the biases are not added to others
};

struct NormsParams {
  const void* rows;      // [n][d]
  const double* center;  // [d]
  double* sq_norms;      // [n] out
  double scale, shift;
  i64 n, d, stride;
};

}  // namespace cuda
}  // namespace memokern
