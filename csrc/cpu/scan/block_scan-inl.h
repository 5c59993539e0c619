// A scan that goes through blocks of rows instead of chunks: the first look, and the scan proper of a task.
// Of each block it bounds the rows for those queries only to which the block is left.
#pragma once
#include "cpu/scan/chunk-inl.h"
#include "cpu/scan/look-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

// The blocks nearest to a query, in no order.
struct NearestBlocks {
  float r2[LOOK_BLOCKS];
  int64_t block[LOOK_BLOCKS], count;
  float worst;  // the largest r2 where there are LOOK_BLOCKS of them
  void add(float v, int64_t b) {
    int64_t at = count;
    if (count == LOOK_BLOCKS)
      for (at = 0; r2[at] < worst;) at++;
    else
      count++;
    r2[at] = v;
    block[at] = b;
    if (count < LOOK_BLOCKS) return;
    worst = r2[0];
    for (int i = 1; i < LOOK_BLOCKS; i++) worst = r2[i] > worst ? r2[i] : worst;
  }
};

// The blocks whose boxes lie nearest to query b in the leading coordinates.
static void nearest_blocks(const ScanCall& s, int64_t b, NearestBlocks& to) {
  const float* w = s.w + b * s.box;
  const int64_t K = box_coordinates(s.k0), size = s.box * PANEL_SIZE;
  to.count = 0;
  to.worst = (float)kInf;
  float hulls[kPanelBlocks], r2[kPanelBlocks];
  for (int64_t p0 = 0; p0 < s.panels; p0 += kPanelBlocks) {
    box_distances(s.bound->hulls + p0 / kPanelBlocks * size, K, w, 1, hulls);
    for (int64_t p = p0; p < imin(s.panels, p0 + kPanelBlocks); p++) {
      if (!(hulls[p - p0] < to.worst)) continue;
      box_distances(s.bound->boxes + p * size, K, w, 1, r2);
      const int64_t count = imin(kPanelBlocks, s.all_blocks - p * kPanelBlocks);
      for (int64_t e = 0; e < count; e++)
        if (r2[e] < to.worst) to.add(r2[e], p * kPanelBlocks + e);
    }
  }
}

// The first look of query i: the nearest row, in all coordinates of level 0, of a few blocks.
static void look_of_query(ScanTask& t, int64_t i) {
  const ScanCall& s = *t.s;
  const int64_t b = t.order[i];
  NearestBlocks near;
  nearest_blocks(s, b, near);
  Lanes one = t.some;
  one.B = one.Bp = 1;
  one.a2[0] = t.a2[i];
  // The best rows, the best of all first.
  enum { BEST = 1 + LOOK_MORE };
  float guess[BEST];
  int64_t found[BEST];
  for (int e = 0; e < BEST; e++) {
    guess[e] = (float)-kInf;
    found[e] = -1;
  }
  for (int64_t j = 0; j < near.count; j++) ask_for_rows(s, near.block[j]);
  for (int64_t j = 0; j < near.count; j++) {
    const int64_t cnt = s.rows_of_block(near.block[j]);
    const float* rows = s.rows_from(near.block[j]);
    look_norms(rows, s.stride, s.k0, cnt, t.h);
    t.bound_rows(one, rows, cnt, t.z + i * (s.k0 + s.bands), s.k0, s.k0, 0);
    int e = BEST - 1;
    if (!(one.best[0] > guess[e])) continue;
    for (; e > 0 && one.best[0] > guess[e - 1]; e--) {
      guess[e] = guess[e - 1];
      found[e] = found[e - 1];
    }
    guess[e] = one.best[0];
    found[e] = s.bound->order[near.block[j] * kBlockRows + one.where[0]];
  }
  t.lists[b].found = found[0];
  t.lists[b].guess = guess[0];
  for (int e = 0; e < LOOK_MORE; e++) s.next[b * LOOK_MORE + e] = found[1 + e];
}

// The first looks of part `part` of the block's queries.
static void look_at_blocks(ScanTask& t, int64_t part) {
  const ScanCall& s = *t.s;
  for (int64_t i = part; i < t.B && !t.failed; i += s.parts) {
    look_of_query(t, i);
    if (t.pace.stopped((s.panels + LOOK_BLOCKS * kBlockRows) * kBoxCoordinates)) t.failed |= kStopped;
  }
}

