// The dense sweep for rows of few features and many queries. One block owns kPlaneThreads queries, one in
// each thread, and a part of the rows, which it streams in tiles of kTile, read by all threads at once. After
// each tile a thread has the state of its query over the rows so far. Writes one part's sums of each query.
// The rows cross device memory once for each block of queries, and stay in the L2 cache; exponentials are
// what takes time.
//
// Differences in float32: with x / alpha = high + low, a number and what is left of it, (y - high) - low is
// right to two roundings of itself, since y - high is exact where it cancels. So r^2, and with it the logit,
// is right to a share of itself, and sums are made from float32 wherever the largest logit is small; that is
// known after the rows. The warp of any other query goes through them again in float64, as that of one which
// only the nearest rows weigh for does at once.
#include "common/arrays.h"
#include "common/rows.h"
#include "common/special.h"
#include "plane/abi.h"

namespace memokern {
namespace cuda {

// Eight features leave registers for three blocks of half as many threads.
enum { kF = MK_FEATURES, kPlaneThreads = kF == 8 ? 128 : 256, kPlaneBlocks = kF == 8 ? 3 : 2 };
enum { kTile = 128 };

MK_DEVICE constexpr i64 plane_shared_bytes() {
  return array_bytes(4 * kTile * kF) + array_bytes(8 * kTile * kF) + array_bytes(4 * kTile) +
         array_bytes(8 * kTile);
}
// A tile of rows: their values and biases, in both precisions. Rows beyond the last have bias -inf.
struct PlaneTile {
  float* y;        // [kTile][kF]
  double* wide_y;  // [kTile][kF]
  float* bias;     // [kTile]
  double* wide_bias;
};
struct alignas(kF == 2 ? 8 : 16) PlaneRowValues {
  float v[kF];
};

// How a query is swept: not at all; in float32, where sums of weights times values lead to those of
// differences, or the other way; in float64.
enum How : int { kNothing, kDifferences, kValues, kWide };

struct PlaneQuery {
  Mode mode;
  double x[kF], alpha, sigma, inv_sigma, t, inv_t;
};

// The state, v in natural units.
struct PlaneSums {
  double key, m, s, s_v, s_bias, s_sq, acc[kF], pull[kF];
};

MK_DEVICE PlaneQuery query_of(const PlaneParams& p, i64 b) {
  const double most_logit = 1e280;
  PlaneQuery q;
  q.alpha = p.alpha[b];
  q.sigma = p.sigma[b];
  q.inv_sigma = 1 / q.sigma;
  q.t = p.temperature[b];
  q.inv_t = 1 / q.t;
  double xx = 0;
  MK_UNROLL
  for (int d = 0; d < kF; d++) {
    q.x[d] = d < p.d ? (double)p.x[b * p.d + d] : 0;
    xx += q.x[d] * q.x[d];
  }
  // Comparisons with NaN are false.
  const bool known = xx < infinity() && q.sigma >= 0 && q.inv_t > 0 && q.inv_t < infinity();
  const bool soft = q.inv_t * q.inv_sigma * q.inv_sigma * (xx + 1) < most_logit;
  q.mode = !known ? kLost : p.log ? kLog : soft ? kSoft : kHard;
  return q;
}

// What the sums in float32 need of a query before the rows are read.
MK_DEVICE How how_of(const PlaneParams& p, const PlaneQuery& q) {
  if (q.mode != kSoft) return q.mode == kLost ? kNothing : kWide;
  const double size = sqrt(p.largest[0]) + sqrt(p.largest[1]), width = q.sigma * sqrt(q.t), a = fabs(q.alpha);
  const double unit = a * a * q.inv_t * q.inv_sigma * q.inv_sigma;
  double xx = 0;
  MK_UNROLL
  for (int d = 0; d < kF; d++) xx += q.x[d] * q.x[d];
  const double reach = size + sqrt(xx) / a;  // of differences: their squares and logits are finite
  bool fits = a > 1e-15 && unit > 1e-25 && unit < 1e25 && reach < 1e15 && unit * reach * reach < 1e35 &&
              width > 1e-9 * a * size;
  // Biases count as the logits do.
  fits &= p.largest[2] * q.inv_t <= 12;
  if (!fits) return kWide;
  return width >= 0.1 * a * size ? kValues : kDifferences;
}
// The largest |v| for which a rounding of it does no harm: (F / 2 + 5) 2^-24 of 12 is 7e-6.
MK_DEVICE bool is_small(double m) { return fabs(m) <= 12; }

MK_DEVICE void load_tile(const PlaneParams& p, const PlaneTile& tile, i64 n0, i64 last) {
  block_sync();  // the one before is read
  for (int i = thread_index(); i < kTile * kF; i += kPlaneThreads) {
    const i64 n = n0 + i / kF, d = i % kF;
    const bool there = n < last && d < p.d;
    const double y = there ? value_at<MK_ROWS>(p.rows, n * p.stride + d, (float)p.scale, (float)p.shift) : 0;
    tile.y[i] = (float)y;
    tile.wide_y[i] = y;
  }
  for (int i = thread_index(); i < kTile; i += kPlaneThreads) {
    const double bias = n0 + i < last ? (p.bias ? p.bias[n0 + i] : 0) : -infinity();
    tile.bias[i] = (float)bias;
    tile.wide_bias[i] = bias;
  }
  block_sync();
}

// A t that no row has.
MK_DEVICE constexpr float no_row() { return -3e38f; }
// In float32, t in units of log 2. Weights are e^v itself: of a query whose largest v is small none
// overflows, and what underflows has no weight. top: the largest t.
struct FloatSums {
  double s, s_t, s_bias, s_sq, acc[kF];
  float top;
};
// What a thread needs of its query, in float32.
struct FloatQuery {
  float high[kF], low[kF], far, bias;  // t = bias b - far |y - x / alpha|^2
};
MK_DEVICE FloatQuery float_query(const PlaneQuery& q) {
  const double log2_e = 1.4426950408889634;
  FloatQuery f;
  MK_UNROLL
  for (int d = 0; d < kF; d++) {
    const double x = q.x[d] / q.alpha;
    f.high[d] = (float)x;
    f.low[d] = (float)(x - f.high[d]);
  }
  f.far = (float)(0.5 * log2_e * q.alpha * q.alpha * q.inv_t * q.inv_sigma * q.inv_sigma);
  f.bias = (float)(log2_e * q.inv_t);
  return f;
}

template <bool kOfValues, bool kBiased>
MK_DEVICE void add_tile(const PlaneTile& tile, const FloatQuery& q, FloatSums& sums) {
  float s = 0, s_t = 0, s_bias = 0, s_sq = 0, acc[kF] = {};
#pragma unroll 4
  for (int i = 0; i < kTile; i++) {
    const PlaneRowValues y = *(const PlaneRowValues*)(tile.y + i * kF);
    float off[kF], r2 = 0;
    MK_UNROLL
    for (int d = 0; d < kF; d++) {
      off[d] = add(add(y.v[d], -q.high[d]), -q.low[d]);
      r2 += off[d] * off[d];
    }
    const float bias = kBiased ? tile.bias[i] : 0, t = (kBiased ? q.bias * bias : 0.0f) - q.far * r2;
    const float e = exp2_fast(t);
    sums.top = fmaxf(sums.top, t);
    s += e;
    s_sq += e * e;
    if (kBiased) {  // where neither is infinite
      s_t += e > 0 ? e * t : 0;
      s_bias += e > 0 ? e * bias : 0;
    } else {
      s_t += e * t;
    }
    MK_UNROLL
    for (int d = 0; d < kF; d++) acc[d] += e * (kOfValues ? y.v[d] : off[d]);
  }
  sums.s += s;
  sums.s_t += s_t;
  sums.s_bias += s_bias;
  sums.s_sq += s_sq;
  MK_UNROLL
  for (int d = 0; d < kF; d++) sums.acc[d] += acc[d];
}

MK_DEVICE PlaneSums settled(const FloatSums& f, const PlaneQuery& q, bool of_values) {
  const double log_2 = 0.6931471805599453, gap = -f.top * log_2, e = exp(gap);
  PlaneSums r;
  r.key = 0;
  r.m = f.top * log_2;
  r.s = e * f.s;
  r.s_v = e * (f.s_t * log_2 + f.s * gap);
  r.s_bias = e * f.s_bias;
  r.s_sq = e * e * f.s_sq;
  MK_UNROLL
  for (int d = 0; d < kF; d++) {
    const double sum = e * f.acc[d];
    r.acc[d] = of_values ? sum : sum + r.s * (q.x[d] / q.alpha);
    r.pull[d] = of_values ? q.alpha * sum - r.s * q.x[d] : q.alpha * sum;
  }
  return r;
}

MK_DEVICE void clear(PlaneSums& r) {
  r.m = -infinity();
  r.s = r.s_v = r.s_bias = r.s_sq = 0;
  MK_UNROLL
  for (int d = 0; d < kF; d++) r.acc[d] = r.pull[d] = 0;
}

// In float64, but for the exponential.
MK_DEVICE void add_wide(const PlaneParams& p, const PlaneTile& tile, const PlaneQuery& q, PlaneSums& r) {
  const double log2_e = 1.4426950408889634, features = (double)p.d;
  for (int i = 0; i < kTile; i++) {
    const double bias = tile.wide_bias[i];
    if (bias == -infinity()) continue;
    double off[kF], r2 = 0;
    MK_UNROLL
    for (int d = 0; d < kF; d++) {
      // Each operation rounded by itself: a query that was made as alpha y is at distance 0.
      off[d] = add(multiply(q.alpha, tile.wide_y[i * kF + d]), -q.x[d]);
      r2 += off[d] * off[d];
    }
    double key = 0, v = bias * q.inv_t;
    if (q.mode == kSoft) {
      v = (bias - 0.5 * (r2 * q.inv_sigma) * q.inv_sigma) * q.inv_t;
    } else if (q.mode == kHard) {
      key = r2;
    } else if (r2 != 0) {
      key = 1;
      v = (bias - 0.5 * features * log(r2 / features)) * q.inv_t;
    }
    if (key > r.key) continue;
    if (key < r.key) {
      clear(r);
      r.key = key;
    }
    if (v > r.m) {
      const double gap = r.m - v, f = r.s == 0 ? 0 : exp(gap);
      r.s_v = f == 0 ? 0 : f * (r.s_v + r.s * gap);
      r.s *= f;
      r.s_bias *= f;
      r.s_sq *= f * f;
      MK_UNROLL
      for (int d = 0; d < kF; d++) {
        r.acc[d] *= f;
        r.pull[d] *= f;
      }
      r.m = v;
    }
    const double e = exp2_fast((float)((v - r.m) * log2_e));
    if (e == 0) continue;
    r.s += e;
    r.s_v += e * (v - r.m);
    r.s_bias += e * bias;
    r.s_sq += e * e;
    MK_UNROLL
    for (int d = 0; d < kF; d++) {
      r.acc[d] += e * tile.wide_y[i * kF + d];
      r.pull[d] += e * off[d];
    }
  }
}

MK_BOUNDED_KERNEL(kPlaneThreads, kPlaneBlocks) memokern_plane_sweep(MK_PARAMS(PlaneParams, p)) {
  u8* next = shared_memory();
  PlaneTile tile;
  tile.y = next_array<float>(next, kTile * kF);
  tile.wide_y = next_array<double>(next, kTile * kF);
  tile.bias = next_array<float>(next, kTile);
  tile.wide_bias = next_array<double>(next, kTile);
  const i64 part = block_x() % p.parts, b = block_x() / p.parts * kPlaneThreads + thread_index();
  const i64 first = part * p.n / p.parts, last = (part + 1) * p.n / p.parts;
  // Threads beyond the last query do as that one does, and write nothing. What is known of a query is read
  // again after the rows, so that no register holds it meanwhile.
  const i64 mine = b < p.b ? b : p.b - 1;
  const How how = how_of(p, query_of(p, mine));
  // The lanes of a warp go one way.
  const bool values = warp_ballot(how == kValues) != 0,
             both = values && warp_ballot(how == kDifferences) != 0;
  bool wide = warp_ballot(how == kWide) != 0 || both;
  PlaneSums r;
  clear(r);
  r.key = infinity();
  if (block_any(!wide && how != kNothing)) {
    FloatSums sums = {};
    sums.top = no_row();
    const FloatQuery f = float_query(query_of(p, mine));
    for (i64 n0 = first; n0 < last; n0 += kTile) {
      load_tile(p, tile, n0, last);
      if (wide) continue;
      // Rows beyond the last have a bias.
      const bool biased = p.bias || n0 + kTile > last;
      if (values)
        biased ? add_tile<true, true>(tile, f, sums) : add_tile<true, false>(tile, f, sums);
      else
        biased ? add_tile<false, true>(tile, f, sums) : add_tile<false, false>(tile, f, sums);
    }
    if (!wide && sums.top > no_row()) r = settled(sums, query_of(p, mine), values);
    // Rows that have no weight for anyone leave nothing to be done again.
    wide |= warp_ballot(how != kNothing && sums.top > no_row() && !(is_small(r.m) && r.s < infinity())) != 0;
  }
  const PlaneQuery q = query_of(p, mine);
  if (block_any(wide)) {
    if (wide) {
      clear(r);
      r.key = infinity();
    }
    for (i64 n0 = first; n0 < last; n0 += kTile) {
      load_tile(p, tile, n0, last);
      if (wide && how != kNothing) add_wide(p, tile, q, r);
    }
  }
  if (b >= p.b) return;
  double* const to = p.part + part * (kPlaneSums + 2 * kF) * p.b + b;
  const bool lost = q.mode == kLost;
  const double nan = not_a_number();
  to[PKey * p.b] = lost ? 0 : r.key;
  to[PM * p.b] = lost ? 0 : r.m;
  to[PS * p.b] = lost ? nan : r.s;
  to[PSV * p.b] = r.s_v;
  to[PSBias * p.b] = r.s_bias;
  to[PSSq * p.b] = r.s_sq;
  MK_UNROLL
  for (int d = 0; d < kF; d++) {
    to[(kPlaneSums + d) * p.b] = r.acc[d];
    to[(kPlaneSums + kF + d) * p.b] = r.pull[d];
  }
}

}  // namespace cuda
}  // namespace memokern
