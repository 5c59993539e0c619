// Tiles of rows from device memory to shared memory, each block its own features.
#pragma once
#include "sweep/variant.h"

namespace memokern {
namespace cuda {

// The tiles of a block: every cluster takes one and skips those of the others.
struct Tiles {
  i64 n;      // rows
  int count;  // tiles of this cluster
  int width;  // features of this block that exist
};
MK_DEVICE i64 first_row(int i) { return ((i64)i * cluster_count() + cluster_index()) * kRows; }
// Of tile i.
MK_DEVICE int rows_of(const Tiles& tiles, int i) {
  const i64 left = tiles.n - first_row(i);
  return left < kRows ? (int)left : (int)kRows;
}
template <class Params>
MK_DEVICE Tiles tiles_of(const Params& p) {
  const i64 all = (p.n + kRows - 1) / kRows, own = all - cluster_index();
  const i64 left = p.d - (i64)cluster_rank() * kFeatures;
  Tiles t;
  t.n = p.n;
  t.count = own <= 0 ? 0 : (int)((own + cluster_count() - 1) / cluster_count());
  t.width = left < 0 ? 0 : left < kFeatures ? (int)left : (int)kFeatures;
  return t;
}

MK_DEVICE u8* stage(const Shared& s, int i) { return s.rows + (i64)(i % kStages) * kRows * kRowPitch; }

// Begins to bring tile i, by the first warp where the machine copies: each row's piece is one copy. Else all
// threads copy, number by number, and rows that do not exist become zeros.
template <class Params>
MK_DEVICE void fetch(const Params& p, const Shared& s, const Tiles& tiles, int i) {
  if (i >= tiles.count) return;
  enum { kBytes = Numbers::kBytes };
  u8* const to = stage(s, i);
  const int rows = rows_of(tiles, i);
  const u8* const from = (const u8*)p.rows + (i64)cluster_rank() * kFeatures * kBytes;
  const i64 n0 = first_row(i);
  if constexpr (kBulk) {
    if (warp_index() != 0) return;
    u64* const full = s.full + i % kStages;
    const u32 bytes = tiles.width * kBytes;
    if (lane_index() == 0) barrier_expect(full, rows * bytes);
    warp_sync();
    if (bytes)
      for (int j = lane_index(); j < rows; j += 32)
        bulk_copy(to + j * kRowPitch, from + (n0 + j) * p.stride * kBytes, bytes, full);
  } else {
    for (int k = thread_index(); k < kRows * tiles.width; k += kThreads) {
      const int j = k / tiles.width, d = k % tiles.width;
      const i64 at = (n0 + j) * p.stride + d;
      u8* const put = to + j * kRowPitch + d * kBytes;
      if constexpr (kBytes == 4)
        *(u32*)put = j < rows ? ((const u32*)from)[at] : 0;
      else if constexpr (kBytes == 2)
        *(u16*)put = j < rows ? ((const u16*)from)[at] : 0;
      else
        *put = j < rows ? from[at] : 0;
    }
  }
}

// Waits for tile i. Rows that do not exist become zeros, because a weight of 0 times what lies there must be
// 0.
MK_DEVICE void wait_for_tile(const Shared& s, const Tiles& tiles, int i) {
  if constexpr (kBulk) {  // else the barriers since it was copied have made it visible
    barrier_wait(s.full + i % kStages, i / kStages & 1);
    const int rows = rows_of(tiles, i);
    if (rows == kRows) return;
    u32* const rest = (u32*)(stage(s, i) + rows * kRowPitch);
    for (int k = thread_index(); k < (kRows - rows) * kRowPitch / 4; k += kThreads) rest[k] = 0;
    block_sync();
  }
}

}  // namespace cuda
}  // namespace memokern
