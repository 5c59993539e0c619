// The scan proper of a task, chunk by chunk: level 0 of a whole chunk with queries across the lanes; the most
// promising row of each query evaluated; further levels of the whole chunk while many rows are left; then the
// rows that are left go to a list for each query.
#pragma once
#include "cpu/scan/task-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

// Evaluates the most promising of cnt rows that query i, which has lane `lane` of q, was just bounded for, if
// it promises more than those before. id(j) is the number of row j.
template <class Id>
static void try_best(ScanTask& t, const Lanes& q, int64_t lane, int64_t i, const float* rows, int64_t cnt,
                     const Id& id) {
  const ScanCall& s = *t.s;
  const ScanQuery& query = s.q[t.order[i]];
  List& l = t.lists[t.order[i]];
  if (!(q.best[lane] > t.top[i]) || !query.active || l.given_up) return;
  const int64_t from = q.where[lane], to = imin(from + (int64_t)ROW_UNIT, cnt);
  float highest = (float)-kInf;  // of the bounds in the block of rows: none of them may be better
  for (int64_t j = from; j < to; j++)
    if (t.p[j * q.Bp + lane] > highest) highest = t.p[j * q.Bp + lane];
  if (highest < q.least[lane]) return;
  t.top[i] = q.best[lane];
  int64_t n = -1;
  float most = (float)-kInf, bound = 0;
  for (int64_t j = from; j < to; j++) {
    const float product = segment(rows + j * s.stride, t.z + i * (s.k0 + s.bands), s.k0);
    const float alone = product + q.a2[lane] * t.h[j] + (s.no_bias ? 0 : q.s2[lane] * t.bias[j]);
    const float guess = (1 - kBandsInGuess) * alone + kBandsInGuess * t.p[j * q.Bp + lane];
    if (!(guess > most)) continue;
    most = guess;
    bound = t.p[j * q.Bp + lane];
    n = id(j);
  }
  if (n < 0) return;
  if (bound < query.least(l.best)) return;  // it cannot be better
  s.consider(t.order[i], n, l);
  if (l.given_up) return;
  q.least[lane] = t.least[i] = query.least(l.best);
  if (s.in_blocks) t.reach[i] = reach_of_boxes(s, t.order[i], l.best);
}

static void level_zero(ScanTask& t, int64_t n0, int64_t cnt) {
  const ScanCall& s = *t.s;
  const float* rows = s.bound->coarse + n0 * s.stride;
  for (int64_t j = 0; j < cnt; j++) {
    t.h[j] = (float)(-0.5 * s.rows->sq_norms[n0 + j]);
    if (!s.no_bias) t.bias[j] = (float)s.in->bias[n0 + j];
  }
  t.bound_rows(t, rows, cnt, t.x0, s.k0, s.k0 + s.bands, t.Bp);
  for (int64_t i = 0; i < t.B; i++) try_best(t, t, i, i, rows, cnt, [&](int64_t j) { return n0 + j; });
}

// How many pairs of a row and a query the bounds of a chunk leave.
static int64_t pairs_left(const ScanTask& t, int64_t cnt) {
  enum { W = Vec<float>::W };
  Vec<float>::I sum = {};
  int64_t total = 0;
  if (t.Bp == 1) {
    for (int64_t j = 0; j < cnt; j++) total += !(t.p[j] < t.least[0]);
    return total;
  }
  for (int64_t j = 0; j < cnt; j++)
    for (int64_t i = 0; i < t.Bp; i += W) sum += load(t.p + j * t.Bp + i) < load(t.least + i);
  for (int i = 0; i < W; i++) total += sum[i];
  return cnt * t.Bp + total;  // a lane of a comparison that holds is -1
}

// The block's queries, packed for a further level.
static const float* queries_of_level(ScanTask& t, int64_t level) {
  if (t.x_level[level]) return t.x_level[level];
  const ScanCall& s = *t.s;
  const LogitBounds& in = *s.bound;
  const int64_t K = ScanTask::depth(s, level);
  float* x = t.x_further;
  for (int64_t l = 1; l < level; l++) x += ScanTask::depth(s, l) * s.lanes;
  t.x_level[level] = x;
  memset((void*)x, 0, K * s.lanes * sizeof(float));
  for (int64_t i = 0; i < t.B; i++) {
    const int64_t b = t.order[i];
    const ScanQuery& q = s.q[b];
    if (!q.active) continue;
    const float* norms = in.norms + b * (s.bands + 1);
    int64_t k = 0;
    for (int64_t d = in.dims[level - 1]; d < in.dims[level]; d++)
      *t.at(x, K, i, k++) = (float)q.alpha * in.z[b * s.K + d];
    for (int64_t e = in.first_band[level - 1]; e < in.first_band[level]; e++)
      *t.at(x, K, i, k++) = -(float)q.a * norms[e];
    if (level == 1) *t.at(x, K, i, k) = (float)q.a * norms[s.bands];
  }
  return x;
}

