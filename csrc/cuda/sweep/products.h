// The two products of a tile, from the same rows in shared memory.
//
// Both read rows as they are stored and turn them into 16-bit numbers in registers. Each stored number is
// read once in each product, in accesses that meet every bank once or twice. The order of features is that of
// common/rows.h: in the first product a thread's four features 4 t .. 4 t + 3 of a step of 16 stand for the
// positions 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of mma, for which term_position() places the queries; in the
// second the two features 2 g and 2 g + 1 of a group of 16 are column g of two products.
#pragma once
#include "sweep/variant.h"

namespace memokern {
namespace cuda {

MK_DEVICE int term_position(int feature) {
  return (feature & ~15) + (feature & 1) + (feature >> 2 & 3) * 2 + (feature >> 1 & 1) * 8;
}

// The same pairs of terms as long as their product counts: a * 2^-9 for each further term.
enum { kMostPairs = 3 };  // term i times piece j where i + j < 3

// part = X U' over the block's features, of all vectors with the tile's rows. Tensor cores truncate their
// sums, so that they add up a few steps only, and the rest is added as floats.
MK_DEVICE void multiply_vectors(const Shared& s, const u8* rows) {
  enum {
    kSteps = kFeatures / 16,
    kProducts = kType == (int)kF32 ? 6 : (int)Numbers::kTerms,
    kRun = kProducts >= 4 ? 1 : 8 / kProducts / 2 * 2
  };
  const int warp = warp_index(), lane = lane_index(), g = lane >> 2, t = lane & 3;
  const int split = warp % kSplits, row0 = warp / kSplits * kRowBlocks * 8;
  const int from = kSteps * split / kSplits, to = kSteps * (split + 1) / kSplits;
  float sum[kRowBlocks][kVectorBlocks][4];
  MK_UNROLL
  for (int r = 0; r < kRowBlocks; r++)
    for (int i = 0; i < 4 * kVectorBlocks; i++) sum[r][i / 4][i % 4] = 0;
  const u8* row = rows + (row0 + g) * kRowPitch + 4 * t * Numbers::kBytes;
  const u16* terms = s.terms + (lane & 15) * kTermPitch + (lane >> 4) * 8;
  for (int first = from; first < to; first += kRun) {
    float run[kRowBlocks][kVectorBlocks][4];
    MK_UNROLL
    for (int r = 0; r < kRowBlocks; r++)
      for (int i = 0; i < 4 * kVectorBlocks; i++) run[r][i / 4][i % 4] = 0;
    MK_UNROLL
    for (int k = 0; k < kRun; k++) {
      const int step = first + k;
      if (kRun > 1 && step >= to) break;
      u32 b[kRowBlocks][2][Numbers::kPieces];
      MK_UNROLL
      for (int r = 0; r < kRowBlocks; r++)
        pairs_of_row<kType>(
            *(const Words<Numbers::kBytes, 4>*)(row + r * 8 * kRowPitch + step * 16 * Numbers::kBytes), b[r]);
      MK_UNROLL
      for (int q = 0; q < kVectorBlocks; q++)
        for (int i = Numbers::kTerms - 1; i >= 0; i--) {
          u32 a[4];
          load_a(a, terms + (i * kVectors + q * 16) * kTermPitch + step * 16);
          MK_UNROLL
          for (int r = 0; r < kRowBlocks; r++)
            for (int j = Numbers::kPieces - 1; j >= 0; j--)
              if (i + j < kMostPairs) mma<Numbers::kBrain>(run[r][q], a, b[r][0][j], b[r][1][j]);
        }
    }
    MK_UNROLL
    for (int r = 0; r < kRowBlocks; r++)
      for (int i = 0; i < 4 * kVectorBlocks; i++) sum[r][i / 4][i % 4] += run[r][i / 4][i % 4];
  }
  float* part = s.part + (split * kVectors + g) * kPartPitch + row0 + 2 * t;
  MK_UNROLL
  for (int r = 0; r < kRowBlocks; r++)
    for (int q = 0; q < kVectorBlocks; q++) {
      float* to_part = part + q * 16 * kPartPitch + r * 8;
      to_part[0] = sum[r][q][0];
      to_part[1] = sum[r][q][1];
      to_part[8 * kPartPitch] = sum[r][q][2];
      to_part[8 * kPartPitch + 1] = sum[r][q][3];
    }
}

// Of each group of 16 features of a warp, and block of 16 queries: features 4 t, 4 t + 2 of the queries g and
// g + 8, then 4 t + 1, 4 t + 3.
struct Accumulators {
  float v[kBlocksOf16][kGroups][2][4];
};

// acc = factor acc + P U for the tile whose weights lie in slot `slot`; in the backward sweep, whose
// coefficients are of any size, acc = acc + factor P U. A tile's sums are made anew, so that
// what tensor cores truncate does not grow with the number of rows.
MK_DEVICE void accumulate(const Shared& s, const u8* rows, int slot, Accumulators& acc) {
  enum {
    // Groups that are added up together, as many as registers allow.
    kMost = kBlocksOf16 == 1 ? 6
    : kBlocksOf16 == 2       ? 3
                             : 1,
    kTogether = kGroups < kMost ? kGroups : kMost,
    kWeightTerms = 2
  };
  const int warp = warp_index(), lane = lane_index(), g = lane >> 2, t = lane & 3;
  const u16* weights = s.weights + slot * 2 * kQueries * kWeightPitch;
  MK_UNROLL
  for (int chunk = 0; chunk < kGroups; chunk += kTogether) {
    float sum[kBlocksOf16][kTogether][2][4];
    MK_UNROLL
    for (int q = 0; q < kBlocksOf16; q++)
      for (int i = 0; i < 8 * kTogether; i++) sum[q][i >> 3][i >> 2 & 1][i & 3] = 0;
    MK_UNROLL
    for (int k = 0; k < kRows; k += 16) {
      u32 a[kBlocksOf16][kWeightTerms][4];
      MK_UNROLL
      for (int q = 0; q < kBlocksOf16; q++)
        for (int i = 0; i < kWeightTerms; i++)
          load_a(a[q][i],
                 weights + (i * kQueries + q * 16 + (lane & 15)) * kWeightPitch + k + (lane >> 4) * 8);
      MK_UNROLL
      for (int c = 0; c < kTogether; c++) {
        const int group = (chunk + c) * kWarps + warp;
        if (chunk + c >= kGroups || group >= kFeatures / 16) continue;
        typedef Words<Numbers::kBytes, 2> Two;
        const u8* row = rows + (k + 2 * t) * kRowPitch + (group * 16 + 2 * g) * Numbers::kBytes;
        u32 b[2][2][Numbers::kPieces];
        pairs_of_feature<kType>(*(const Two*)row, *(const Two*)(row + kRowPitch), b[0]);
        pairs_of_feature<kType>(*(const Two*)(row + 8 * kRowPitch), *(const Two*)(row + 9 * kRowPitch), b[1]);
        MK_UNROLL
        for (int q = 0; q < kBlocksOf16; q++)
          for (int f = 0; f < 2; f++) MK_UNROLL
        for (int i = kWeightTerms - 1; i >= 0; i--)
          for (int j = Numbers::kPieces - 1; j >= 0; j--)
            if (i + j < kMostPairs) mma<Numbers::kBrain>(sum[q][c][f], a[q][i], b[0][f][j], b[1][f][j]);
      }
    }
    MK_UNROLL
    for (int q = 0; q < kBlocksOf16; q++) {
      const float* factor = s.factor + slot * kQueries + q * 16 + g;
      const float f0 = factor[0], f1 = factor[8];
      MK_UNROLL
      for (int c = 0; c < kTogether; c++)
        for (int f = 0; f < 2; f++) {
          if (chunk + c >= kGroups) continue;
          MK_UNROLL
          for (int i = 0; i < 4; i++) {
            float& to = acc.v[q][chunk + c][f][i];
            const float by = i < 2 ? f0 : f1, more = sum[q][c][f][i];
            to = kGradient ? to + more * by : to * by + more;
          }
        }
    }
  }
}

// out [kQueries][kDP], of which the block owns kFeatures features. Weights were 2^15 times what they are
// where they are float16's; coefficients have their factor.
MK_DEVICE void store_accumulators(const Accumulators& acc, float* out) {
  const int warp = warp_index(), lane = lane_index(), g = lane >> 2, t = lane & 3;
  const float unit = Numbers::kBrain || kGradient ? 1.0f : 1.0f / 32768.0f;
  MK_UNROLL
  for (int q = 0; q < kBlocksOf16; q++)
    for (int c = 0; c < kGroups; c++) {
      const int group = c * kWarps + warp;
      if (group >= kFeatures / 16) continue;
      const float (&v)[2][4] = acc.v[q][c];
      for (int half = 0; half < 2; half++) {
        float* to = out + (i64)(q * 16 + g + 8 * half) * kDP + group * 16 + 4 * t;
        to[0] = v[0][2 * half] * unit;
        to[1] = v[1][2 * half] * unit;
        to[2] = v[0][2 * half + 1] * unit;
        to[3] = v[1][2 * half + 1] * unit;
      }
    }
}

}  // namespace cuda
}  // namespace memokern
