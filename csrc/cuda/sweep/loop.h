// The loop over the rows, which the dense sweep and its backward sweep share. What differs is declared for
// the one's parameters and the other's: terms_of(), what a query's products are of; load_query(),
// mark_rows(), add_parts() for rows that are marked, weigh_rows(), and store_sums().
//
//     products(i)   each block, own features, from shared memory          -> part
//     arrive        accumulate(i - 1) meanwhile: acc = f acc + P U
//     wait          owners add up the parts of the cluster, weigh, and hand weights to every block
//     arrive, wait
#pragma once
#include "common/copies.h"
#include "sweep/exact.h"
#include "sweep/fetch.h"
#include "sweep/mark.h"
#include "sweep/products.h"

namespace memokern {
namespace cuda {

template <class Params>
MK_DEVICE void prepare(const Params& p, const Shared& s, const Tiles& tiles) {
  const int thread = thread_index();
  const i64 d0 = (i64)cluster_rank() * kFeatures;
  for (int i = thread; i < Numbers::kTerms * kVectors * kFeatures; i += kThreads) {
    const int d = i % kFeatures, row = i / kFeatures, vector = row % kVectors;
    const u16* const from =
        terms_of(p, vector / kQueries) + (i64)(row / kVectors * kQueries + vector % kQueries) * kDP;
    s.terms[row * kTermPitch + term_position(d)] = from[d0 + d];
  }
  // Queries that no one weighs have no weight.
  for (int i = thread; i < 4 * kQueries * kWeightPitch; i += kThreads) s.weights[i] = 0;
  for (int i = thread; i < 2 * kQueries; i += kThreads) s.factor[i] = 0;
  // Features that do not exist are never written again.
  if (tiles.width < kFeatures)
    for (int i = thread; i < kStages * kRows * kRowPitch / 4; i += kThreads) ((u32*)s.rows)[i] = 0;
  if (kBulk) copy_fence();
  for (int own = thread; own < kOwned; own += kThreads) {
    const i64 b = cluster_rank() + own * kCluster;
    if (b < p.b) load_query(p, s.owned[own], b);
  }
  if (kBulk && thread == 0) {
    for (int i = 0; i < kStages; i++) barrier_init(s.full + i);
    barrier_fence();
  }
  block_sync();
}

template <class Params>
MK_DEVICE void sweep_rows(const Params& p) {
  const Shared s = shared_arrays();
  const Tiles tiles = tiles_of(p);
  const int warp = warp_index();
  float* const near = p.near + (i64)cluster_index() * kQueries * kDP;
  prepare(p, s, tiles);
  for (int i = 0; i < kStages - 1; i++) fetch(p, s, tiles, i);
  if (!kBulk) block_sync();
  Accumulators acc;
  MK_UNROLL
  for (int q = 0; q < kBlocksOf16; q++)
    for (int c = 0; c < kGroups; c++) MK_UNROLL
  for (int i = 0; i < 8; i++) acc.v[q][c][i >> 2][i & 3] = 0;
  bool has_near = false;  // whether this block has ever written to `near`
  for (int i = 0; i <= tiles.count; i++) {
    if (i < tiles.count) {
      wait_for_tile(s, tiles, i);
      multiply_vectors(s, stage(s, i));
      cluster_arrive();
    }
    if (i > 0) accumulate(s, stage(s, i - 1), (i - 1) & 1, acc);
    if (i == tiles.count) break;
    const i64 n0 = first_row(i);
    const LaneRows rows = lane_rows(p, n0);
    cluster_wait();
    bool marked = false;
    for (int own = warp; own < kOwned; own += kWarps)
      if (cluster_rank() + own * kCluster < p.b) marked |= mark_rows(p, s, own, rows);
    marked = block_any(marked);
    // All warps have used tile i - 1.
    fetch(p, s, tiles, i - 1 + kStages);
    if (marked) evaluate_marked(p, s, n0);
    for (int own = warp; own < kOwned; own += kWarps)
      if (cluster_rank() + own * kCluster < p.b) weigh_rows(p, s, own, rows, i & 1);
    cluster_arrive();
    if (marked || has_near) {
      block_sync();
      add_near(p, s, n0, near);
      has_near = true;
    }
    cluster_wait();
  }
  store_accumulators(acc, p.acc + (i64)cluster_index() * kQueries * kDP + (i64)cluster_rank() * kFeatures);
  store_sums(p, s);
}

}  // namespace cuda
}  // namespace memokern
