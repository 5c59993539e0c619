// The further levels of a chunk of rows: of the whole chunk while most pairs of a row and a query are left,
// then row by row, for all queries to which the row is left. So a row's piece of the index comes from memory
// and is converted once for all of them.
#pragma once
#include "cpu/scan/task-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

// Calls put(k, number) for all that query i of the block has at a further level: what a row's piece of that
// level is multiplied with.
template <class Put>
static void each_of_level(const ScanTask& t, int64_t i, int64_t level, const Put& put) {
  const ScanCall& s = *t.s;
  const LogitBounds& in = *s.bound;
  const int64_t b = t.order[i];
  const ScanQuery& q = s.q[b];
  if (!q.active) return;
  const float* norms = in.norms + b * (s.bands + 1);
  int64_t k = 0;
  for (int64_t d = in.dims[level - 1]; d < in.dims[level]; d++) put(k++, (float)q.alpha * in.z[b * s.K + d]);
  for (int64_t e = in.first_band[level - 1]; e < in.first_band[level]; e++) put(k++, -(float)q.a * norms[e]);
  if (level == 1) put(k, (float)q.a * norms[s.bands]);
}

// The block's queries at a further level: for whole chunks packed as at() says, for rows one after the other.
static const float* queries_of_level(ScanTask& t, int64_t level, bool packed) {
  float*& x = (packed ? t.x_packed : t.x_rows)[level];
  if (x) return x;
  const ScanCall& s = *t.s;
  const int64_t K = ScanTask::depth(s, level);
  x = t.unused;
  t.unused += K * s.lanes;
  memset((void*)x, 0, K * s.lanes * sizeof(float));
  for (int64_t i = 0; i < t.B; i++)
    each_of_level(t, i, level, [&](int64_t k, float v) { *(packed ? t.at(x, K, i, k) : x + i * K + k) = v; });
  return x;
}

