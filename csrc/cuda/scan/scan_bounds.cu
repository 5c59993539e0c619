// The first level of the index: a bound for every row, and which rows promise most.
//
// One block owns kTileRows rows and kTileQueries queries, and streams their coordinates in steps, then the
// norms of their bands; after each step the sums are those of the coordinates so far. It writes the bounds
// [b][n], and for each query and group of kGroupRows rows the one that is looked at first. Blocks of the same
// rows are neighbours, so a row comes from device memory once.
#include "scan/query.h"

namespace memokern {
namespace cuda {

enum { kTileQueries = 32, kStep = 32, kUnroll = 8, kRowsEach = 2, kQueriesEach = 8 };
enum { kRowPitch = kStep + 1, kQueryPitch = kTileQueries + 4 };
// How much of what a row's bands could add counts when a promising row is looked for: bounds alone prefer
// rows of large norm, coordinates alone those of small norm.
MK_DEVICE constexpr float band_share() { return 0.2f; }

MK_DEVICE constexpr i64 bounds_shared_bytes() {
  return array_bytes(4ll * kTileRows * kRowPitch) + array_bytes(4ll * kStep * kQueryPitch);
}

struct alignas(16) FourFloats {
  float v[4];
};
// A thread's sums: of its rows, kGroupRows apart, and of queries that lie together.
typedef float ScanSums[kRowsEach][kQueriesEach];

// Adds `count` products of what rows have from `row_at` on and queries from `query_at` on.
MK_DEVICE void add_products(const ScanParams& p, float* rows, float* queries, i64 n0, i64 b0, i64 row_at,
                            i64 query_at, i64 count, ScanSums& sums) {
  const int thread = thread_index(), lane = lane_index(), warp = warp_index();
  const i64 width = scaled_width(p), row_width = p.k0 + p.bands + 1;
  const int row = thread % kGroupRows, query = thread / kGroupRows * kQueriesEach;
  for (i64 k = 0; k < count; k += kStep) {
    const bool there = k + lane < count;
    block_sync();
    for (int i = warp; i < kTileRows; i += kScanWarps) {
      const bool some = there && n0 + i < p.n;
      rows[i * kRowPitch + lane] = some ? p.coarse[(n0 + i) * row_width + row_at + k + lane] : 0;
    }
    for (int i = warp; i < kTileQueries; i += kScanWarps) {
      const bool some = there && b0 + i < p.b;
      queries[lane * kQueryPitch + i] = some ? p.scaled[(b0 + i) * width + query_at + k + lane] : 0;
    }
    block_sync();
    const int steps = count - k < kStep ? (int)(count - k) : kStep;  // beyond it there are zeros
    for (int c0 = 0; c0 < steps; c0 += kUnroll) {
      MK_UNROLL
      for (int u = 0; u < kUnroll; u++) {
        const int c = c0 + u;
        float y[kRowsEach];
        MK_UNROLL
        for (int i = 0; i < kRowsEach; i++) y[i] = rows[(row + i * kGroupRows) * kRowPitch + c];
        MK_UNROLL
        for (int j = 0; j < kQueriesEach; j += 4) {
          const FourFloats x = *(const FourFloats*)(queries + c * kQueryPitch + query + j);
          MK_UNROLL
          for (int h = 0; h < 4; h++) MK_UNROLL
          for (int i = 0; i < kRowsEach; i++) sums[i][j + h] += x.v[h] * y[i];
        }
      }
    }
  }
}

MK_PLAIN_KERNEL(kScanThreads) memokern_scan_bounds(MK_PARAMS(ScanParams, p)) {
  u8* next = shared_memory();
  float* const rows = next_array<float>(next, kTileRows * kRowPitch);
  float* const queries = next_array<float>(next, kStep * kQueryPitch);
  const i64 teams = blocks_of(p.b, kTileQueries), tile = block_x() / teams, n0 = tile * kTileRows;
  const i64 b0 = block_x() % teams * kTileQueries, groups = blocks_of(p.n, kTileRows) * 2;
  ScanSums sums = {}, bands = {};
  add_products(p, rows, queries, n0, b0, 0, 0, p.k0, sums);
  add_products(p, rows, queries, n0, b0, p.k0, p.k0 + p.fine_width, p.bands, bands);
  // The lanes of a warp have the same queries, and rows that lie together.
  const int row = thread_index() % kGroupRows, query = thread_index() / kGroupRows * kQueriesEach;
  float half[kRowsEach], bias[kRowsEach];
  MK_UNROLL
  for (int i = 0; i < kRowsEach; i++) {
    const i64 n = n0 + row + i * kGroupRows;
    half[i] = n < p.n ? (float)(-0.5 * p.sq_norms[n]) : 0;
    bias[i] = n < p.n && p.bias ? (float)p.bias[n] : 0;
  }
  MK_UNROLL
  for (int j = 0; j < kQueriesEach; j++) {
    const i64 b = b0 + query + j;
    if (b >= p.b) break;
    const bool active = is_active(p, b);
    const float a2 = active ? (float)(p.alpha[b] * p.alpha[b]) : 0;
    const float s2 = active ? (float)(p.sigma[b] * p.sigma[b]) : 1;
    Found found = {-(float)infinity(), 0xffffffffu};
    MK_UNROLL
    for (int i = 0; i < kRowsEach; i++) {
      const i64 n = n0 + row + i * kGroupRows;
      float sum = sums[i][j] + a2 * half[i];
      if (p.bias) sum += s2 * bias[i];
      const float guess = sum + band_share() * bands[i][j];
      if (n >= p.n) continue;
      p.bound[b * p.n + n] = sum + bands[i][j];
      if (guess == guess) found = better(found, {guess, (u32)n});
    }
    found = warp_best(found);
    if (lane_index() != 0) continue;
    const i64 to = b * groups + tile * 2 + row / 32;
    p.guess[to] = found.value;
    p.place[to] = found.at < p.n ? found.at : 0;
  }
}

}  // namespace cuda
}  // namespace memokern
