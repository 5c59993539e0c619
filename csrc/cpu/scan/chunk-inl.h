// The scan proper of a task, chunk by chunk: level 0 of a whole chunk with queries across the lanes; the most
// promising row of each query evaluated; further levels (further-inl.h); then the rows that are left go to a
// list for each query. A query alone has its further levels later, from the list.
#pragma once
#include "cpu/scan/further-inl.h"

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
  int64_t total = 0;
  for (int64_t j = 0; j < cnt; j++)
    total += t.Bp == 1 ? !(t.p[j] < t.least[0]) : __builtin_popcountll(t.lanes[j]);
  return total;
}

// Puts the rows that are left of cnt rows on the lists of the queries in q: lane i has query of(i) of the
// block. id(j) is the number of row j.
template <class Of, class Id>
static void list_rows(ScanTask& t, const Lanes& q, int64_t cnt, const Of& of, const Id& id) {
  bool full = false;
  const uint64_t live = live_lanes(q);
  for (int64_t j = 0; q.Bp == 1 && live && j < cnt; j++)
    if (!(t.p[j] < q.least[0])) full |= !t.lists[t.order[of(0)]].push((uint32_t)id(j), t.p[j]);
  for (int64_t j = 0; q.Bp > 1 && j < cnt; j++) {
    const float* to = t.p + j * q.Bp;
    for (uint64_t bits = t.lanes[j] & live; bits; bits &= bits - 1) {
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

// Whether a further level is cheaper for a whole chunk than row by row, where `left` pairs of a row and a
// query are left. In cycles, about: a whole chunk takes K / 12 for each pair, and 1.5 K a row to convert it;
// a pair alone 12 + K / 6, and a row that is left 40 more.
static bool as_a_whole(const ScanTask& t, int64_t level, int64_t left, int64_t cnt) {
  const double K = (double)ScanTask::depth(*t.s, level);
  return cnt * K * ((double)t.Bp / 12 + 0.5) < left * (12 + K / 6);
}

// The chunks c0 .. c1.
static void scan_chunks(ScanTask& t, int64_t c0, int64_t c1, float* scratch) {
  const ScanCall& s = *t.s;
  const int64_t n_end = imin(s.N, c1 * s.NT);
  for (int64_t c = c0; c < c1; c++) {
    const int64_t n0 = c * s.NT, cnt = imin(s.NT, n_end - n0);
    if (t.pace.stopped(cnt * t.Bp * s.stride)) {
      t.failed |= kStopped;
      return;
    }
    level_zero(t, n0, cnt);
    int64_t left = pairs_left(t, cnt), l = 0;
    for (; l < s.last_level && t.Bp > 1 && as_a_whole(t, l + 1, left, cnt); l++) {
      further_level(t, l + 1, n0, cnt);
      left = pairs_left(t, cnt);
    }
    for (int64_t i = 0; i < t.B; i++) t.lists[t.order[i]].level = (int)imax(t.lists[t.order[i]].level, l + 1);
    if (left == 0) continue;
    if (t.Bp > 1)
      pass_rows(t, l, n0, cnt);
    else
      list_rows(t, t, cnt, [](int64_t i) { return i; }, [&](int64_t j) { return n0 + j; });
    cut_long_lists(t, scratch);
  }
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
