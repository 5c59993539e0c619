// The two phases before a scan proper: a first look, which finds a good row for each query, and a sample,
// which shows how long the lists would be.
#pragma once
#include "cpu/scan/task-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

// h [cnt] = -|.|^2 / 2 of the first K coordinates of rows that lie `stride` apart.
static void look_norms(const float* coarse, int64_t stride, int64_t K, int64_t cnt, float* h) {
  enum { W = Vec<float>::W };
  typedef Vec<float>::T F;
  int64_t j = 0;
  for (; K % W == 0 && j + W <= cnt; j += W) {
    F v[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) {
      const float* c = coarse + (j + i) * stride;
      v[i] = load(c) * load(c);
      for (int64_t k = W; k < K; k += W) v[i] += load(c + k) * load(c + k);
    }
    store(h + j, lane_sums(v) * -0.5f);
  }
  for (; j < cnt; j++) {
    const float* c = coarse + j * stride;
    h[j] = 0;
    for (int64_t k = 0; k < K; k++) h[j] -= 0.5f * c[k] * c[k];
  }
}

// The first look, at the rows n0 .. n1: s_n from a few leading coordinates alone, as if the others were zero.
// The best row by it is evaluated exactly afterwards. On CIFAR-10 eight coordinates find the best row of 96 %
// of the queries at sigma = 1.1 and of 66 % at 1.9.
static void first_look(ScanTask& t, int64_t n0, int64_t n1) {
  const ScanCall& s = *t.s;
  const int64_t K = imin(LOOK_COORDINATES, s.k0), K0 = s.k0 + s.bands;
  for (int64_t i = 0; i < t.Bp; i++)
    for (int64_t k = 0; k < K; k++) *t.at(t.x_look, K, i, k) = *t.at(t.x0, K0, i, k);
  int64_t found[SCAN_B];
  for (int64_t i = 0; i < t.B; i++) found[i] = -1;
  for (int64_t n = n0; n < n1; n += s.NT) {
    const int64_t cnt = imin(s.NT, n1 - n);
    if (t.pace.stopped(cnt * t.Bp * (K + 4))) {
      t.failed |= kStopped;
      return;
    }
    look_norms(s.bound->coarse + n * s.stride, s.stride, K, cnt, t.h);
    for (int64_t j = 0; j < cnt && !s.no_bias; j++) t.bias[j] = (float)s.in->bias[n + j];
    t.bound_rows(t, s.bound->coarse + n * s.stride, cnt, t.x_look, K, K, 0);
    for (int64_t i = 0; i < t.B; i++) {
      if (!(t.best[i] > t.top[i])) continue;
      for (int64_t j = t.where[i]; j < imin(t.where[i] + (int64_t)ROW_UNIT, cnt); j++) {
        const float* c = s.bound->coarse + (n + j) * s.stride;
        const float v =
            t.a2[i] * t.h[j] + (s.no_bias ? 0 : t.s2[i] * t.bias[j]) + segment(c, t.z + i * K0, K);
        if (!(v > t.top[i])) continue;
        t.top[i] = v;
        found[i] = n + j;
      }
    }
  }
  for (int64_t i = 0; i < t.B; i++) {
    List& l = t.lists[t.order[i]];
    l.found = found[i];
    l.guess = t.top[i];
  }
}

// Evaluates what the first looks of all parts found best, for each query that is scanned.
static int consider_found(const ScanCall& s, int threads) {
  enum { QUERIES = 8 };  // of a part
  return for_parts(threads, (s.count + QUERIES - 1) / QUERIES, [&](int64_t j, int) {
    for (int64_t i = j * QUERIES; i < imin(s.count, (j + 1) * QUERIES); i++) {
      const int64_t b = s.order[i], B = s.in->b;
      const List* best = s.lists + b;
      for (int64_t p = 1; p < s.parts; p++)
        if (s.lists[p * B + b].guess > best->guess) best = s.lists + p * B + b;
      if (best->found >= 0) s.consider(b, best->found, s.lists[b]);
      if (s.in_blocks) {
        s.left[b] = (float)blocks_left(s, b, s.lists[b].best);
        for (int64_t e = 0; e < LOOK_MORE && s.left[b] > kLookAgain; e++)
          if (s.next[b * LOOK_MORE + e] >= 0) s.consider(b, s.next[b * LOOK_MORE + e], s.lists[b]);
      }
      for (int64_t p = 1; p < s.parts; p++) {
        s.lists[p * B + b].tried = s.lists[b].tried;
        s.lists[p * B + b].best = s.lists[b].best;
      }
    }
    return (int)kDone;
  });
}

// What a level of the index costs each of so many queries, in cycles for one that a query computes. Queries
// fill vectors; one alone goes row by row, and its rows are read ahead.
static double share_of_work(int64_t queries) {
  enum { W = Vec<float>::W };
  if (queries == 1) return 1 + kIndexReading / 2;
  return (kIndexReading + (double)round_up(queries, (int64_t)W)) / (double)queries;
}

// Leaves about `most` rows of a list, evenly spaced. Returns how many rows each of them stands for.
static double thin_out(List& l, int64_t most) {
  if (l.count <= most) return 1;
  const int64_t count = l.count;
  for (int64_t i = 0; i < most; i++) l.e[i] = l.e[i * count / most];
  l.count = most;
  return (double)count / (double)most;
}

// Sets s.expected from the rows in s.sample: what a list would cost, its length and the work on the way there
// together, in rows listed. scratch [K - k0] is work space.
static void sample_lists(ScanTask& t, float* scratch) {
  const ScanCall& s = *t.s;
  const int64_t K0 = s.k0 + s.bands, step = imin(SAMPLE_ROWS, s.NT), most_listed = s.bound->most_listed;
  List few[SCAN_B];
  memset((void*)few, 0, sizeof few);
  for (int64_t j0 = 0; j0 < SAMPLE_ROWS; j0 += step) {
    const int64_t cnt = imin(step, SAMPLE_ROWS - j0);
    for (int64_t j = 0; j < cnt; j++) {
      const int64_t n = s.sampled(j0 + j);
      t.h[j] = (float)(-0.5 * s.rows->sq_norms[n]);
      if (!s.no_bias) t.bias[j] = (float)s.in->bias[n];
    }
    t.bound_rows(t, s.sample + j0 * s.stride, cnt, t.x0, s.k0, K0, t.Bp);
    for (int64_t i = 0; i < t.B; i++)
      for (int64_t j = 0; j < cnt && t.least[i] < (float)kInf && s.may_be_long(t.order[i]); j++)
        if (t.p[j * t.Bp + i] >= t.least[i])
          if (!few[i].push((uint32_t)s.sampled(j0 + j), t.p[j * t.Bp + i])) t.failed |= kNoMemory;
  }
  const double each = (double)s.N / SAMPLE_ROWS;
  for (int64_t i = 0; i < t.B; i++) {
    const int64_t b = t.order[i];
    few[i].best = t.lists[b].best;
    double rows = each;  // that each of the few stands for
    if (few[i].count * each > most_listed) {
      rows *= thin_out(few[i], SAMPLE_LEVELS);
      pass_levels(s, b, few[i], scratch);
    }
    double listed = few[i].work * share_of_work(s.count) / (kListedCycles * s.D) +
                    few[i].count * (full_product_share(*s.rows) + row_share(*s.rows) / s.count);
    if ((listed + few[i].count) * rows > most_listed) listed += few[i].count * share_left(s, b, few[i]);
    s.expected[b] = listed * rows * kBetterRows;
    t.lists[b].best = few[i].best;  // proven too
    free(few[i].e);
  }
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
