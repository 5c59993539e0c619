// What a variant of the sweep is compiled for, from the macros that the host gives, and its shared memory.
#pragma once
#include "common/arrays.h"
#include "common/rows.h"

#ifndef MK_ROWS
#error "MK_ROWS: the type of the rows, a code of RowType"
#endif
#ifndef MK_QUERIES
#error "MK_QUERIES, MK_CLUSTER, MK_FEATURES, MK_TILE, MK_STAGES, MK_BULK and MK_LOG are to be given"
#endif

#ifndef MK_RESIDENT
#define MK_RESIDENT 1
#endif
#ifndef MK_GRADIENT
#define MK_GRADIENT 0
#endif

namespace memokern {
namespace cuda {

enum : int { kType = MK_ROWS };
typedef Stored<kType> Numbers;

enum : int {
  kQueries = MK_QUERIES,    // of a launch, in blocks of 16
  kCluster = MK_CLUSTER,    // blocks
  kFeatures = MK_FEATURES,  // of a block: multiples of 16
  kRows = MK_TILE,          // of a tile
  kStages = MK_STAGES,      // tiles in shared memory
  kBulk = MK_BULK,          // whether the machine copies rows by itself
  kLogWeights = MK_LOG,     // weighting "log"
  kResident = MK_RESIDENT,  // blocks of a multiprocessor: while one weighs, another multiplies
  kGradient = MK_GRADIENT,  // the backward sweep, gradient/gradient.cu
  kThreads = 256,
  kWarps = kThreads / 32,
  kBlocksOf16 = kQueries / 16,
  // What rows are multiplied by in the first product: the queries, and then the gradients of their means.
  kVectors = kGradient ? 2 * kQueries : kQueries,
  kVectorBlocks = kVectors / 16,
  kDP = kCluster * kFeatures,
  kOwned = (kQueries + kCluster - 1) / kCluster,  // queries that a block weighs
  kLaneRows = kRows < 32 ? 1 : kRows / 32,        // rows of a lane when it weighs a tile
  // In the first product a warp takes so many blocks of 8 rows together, which share what it reads of the
  // queries, and a part of the features where there are fewer of these than warps.
  kMostRowBlocks = kVectorBlocks == 1 ? 4 : 2,
  kRowBlocks = kRows / 8 < 2 * kMostRowBlocks ? kRows / 16 : kMostRowBlocks,
  kSplits = kRows / 8 / kRowBlocks < kWarps ? kWarps * kRowBlocks * 8 / kRows : 1,
  kTermPitch = kFeatures + 8,  // 16 bytes more: the rows of a matrix lie in different banks
  kPartPitch = kRows + 8,
  kWeightPitch = kRows + 8,
  // An odd number of 16 bytes, so that rows lie in different banks.
  kRowPitch = kFeatures * Numbers::kBytes + (kFeatures * Numbers::kBytes / 16 % 2 ? 0 : 16),
  kPairs = 16,                                      // that are evaluated between two barriers
  kExact = kGradient ? 3 : 1,                       // sums over the features of such a pair
  kLogits = kGradient ? 2 : 1,                      // numbers kept of each pair of a tile
  kGroups = (kFeatures / 16 + kWarps - 1) / kWarps  // groups of 16 features that a warp adds up
};
static_assert(kFeatures % 16 == 0 && kQueries % 16 == 0 && kStages >= 2);
static_assert(kRows == 16 || kRows == 32 || kRows == 64 || kRows == 128);

// What is known of a query that a block weighs.
struct Asked {
  double alpha, inv_sigma, inv_t, common, offset_norm;
  double near_s;                 // more than 0 where `near` has rows; in the forward sweep their weight
  float a1, a2, e0, e1, e2, e3;  // as in the table of queries
  int mode;
  float factor;     // what the last tile multiplied the sums in `near` by
  u32 near_before;  // whether `near` had rows before the last tile
  u32 marked[4];    // rows of the tile that are evaluated by direct differences; then those of them that are
                    // near
};
template <bool kBackward>
struct OwnedBy;
// The state after the rows so far.
template <>
struct alignas(16) OwnedBy<false> : Asked {
  double key, m, s, s_v, s_bias, s_sq;
};
// The numbers of the formulas in gradient/coefficients.h, and the sums over the rows so far.
template <>
struct alignas(16) OwnedBy<true> : Asked {
  double t, log_z, mean_logit, mean_bias, weight_sq, g_log_z, g_logit, g_bias, g_sq;
  double g_scale, g_rest, dot, xo;
  double sums[kGradientSums];
};
typedef OwnedBy<kGradient> Owned;
static_assert(sizeof(Owned) == (kGradient ? 272 : 160), "the host counts these bytes");

// Shared memory, array by array.
struct Shared {
  u64* full;         // [kStages] a tile has come
  u16* terms;        // [kTerms][kVectors][kTermPitch] of the queries, and of the gradients of their means
  u8* rows;          // [kStages][kRows][kRowPitch] as stored
  float* part;       // [kSplits][kVectors][kPartPitch] own features' part of the products
  u16* weights;      // [2 tiles][2 terms][kQueries][kWeightPitch] weights, or coefficients
  float* factor;     // [2 tiles][kQueries] what the tile multiplies accumulators by, or its own sums
  float* logit;      // [kLogits][kOwned][kRows] t of the tile's rows; in the backward sweep the products
  double* exact;     // [kExact][kOwned][kRows] squared distances, ..., then weights of near rows
  Owned* owned;      // [kOwned]
  double* distance;  // [kPairs][kExact][kWarps] parts of what is evaluated
  int* pair;         // [kPairs] where in `exact` they belong
};

MK_DEVICE constexpr i64 shared_bytes() {
  return array_bytes(8 * kStages) + array_bytes(2ll * Numbers::kTerms * kVectors * kTermPitch) +
         array_bytes((i64)kStages * kRows * kRowPitch) + array_bytes(4ll * kSplits * kVectors * kPartPitch) +
         array_bytes(8ll * kQueries * kWeightPitch) + array_bytes(8ll * kQueries) +
         array_bytes(4ll * kLogits * kOwned * kRows) + array_bytes(8ll * kExact * kOwned * kRows) +
         array_bytes((i64)sizeof(Owned) * kOwned) + array_bytes(8ll * kPairs * kExact * kWarps) +
         array_bytes(4ll * kPairs);
}

MK_DEVICE Shared shared_arrays() {
  u8* next = shared_memory();
  Shared s;
  s.full = next_array<u64>(next, kStages);
  s.terms = next_array<u16>(next, Numbers::kTerms * kVectors * kTermPitch);
  s.rows = next_array<u8>(next, (i64)kStages * kRows * kRowPitch);
  s.part = next_array<float>(next, kSplits * kVectors * kPartPitch);
  s.weights = next_array<u16>(next, 4 * kQueries * kWeightPitch);
  s.factor = next_array<float>(next, 2 * kQueries);
  s.logit = next_array<float>(next, kLogits * kOwned * kRows);
  s.exact = next_array<double>(next, kExact * kOwned * kRows);
  s.owned = next_array<Owned>(next, kOwned);
  s.distance = next_array<double>(next, kPairs * kExact * kWarps);
  s.pair = next_array<int>(next, kPairs);
  return s;
}

}  // namespace cuda
}  // namespace memokern
