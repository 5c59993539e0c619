// What every kernel of scan/ knows of a query. With a = |alpha| and s_n = a <xc, yc_n> - a^2 |yc_n|^2 / 2 +
// sigma^2 b_n, the logit of row n is (s_n - |xc|^2 / 2) / (sigma^2 T), and a row is dropped whose bound on
// s_n lies below `least`. docs/pruning.md has the proofs.
#pragma once
#include "common/arrays.h"
#include "common/block.h"
#include "common/rows.h"
#include "scan/abi.h"

namespace memokern {
namespace cuda {

enum { kScanThreads = 256, kScanWarps = kScanThreads / 32 };
enum { kTileRows = 128, kGroupRows = 64, kChunkRows = 2048 };

MK_DEVICE i64 blocks_of(i64 count, i64 size) { return (count + size - 1) / size; }
MK_DEVICE i64 scaled_width(const ScanParams& p) { return p.k0 + p.fine_width + p.bands + 1; }
// Whether the query's numbers are such that bounds hold in float32; else it is given up.
MK_DEVICE bool is_active(const ScanParams& p, i64 b) { return p.reach[b] < infinity(); }
// A bound that is NaN keeps its row; a query that is given up keeps none.
MK_DEVICE bool is_kept(float bound, float least) { return least < (float)infinity() && !(bound < least); }

}  // namespace cuda
}  // namespace memokern
