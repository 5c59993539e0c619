// The rows that the first level leaves, in order and without atomics. One block owns kChunkRows rows of a
// query, and a warp of it rows that lie together. memokern_scan_count writes how many are left;
// memokern_scan_list adds up the counts of the chunks before its own, which is where its rows go.
#include "scan/query.h"

namespace memokern {
namespace cuda {

enum { kRowsOfWarp = kChunkRows / kScanWarps, kBallots = kRowsOfWarp / 32 };

MK_DEVICE constexpr i64 list_shared_bytes() {
  return array_bytes(8 * kScanWarps) + array_bytes(4 * kScanWarps);
}

// What a block and a thread of it see of their chunk.
struct Chunk {
  i64 b, chunks, chunk, first;  // first: the thread's row of the first ballot
  u32 kept[kBallots];           // of each ballot of the warp, the rows that are left
  float bound[kBallots];
  u32 of_warp;
};
MK_DEVICE Chunk chunk_of(const ScanParams& p) {
  Chunk c;
  c.chunks = blocks_of(p.n, kChunkRows);
  c.b = block_x() / c.chunks;
  c.chunk = block_x() % c.chunks;
  c.first = c.chunk * kChunkRows + warp_index() * kRowsOfWarp + lane_index();
  c.of_warp = 0;
  const float least = p.least[c.b];
  MK_UNROLL
  for (int i = 0; i < kBallots; i++) {
    const i64 n = c.first + 32 * i;
    c.bound[i] = n < p.n ? p.bound[c.b * p.n + n] : 0;
  }
  MK_UNROLL
  for (int i = 0; i < kBallots; i++) {
    c.kept[i] = warp_ballot(c.first + 32 * i < p.n && is_kept(c.bound[i], least));
    c.of_warp += count_bits(c.kept[i]);
  }
  return c;
}

MK_PLAIN_KERNEL(kScanThreads) memokern_scan_count(MK_PARAMS(ScanParams, p)) {
  u8* next = shared_memory();
  next_array<double>(next, kScanWarps);
  u32* const of_warp = next_array<u32>(next, kScanWarps);
  const Chunk c = chunk_of(p);
  const int warp = warp_index();
  if (lane_index() == 0) of_warp[warp] = c.of_warp;
  block_sync();
  if (thread_index() != 0) return;
  u32 sum = 0;
  for (int w = 0; w < kScanWarps; w++) sum += of_warp[w];
  p.chunk[c.b * c.chunks + c.chunk] = sum;
}

MK_PLAIN_KERNEL(kScanThreads) memokern_scan_list(MK_PARAMS(ScanParams, p)) {
  u8* next = shared_memory();
  double* const sums = next_array<double>(next, kScanWarps);
  u32* const of_warp = next_array<u32>(next, kScanWarps);
  const Chunk c = chunk_of(p);
  const int warp = warp_index();
  if (lane_index() == 0) of_warp[warp] = c.of_warp;
  double earlier = 0;  // whole numbers below 2^53
  for (i64 i = thread_index(); i < c.chunk; i += kScanThreads) earlier += p.chunk[c.b * c.chunks + i];
  i64 before = (i64)block_sum(earlier, sums, kScanWarps), all = before;
  for (int w = 0; w < kScanWarps; w++) {
    if (w < warp) before += of_warp[w];
    all += of_warp[w];
  }
  MK_UNROLL
  for (int i = 0; i < kBallots; i++) {
    if (c.kept[i] >> lane_index() & 1) {
      const i64 to = c.b * p.n + before + count_bits(bits_before(c.kept[i]));
      p.index[to] = (u32)(c.first + 32 * i);
      p.left[to] = c.bound[i];
    }
    before += count_bits(c.kept[i]);
  }
  if (c.chunk == c.chunks - 1 && thread_index() == 0) p.count[c.b] = all;
}

}  // namespace cuda
}  // namespace memokern
