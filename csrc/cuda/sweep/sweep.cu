// The dense sweep for wide rows in one launch.
//
// One cluster owns every so-manieth tile of rows and streams them past all queries; one block of it owns
// kFeatures features. After each tile m is the largest v = l / T seen, s the sum of e^(v - m), and acc, in
// registers, that of e^(v - m) u for the block's features. A query's state is with the block that owns the
// query. Writes a part for each cluster: states, acc, near. Traffic: each row once, queries once per cluster.
//
//     products(i)   each block, own features, from shared memory          -> part
//     arrive        accumulate(i - 1) meanwhile: acc = f acc + P U
//     wait          owners add up the parts of the cluster, weigh, and hand weights to every block
//     arrive, wait
#include "sweep/exact.h"
#include "sweep/fetch.h"
#include "sweep/products.h"
#include "sweep/weigh.h"

namespace memokern {
namespace cuda {

MK_DEVICE void load_query(const SweepParams& p, Owned& o, i64 b) {
  const double* table = p.table + b;
  o.a1 = (float)table[A1 * kQueries];
  o.a2 = (float)table[A2 * kQueries];
  o.e0 = (float)table[E0 * kQueries];
  o.e1 = (float)table[E1 * kQueries];
  o.e2 = (float)table[E2 * kQueries];
  o.e3 = (float)table[E3 * kQueries];
  o.inv_t = table[InvT * kQueries];
  o.common = table[Common * kQueries];
  o.offset_norm = table[OffsetNorm * kQueries];
  o.mode = (int)table[ModeRow * kQueries];
  o.alpha = p.alpha[b];
  o.inv_sigma = o.mode == kSoft ? 1 / p.sigma[b] : 1;
  o.key = infinity();
  o.m = -infinity();
  o.s = o.s_v = o.s_bias = o.s_sq = o.near_s = 0;
  o.factor = 0;
  o.near_before = 0;
}

MK_DEVICE void prepare(const SweepParams& p, const Shared& s, const Tiles& tiles) {
  const int thread = thread_index();
  const i64 d0 = (i64)cluster_rank() * kFeatures;
  for (int i = thread; i < Numbers::kTerms * kQueries * kFeatures; i += kThreads) {
    const int d = i % kFeatures, row = i / kFeatures;
    s.terms[row * kTermPitch + term_position(d)] = p.terms[(i64)row * kDP + d0 + d];
  }
  // Queries that no one weighs have no weight.
  for (int i = thread; i < 4 * kQueries * kWeightPitch; i += kThreads) s.weights[i] = 0;
  for (int i = thread; i < 2 * kQueries; i += kThreads) s.factor[i] = 0;
  // Features that do not exist are never written again.
  if (tiles.width < kFeatures)
    for (int i = thread; i < kStages * kRows * kRowPitch / 4; i += kThreads) ((u32*)s.rows)[i] = 0;
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

MK_DEVICE void store_states(const SweepParams& p, const Shared& s) {
  for (int own = thread_index(); own < kOwned; own += kThreads) {
    const i64 b = cluster_rank() + own * kCluster;
    if (b >= p.b) break;
    const Owned& o = s.owned[own];
    double* to = p.states + (i64)cluster_index() * kState * kQueries + b;
    to[Key * kQueries] = o.key;
    to[M * kQueries] = o.m;
    to[S * kQueries] = o.s;
    to[SV * kQueries] = o.s_v;
    to[SBias * kQueries] = o.s_bias;
    to[SSq * kQueries] = o.s_sq;
    to[NearS * kQueries] = o.near_s;
  }
}

MK_KERNEL(kCluster, kThreads, kResident) memokern_sweep(MK_PARAMS(SweepParams, p)) {
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
      multiply_queries(s, stage(s, i));
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
  store_states(p, s);
}

}  // namespace cuda
}  // namespace memokern
