// posterior_pruned: a posterior from the rows that an index cannot exclude, in one call.
//
// The queries are projected, unless they come projected; the rows scanned; the queries whose lists would cost
// more than a dense sweep left out, for the caller to sweep; and the other lists summed. Each of these is
// parts handed out to the same threads, which stay awake between.
#pragma once
#include "cpu/listed/listed-inl.h"
#include "cpu/project/project-inl.h"
#include "cpu/scan/scan-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

struct Length {
  int64_t count, b;
};
static int longer(const void* a, const void* b) {
  const Length &x = *(const Length*)a, &y = *(const Length*)b;
  return x.count > y.count ? -1 : x.count < y.count ? 1 : x.b < y.b ? -1 : 1;
}

// Gives up those queries whose lists cost more than what they add to a sweep, so that both together cost
// least: the longest lists go first. `length` [B] is work space.
static void split(const SplitCosts& costs, int64_t B, int64_t N, int64_t* level, const int64_t* start,
                  Length* length) {
  double left = 0, best = kInf;
  int64_t gone = 0, given_up = 0;
  for (int64_t b = 0; b < B; b++) {
    const int64_t count = start[b + 1] - start[b];
    length[b].count = level[b] == 0 ? N + 1 : count;
    length[b].b = b;
    given_up += level[b] == 0;
    left += (double)count;
  }
  qsort((void*)length, B, sizeof(Length), longer);
  for (int64_t g = given_up; g <= B; g++) {
    const double price = costs.listed * left + (g > 0 ? costs.sweep + costs.query * (double)g : 0);
    if (price < best) {
      best = price;
      gone = g;
    }
    if (g < B) left -= (double)length[g].count;
  }
  for (int64_t g = given_up; g < gone; g++) level[length[g].b] = 0;
}

static int run_posterior_pruned(const Rows& rows, const Queries& in, const CosineTransform* transform,
                                const LogitBounds& given, const SplitCosts* costs, const Sums& sums,
                                const Pruned& out, int threads) {
  const int64_t B = in.b, D = rows.d;
  if (B == 0) return kDone;
  LogitBounds bound = given;
  threads = threads_for(threads, scan_work(rows, in, bound) + 32.0 * B * D);
  Arena arena, lists;
  const int64_t kept = transform ? B * transform->kept : 0,
                norms = transform ? B * (transform->bands + 1) : 0, each = transform ? B : 0;
  if (!arena.reserve(Arena::bytes<float>(kept) + Arena::bytes<float>(norms) + 2 * Arena::bytes<double>(each) +
                     Arena::bytes<int64_t>(B + 1) + Arena::bytes<Length>(B)))
    return kNoMemory;
  if (transform) {
    const Projected to = {arena.take_raw<float>(kept), arena.take_raw<float>(norms),
                          arena.take_raw<double>(each), arena.take_raw<double>(each)};
    const int failed = run_project(*transform, (const float*)in.x, in.alpha, B, to, in.watch, threads);
    if (failed) return failed;
    bound.z = to.z;
    bound.norms = to.norms;
    bound.margin = to.margin;
    bound.sq = to.sq;
  }
  int64_t* start = arena.take_raw<int64_t>(B + 1);
  Length* length = arena.take_raw<Length>(B);
  RowLists list;
  {
    Scan scan;
    if (!scan.prepare(rows, in, bound)) return kNoMemory;
    const int failed = scan.run(threads);
    if (failed) return failed;
    const ScanResult found = {start, out.threshold, out.level, nullptr};
    write_starts(scan.s, found);
    if (costs) split(*costs, B, rows.n, out.level, start, length);
    int64_t all = 0;
    for (int64_t b = 0; b < B; b++) {
      out.count[b] = out.level[b] == 0 ? 0 : start[b + 1] - start[b];
      start[b] = all;
      all += out.count[b];
    }
    start[B] = all;
    if (!lists.reserve(Arena::bytes<int64_t>(all))) return kNoMemory;
    int64_t* index = lists.take_raw<int64_t>(all);
    write_rows(scan.s, start, index);
    list = {start, index, all};
  }
  return run_posterior_listed(rows, in, list, sums, threads);
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
