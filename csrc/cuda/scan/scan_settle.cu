// What is known of the best row, and which rows it leaves. One block owns a query.
//
// memokern_scan_settle_first looks at the rows that promise most after the first level, by direct
// differences: the best of them is a lower bound on the best of all, from which `least` follows.
// memokern_scan_settle_next does the same with the most promising row of the list after a later level, and
// then streams the list, whose rows below `least` go: what is kept moves up, in place and in order. After
// each step the list's rows so far lie before all that is still to be read.
#include "scan/query.h"

namespace memokern {
namespace cuda {

enum { kPromising = 4, kListEach = 4 };  // rows that are looked at; rows of a thread and step

MK_DEVICE constexpr i64 settle_shared_bytes() {
  return array_bytes(8 * kScanWarps) + array_bytes((i64)sizeof(Found) * kScanWarps) +
         array_bytes(4 * 2 * kListEach * kScanWarps);
}
struct SettleShared {
  double* sums;  // [kScanWarps]
  Found* found;  // [kScanWarps]
  u32* counts;   // [2][kListEach][kScanWarps]
};
MK_DEVICE SettleShared settle_arrays() {
  u8* next = shared_memory();
  SettleShared s;
  s.sums = next_array<double>(next, kScanWarps);
  s.found = next_array<Found>(next, kScanWarps);
  s.counts = next_array<u32>(next, 2 * kListEach * kScanWarps);
  return s;
}

// A lower bound of s_n - |xc|^2 / 2, by direct differences and less their rounding.
MK_DEVICE double reached_by(const ScanParams& p, i64 b, i64 n, double* shared) {
  double sum = 0;
#pragma unroll 4
  for (i64 d = thread_index(); d < p.d; d += kScanThreads) {
    const double v = difference_at<MK_ROWS>(p.rows, n * p.stride + d, p.x[b * p.d + d], p.alpha[b],
                                            (float)p.scale, (float)p.shift);
    sum += v * v;
  }
  const double r2 = block_sum(sum, shared, kScanWarps);
  const double of_bias = p.bias ? p.sigma[b] * p.sigma[b] * p.bias[n] : 0, value = of_bias - 0.5 * r2;
  const double less = ((double)p.d + 16) * 2.3e-16 * r2 + 1e-15 * fabs(of_bias);
  return value - value == 0 ? value - less : -infinity();
}

// float32, not above best + reach.
MK_DEVICE float least_of(const ScanParams& p, i64 b, double best) {
  const float value = (float)(best + p.reach[b]);
  return value - fabsf(value) * 1.3e-7f;
}

// The best of a query's groups after `last`, which is the one before it.
MK_DEVICE Found next_group(const ScanParams& p, i64 b, i64 groups, Found last, const SettleShared& s) {
  Found found = {-(float)infinity(), 0xffffffffu};
  for (i64 g = thread_index(); g < groups; g += kScanThreads) {
    const Found one = {p.guess[b * groups + g], (u32)g};
    const bool after = one.value < last.value || (one.value == last.value && one.at > last.at);
    if (after) found = better(found, one);
  }
  return block_best(found, s.found, kScanWarps);
}

MK_PLAIN_KERNEL(kScanThreads) memokern_scan_settle_first(MK_PARAMS(ScanParams, p)) {
  const SettleShared s = settle_arrays();
  const i64 b = block_x(), groups = blocks_of(p.n, kTileRows) * 2;
  const bool active = is_active(p, b);
  double best = -infinity();
  // Before all groups.
  Found last = {(float)infinity(), 0};
  for (int i = 0; i < kPromising && active; i++) {
    last = next_group(p, b, groups, last, s);
    if (last.at >= groups) break;
    const double value = reached_by(p, b, p.place[b * groups + last.at], s.sums);
    best = fmax(best, value);
  }
  if (thread_index() != 0) return;
  p.best[b] = best;
  p.least[b] = active ? least_of(p, b, best) : (float)infinity();
  p.level[b] = 1;
}

// Takes the rows that are not kept out of a query's list. Returns how many are left.
MK_DEVICE i64 compact(const ScanParams& p, i64 b, i64 count, float least, u32* counts) {
  u32* const index = p.index + b * p.n;
  float* const left = p.left + b * p.n;
  const int warp = warp_index(), thread = thread_index();
  i64 before = 0;
  for (i64 i = 0, turn = 0; i < count; i += kListEach * kScanThreads, turn ^= 1) {
    u32 row[kListEach], kept[kListEach];
    float bound[kListEach];
    u32* const mine = counts + turn * kListEach * kScanWarps;
    MK_UNROLL
    for (int j = 0; j < kListEach; j++) {
      const i64 at = i + j * kScanThreads + thread;
      row[j] = at < count ? index[at] : 0;
      bound[j] = at < count ? left[at] : 0;
    }
    MK_UNROLL
    for (int j = 0; j < kListEach; j++) {
      kept[j] = warp_ballot(i + j * kScanThreads + thread < count && is_kept(bound[j], least));
      if (lane_index() == 0) mine[j * kScanWarps + warp] = count_bits(kept[j]);
    }
    block_sync();  // all have read, and know how many of the others' rows are kept
    MK_UNROLL
    for (int j = 0; j < kListEach; j++)
      for (int w = 0; w < kScanWarps; w++) {
        if (w == warp && (kept[j] >> lane_index() & 1)) {
          const i64 to = before + count_bits(bits_before(kept[j]));
          index[to] = row[j];
          left[to] = bound[j];
        }
        before += mine[j * kScanWarps + w];
      }
  }
  return before;
}

MK_PLAIN_KERNEL(kScanThreads) memokern_scan_settle_next(MK_PARAMS(ScanParams, p)) {
  const SettleShared s = settle_arrays();
  const i64 b = block_x(), count = p.count[b];
  block_sync();  // all have read it
  if (count <= 1) return;
  Found found = {-(float)infinity(), 0xffffffffu};
  for (i64 i = thread_index(); i < count; i += kScanThreads) {
    const float bound = p.left[b * p.n + i];
    if (bound == bound) found = better(found, {bound, (u32)i});
  }
  found = block_best(found, s.found, kScanWarps);
  double best = p.best[b];
  if (found.at < count) {
    const double value = reached_by(p, b, p.index[b * p.n + found.at], s.sums);
    best = fmax(best, value);
  }
  const float least = least_of(p, b, best);
  const i64 kept = compact(p, b, count, least, s.counts);
  if (thread_index() != 0) return;
  p.best[b] = best;
  p.least[b] = least;
  p.count[b] = kept;
  p.level[b] += 1;
}

}  // namespace cuda
}  // namespace memokern