// A further level of a whole chunk.
static void further_level(ScanTask& t, int64_t level, int64_t n0, int64_t cnt) {
  enum { W = Vec<float>::W, NR = 2 * W };
  const ScanCall& s = *t.s;
  const int64_t K = ScanTask::depth(s, level), numbers = ScanTask::numbers(s, level);
  const float* queries = queries_of_level(t, level, true);
  Prefetch none = {};  // the index is small, and its rows come by themselves
  const int64_t tile = imax(ROW_UNIT, imin(SCAN_TILE_ROWS, SCAN_TILE_NUMBERS / K / ROW_UNIT * ROW_UNIT));
  for (int64_t j0 = 0; j0 < cnt; j0 += tile) {
    const int64_t m = imin(tile, cnt - j0);
    (s.bound->fine_is_half ? tile_of_level<F16> : tile_of_level<float>)(s, level, n0 + j0, m, t.y);
    for (int64_t k = 0; k < numbers; k += KC)
      for (int64_t i = 0; i < t.Bp; i += NR) {
        const int64_t n = imin(NR, t.Bp - i), len = imin(KC, numbers - k);
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
    for (int64_t j = j0; j < j0 + m; j++) t.lanes[j] = lanes_of_row(t, t.p + j * t.Bp);
  }
}

// sum[i] += <y, x[i]> of K numbers, which fill vectors, for Q <= 4 queries.
template <int Q>
MK_INLINE void add_products(const float* y, int64_t K, const float* const* x, float* sum) {
  enum { W = Vec<float>::W };
  typedef Vec<float>::T F;
  F a[4] = {}, b[4] = {};
  int64_t k = 0;
  for (; k + 2 * W <= K; k += 2 * W) {
    const F v = load(y + k), w = load(y + k + W);
#pragma GCC unroll 4
    for (int i = 0; i < Q; i++) {
      a[i] += v * load(x[i] + k);
      b[i] += w * load(x[i] + k + W);
    }
  }
  for (; k < K; k += W) {
    const F v = load(y + k);
#pragma GCC unroll 4
    for (int i = 0; i < Q; i++) a[i] += v * load(x[i] + k);
  }
  float total[4];
#pragma GCC unroll 4
  for (int i = 0; i < Q; i++) a[i] += b[i];
  sums_of_four(a, total);
#pragma GCC unroll 4
  for (int i = 0; i < Q; i++) sum[i] += total[i];
}

// A further level of the rows in t.left [count], of the chunk that begins at n0. Keeps those to which a query
// is left, and returns how many they are.
template <class S>
static int64_t level_of_rows(ScanTask& t, int64_t level, int64_t n0, int64_t count) {
  enum { W = Vec<float>::W, NR = 2 * W, Q = 4, AHEAD = 16 };
  const ScanCall& s = *t.s;
  const int64_t depth = ScanTask::depth(s, level), K = round_up(ScanTask::numbers(s, level), (int64_t)W);
  const float* queries = queries_of_level(t, level, false);
  for (int64_t r = 0; r < imin(AHEAD, count); r++) ask_for_piece<S>(s, level, n0 + t.left[r].j);
  int64_t kept = 0;
  for (int64_t r = 0; r < count; r++) {
    if (r + AHEAD < count) ask_for_piece<S>(s, level, n0 + t.left[r + AHEAD].j);
    const RowLeft row = t.left[r];
    piece_of_level<S>(s, level, n0 + row.j, t.y, NR);
    float* p = t.p + row.j * t.Bp;
    uint64_t lanes = 0;
    for (uint64_t todo = row.lanes; todo;) {
      int64_t of[Q], n = 0;
      const float* x[Q];
      float sum[Q];
      for (; n < Q && todo; n++, todo &= todo - 1) {
        of[n] = __builtin_ctzll(todo);
        x[n] = queries + of[n] * depth;
        sum[n] = p[of[n]];
      }
      for (int64_t e = n; e < Q; e++) {  // queries that are not there: any numbers
        x[e] = x[0];
        sum[e] = 0;
      }
      if (n == 1)
        add_products<1>(t.y, K, x, sum);
      else
        add_products<Q>(t.y, K, x, sum);
      for (int64_t e = 0; e < n; e++) {
        p[of[e]] = sum[e];
        lanes |= (uint64_t)!(sum[e] < t.least[of[e]]) << of[e];
      }
    }
    t.left[kept] = {row.j, lanes};  // without a branch, which would be guessed wrong half of the time
    kept += lanes != 0;
  }
  return kept;
}

// Takes what is left of the chunk n0 .. n0 + cnt from `level` through all others, and lists the rest.
static void pass_rows(ScanTask& t, int64_t level, int64_t n0, int64_t cnt) {
  const ScanCall& s = *t.s;
  const uint64_t live = live_lanes(t);
  int64_t count = 0;
  for (int64_t j = 0; j < cnt; j++) {
    const uint64_t lanes = t.lanes[j] & live;
    if (lanes) t.left[count++] = {j, lanes};
  }
  while (++level <= s.last_level && count) {
    uint64_t asked = 0;
    for (int64_t r = 0; r < count; r++) asked |= t.left[r].lanes;
    for (; asked; asked &= asked - 1) {
      List& l = t.lists[t.order[__builtin_ctzll(asked)]];
      l.level = (int)imax(l.level, level + 1);
    }
    count = (s.bound->fine_is_half ? level_of_rows<F16> : level_of_rows<float>)(t, level, n0, count);
  }
  int64_t most[SCAN_B];  // the row that promises most of those listed
  for (int64_t i = 0; i < t.B; i++) most[i] = -1;
  for (int64_t r = 0; r < count; r++)
    for (uint64_t lanes = t.left[r].lanes; lanes; lanes &= lanes - 1) {
      const int64_t i = __builtin_ctzll(lanes), j = t.left[r].j;
      const float up = t.p[j * t.Bp + i];
      if (!t.lists[t.order[i]].push((uint32_t)(n0 + j), up)) t.failed |= kNoMemory;
      if (most[i] < 0 || up > t.p[most[i] * t.Bp + i]) most[i] = j;
    }
  for (int64_t i = 0; i < t.B; i++) {
    List& l = t.lists[t.order[i]];
    l.done = l.count;
    // Evaluated exactly, it makes others drop out.
    if (most[i] < 0 || l.count <= WORTH_EVALUATING) continue;
    const float up = t.p[most[i] * t.Bp + i];
    if (!(up > t.highest[i])) continue;
    t.highest[i] = up;
    s.consider(t.order[i], n0 + most[i], l);
    t.least[i] = s.q[t.order[i]].least(l.best);
  }
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
