// The lists as they are handed on. memokern_scan_end is one block: each thread owns queries that lie
// together, gives those up that cannot be pruned, and writes where the others' lists begin.
// memokern_scan_gather copies the lists there; `parts` blocks share a query's.
#include "scan/query.h"

namespace memokern {
namespace cuda {

MK_DEVICE constexpr i64 end_shared_bytes() { return array_bytes(8 * kScanThreads); }

MK_PLAIN_KERNEL(kScanThreads) memokern_scan_end(MK_PARAMS(ScanParams, p)) {
  u8* next = shared_memory();
  i64* const of_thread = next_array<i64>(next, kScanThreads);
  const i64 each = blocks_of(p.b, kScanThreads), first = thread_index() * each;
  const i64 last = first + each < p.b ? first + each : p.b;
  i64 sum = 0;
  for (i64 b = first; b < last; b++) {
    const double best = p.best[b];
    const bool lost = !is_active(p, b) || best - best != 0 || p.count[b] > p.most_listed;
    if (lost) p.count[b] = p.level[b] = 0;
    const double unit = p.sigma[b] * p.sigma[b] * p.temperature[b];
    p.threshold[b] = lost ? not_a_number() : best / unit - p.span;
    sum += p.count[b];
  }
  of_thread[thread_index()] = sum;
  block_sync();
  i64 before = 0;
  for (int t = 0; t < thread_index(); t++) before += of_thread[t];
  if (thread_index() == 0) p.start[0] = 0;
  for (i64 b = first; b < last; b++) p.start[b + 1] = before += p.count[b];
}

MK_PLAIN_KERNEL(kScanThreads) memokern_scan_gather(MK_PARAMS(ScanParams, p)) {
  const i64 b = block_x() / p.parts, part = block_x() % p.parts, count = p.count[b];
  for (i64 i = part * kScanThreads + thread_index(); i < count; i += p.parts * kScanThreads)
    p.out[p.start[b] + i] = p.index[b * p.n + i];
}

}  // namespace cuda
}  // namespace memokern