// Bounds the rows of a block for the queries in the lanes of `left`, and lists what is left.
static void scan_block_of_rows(ScanTask& t, int64_t block, uint64_t left) {
  enum { W = Vec<float>::W, ALONE = 2 };  // queries that are faster one by one than as a vector
  const ScanCall& s = *t.s;
  const int32_t* ids = s.bound->order + block * kBlockRows;
  const int64_t cnt = s.rows_of_block(block), K0 = s.k0 + s.bands;
  const float* rows = s.rows_from(block);
  memcpy((void*)t.h, s.bound->half + block * kBlockRows, cnt * sizeof(float));
  const auto id = [&](int64_t j) { return (int64_t)ids[j]; };
  Lanes& q = t.some;
  const int64_t queries = __builtin_popcountll(left), together = queries > ALONE ? queries : 1;
  while (left) {
    int64_t of[SCAN_B];
    q.B = together;
    q.Bp = together == 1 ? 1 : round_up(together, (int64_t)W);
    for (int64_t e = 0; e < together; e++, left &= left - 1) {
      const int64_t i = of[e] = __builtin_ctzll(left);
      q.a2[e] = t.a2[i];
      q.least[e] = t.least[i];
      float* to = q.at(q.x0, K0, e, 0);
      const int64_t step = q.at(q.x0, K0, e, 1) - to;
      for (int64_t k = 0; together > 1 && k < K0; k++) to[k * step] = t.z[i * K0 + k];
    }
    for (int64_t e = together; e < q.Bp; e++) {  // lanes that list nothing, whatever the numbers left there
      q.a2[e] = 0;
      q.least[e] = (float)kInf;
    }
    t.bound_rows(q, rows, cnt, together == 1 ? t.z + of[0] * K0 : q.x0, s.k0, K0, q.Bp);
    for (int64_t e = 0; e < together; e++) try_best(t, q, e, of[e], rows, cnt, id);
    list_rows(t, q, cnt, [&](int64_t e) { return of[e]; }, id);
  }
}

// The lanes of the task's queries, among `asked`, to which box e of a panel is left.
static uint64_t lanes_left(const ScanTask& t, const float* panel, int64_t e, uint64_t asked) {
  enum { W = Vec<float>::W, V = 2 };
  const int64_t K = t.s->box;
  uint64_t left = 0;
  float r2[V * W];
  for (int64_t i = 0; i < t.Bp; i += V * W) {
    const uint64_t mask = ((uint64_t)1 << (V * W - 1) << 1) - 1;
    if (!(asked >> i & mask)) continue;
    if (t.Bp - i >= V * W)
      distances_of_queries<V>(panel, e, K, t.w + i, t.Bp, r2);
    else
      distances_of_queries<1>(panel, e, K, t.w + i, t.Bp, r2);
    for (int64_t v = 0; v < imin(V * W, t.Bp - i); v += W)
      left |= (uint64_t)(~lanes_of(load(r2 + v) > load(t.reach + i + v)) & (((uint64_t)1 << W) - 1))
              << (i + v);
  }
  return left & asked;
}

// The blocks of part `part` of the panels: panels that lie near each other, and may be near the same queries,
// are of different parts.
static void scan_blocks(ScanTask& t, int64_t part, float* scratch) {
  const ScanCall& s = *t.s;
  const int64_t size = s.box * PANEL_SIZE;
  float to_hulls[kPanelBlocks];  // of a query alone, those of panels that lie side by side
  int64_t known = -1;            // which of these
  uint64_t live = 0;
  for (int64_t i = 0; i < t.B; i++) {
    List& l = t.lists[t.order[i]];
    l.level = (int)imax(l.level, 1);
    live |= (uint64_t)(t.least[i] < (float)kInf) << i;
  }
  for (int64_t p = part; p < s.panels; p += s.parts) {
    const float *panel = s.bound->boxes + p * size, *hulls = s.bound->hulls + p / kPanelBlocks * size;
    const int64_t count = imin(kPanelBlocks, s.all_blocks - p * kPanelBlocks);
    uint64_t left[kPanelBlocks];
    int64_t rows = 0;
    if (t.Bp == 1) {
      float r2[kPanelBlocks];
      if (p / kPanelBlocks != known) box_distances(hulls, s.box, t.w, 1, to_hulls);
      known = p / kPanelBlocks;
      if (to_hulls[p % kPanelBlocks] > t.reach[0]) continue;
      box_distances(panel, s.box, t.w, 1, r2);
      for (int64_t e = 0; e < count; e++) left[e] = r2[e] > t.reach[0] ? 0 : live;
    } else {
      const uint64_t some = lanes_left(t, hulls, p % kPanelBlocks, live);
      if (!some) continue;
      for (int64_t e = 0; e < count; e++) left[e] = lanes_left(t, panel, e, some);
    }
    enum { AHEAD = 2 };  // blocks whose rows are asked for before they are needed
    int64_t at[kPanelBlocks + AHEAD], n = 0;
    for (int64_t e = 0; e < count; e++)
      if (left[e]) {
        at[n++] = e;
        rows += __builtin_popcountll(left[e]);
      }
    for (int64_t j = -AHEAD; j < n; j++) {
      if (j + AHEAD < n) ask_for_rows(s, p * kPanelBlocks + at[j + AHEAD]);
      if (j >= 0) scan_block_of_rows(t, p * kPanelBlocks + at[j], left[at[j]]);
    }
    if (n) cut_long_lists(t, scratch);
    for (int64_t i = 0; n && i < t.B; i++)
      if (!(t.least[i] < (float)kInf)) live &= ~((uint64_t)1 << i);
    if (t.pace.stopped(kPanelBlocks * t.Bp * s.box + rows * kBlockRows * s.stride)) {
      t.failed |= kStopped;
      return;
    }
  }
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
