// The two phases before a scan proper: a first look, which finds a good row for each query, and a sample,
// which shows how long the lists would be.
#pragma once
#include "cpu/scan/task-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

// The first look, at the rows n0 .. n1: s_n from a few leading coordinates alone, as if the others were zero.
// The best row by it is evaluated exactly. On CIFAR-10 eight coordinates find the best row of 96 % of the
// queries at sigma = 1.1 and of 66 % at 1.9.
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
    for (int64_t j = 0; j < cnt; j++) {
      const float* c = s.bound->coarse + (n + j) * s.stride;
      t.h[j] = 0;
      for (int64_t k = 0; k < K; k++) t.h[j] -= 0.5f * c[k] * c[k];
      if (!s.no_bias) t.bias[j] = (float)s.in->bias[n + j];
    }
    t.bound_rows(s.bound->coarse + n * s.stride, cnt, t.x_look, K, K, 0);
    for (int64_t i = 0; i < t.B; i++) {
      if (!(t.best[i] > t.top[i])) continue;
      for (int64_t j = t.where[i]; j < imin(t.where[i] + (int64_t)ROW_UNIT, cnt); j++) {
        const float* c = s.bound->coarse + (n + j) * s.stride;
        float v = t.a2[i] * t.h[j] + (s.no_bias ? 0 : t.s2[i] * t.bias[j]);
        for (int64_t k = 0; k < K; k++) v += c[k] * *t.at(t.x_look, K, i, k);
        if (!(v > t.top[i])) continue;
        t.top[i] = v;
        found[i] = n + j;
      }
    }
  }
  for (int64_t i = 0; i < t.B; i++) {
    const int64_t b = t.order[i];
    t.top[i] = (float)-kInf;
    if (found[i] >= 0) s.consider(b, found[i], t.lists[b]);
    t.least[i] = s.q[b].least(t.lists[b].best);
  }
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
    t.bound_rows(s.sample + j0 * s.stride, cnt, t.x0, s.k0, K0, t.Bp);
    for (int64_t i = 0; i < t.B; i++)
      for (int64_t j = 0; j < cnt && t.least[i] < (float)kInf; j++)
        if (t.p[j * t.Bp + i] >= t.least[i])
          if (!few[i].push((uint32_t)s.sampled(j0 + j), t.p[j * t.Bp + i])) t.failed |= kNoMemory;
  }
  const double each = (double)s.N / SAMPLE_ROWS;
  for (int64_t i = 0; i < t.B; i++) {
    const int64_t b = t.order[i];
    few[i].best = t.lists[b].best;
    few[i].levels = s.level_zero;
    if (few[i].count * each > most_listed) pass_levels(s, b, few[i], scratch);
    double listed = few[i].work * (1 + kIndexReading / s.count) / (kListedCycles * s.D) +
                    few[i].count * (kFullProductShare + kRowShare / s.count);
    if ((listed + few[i].count) * each > most_listed) listed += few[i].count * share_left(s, b, few[i]);
    s.expected[b] = listed * each * kBetterRows;
    t.lists[b].best = few[i].best;  // proven too
    free(few[i].e);
  }
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