// A further level of a whole chunk.
static void further_level(ScanTask& t, int64_t level, int64_t n0, int64_t cnt) {
  enum { W = Vec<float>::W, NR = 2 * W };
  const ScanCall& s = *t.s;
  const int64_t K = ScanTask::depth(s, level);
  const float* queries = queries_of_level(t, level);
  Prefetch none = {};  // the index is small, and its rows come by themselves
  const int64_t tile = imax(ROW_UNIT, imin(SCAN_TILE_ROWS, SCAN_TILE_NUMBERS / K / ROW_UNIT * ROW_UNIT));
  for (int64_t j0 = 0; j0 < cnt; j0 += tile) {
    const int64_t m = imin(tile, cnt - j0);
    (s.bound->fine_is_half ? tile_of_level<F16> : tile_of_level<float>)(s, level, n0 + j0, m, t.y);
    for (int64_t k = 0; k < K; k += KC)
      for (int64_t i = 0; i < t.Bp; i += NR) {
        const int64_t n = imin(NR, t.Bp - i), len = imin(KC, K - k);
        const float *x = queries + i * K + k * n, *rows = t.y + k * SCAN_TILE_ROWS;
        float* to = t.p + j0 * t.Bp + i;
        if (n == NR)
          for (int64_t j = 0; j < m; j += MR)
            micro_kernel<float, MR, 2, 1, NR>(rows + j * NR, 1, NR, SCAN_TILE_ROWS * NR, x, NR, len,
                                              to + j * t.Bp, t.Bp, true, none, 0);
        else
          for (int64_t j = 0; j < m; j += ROW_UNIT)
            micro_kernel<float, ROW_UNIT, 1, 1, NR>(rows + j * NR, 1, NR, SCAN_TILE_ROWS * NR, x, W, len,
                                                    to + j * t.Bp, t.Bp, true, none, 0);
      }
  }
}

// Puts the rows that are left of cnt rows on the lists of the queries in q: lane i has query of(i) of the
// block. id(j) is the number of row j.
template <class Of, class Id>
static void list_rows(ScanTask& t, const Lanes& q, int64_t cnt, const Of& of, const Id& id) {
  enum { W = Vec<float>::W };
  bool full = false;
  uint64_t live = 0;  // lanes without a query, or of one given up, list nothing: not even a NaN
  for (int64_t i = 0; i < q.B; i++) live |= (uint64_t)(q.least[i] < (float)kInf) << i;
  for (int64_t j = 0; q.Bp == 1 && live && j < cnt; j++)
    if (!(t.p[j] < q.least[0])) full |= !t.lists[t.order[of(0)]].push((uint32_t)id(j), t.p[j]);
  for (int64_t j = 0; q.Bp > 1 && j < cnt; j++) {
    const float* to = t.p + j * q.Bp;
    uint64_t bits = 0;
    for (int64_t i = 0; i < q.Bp; i += W)
      bits |= (uint64_t)(~lanes_of(load(to + i) < load(q.least + i)) & ((1 << W) - 1)) << i;
    for (bits &= live; bits; bits &= bits - 1) {
      const int e = __builtin_ctzll(bits);
      full |= !t.lists[t.order[of(e)]].push((uint32_t)id(j), to[e]);
    }
  }
  if (full) t.failed |= kNoMemory;
}

// A list that has grown too long passes the other levels at once; if it is still too long, its query is given
// up.
static void cut_long_lists(ScanTask& t, float* scratch) {
  const ScanCall& s = *t.s;
  const int64_t most =
      (int64_t)((1 + s.bound->reading) * (double)s.bound->most_listed / full_product_share(*s.rows));
  const int64_t limit = imax(SCAN_LIST_ROWS, most);
  for (int64_t i = 0; i < t.B; i++) {
    List& l = t.lists[t.order[i]];
    if (l.count <= limit) continue;
    l.filter(t.least[i]);
    if (l.count <= limit / 4 * 3) continue;
    pass_levels(s, t.order[i], l, scratch);
    t.least[i] = s.q[t.order[i]].least(l.best);
    if (l.count <= most) continue;
    l.given_up = true;
    l.count = l.done = 0;
    t.least[i] = (float)kInf;
  }
}

// The chunks c0 .. c1. `level` [chunks] receives the level that each has reached.
static void scan_chunks(ScanTask& t, int64_t c0, int64_t c1, uint8_t* level, float* scratch) {
  const ScanCall& s = *t.s;
  const int64_t n_end = imin(s.N, c1 * s.NT);
  for (int64_t i = 0; i < t.B; i++) t.lists[t.order[i]].levels = level;
  for (int64_t c = c0; c < c1; c++) {
    const int64_t n0 = c * s.NT, cnt = imin(s.NT, n_end - n0);
    if (t.pace.stopped(cnt * t.Bp * s.stride)) {
      t.failed |= kStopped;
      return;
    }
    level_zero(t, n0, cnt);
    int64_t left = pairs_left(t, cnt), l = 0;
    // For the whole chunk a level of K numbers costs K / 4 cycles for each query and row, and the tile; row
    // by row it costs about 128 + K, which for one query alone is always less than a vector of queries.
    for (; l < s.last_level && t.Bp > 1; l++) {
      const int64_t K = ScanTask::depth(s, l + 1);
      if (left * (224 + K) < cnt * K * (t.Bp + 8) / 5) break;
      further_level(t, l + 1, n0, cnt);
      left = pairs_left(t, cnt);
    }
    level[c] = (uint8_t)l;
    for (int64_t i = 0; i < t.B; i++) t.lists[t.order[i]].level = (int)imax(t.lists[t.order[i]].level, l + 1);
    if (left == 0) continue;
    list_rows(t, t, cnt, [](int64_t i) { return i; }, [&](int64_t j) { return n0 + j; });
    cut_long_lists(t, scratch);
  }
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
