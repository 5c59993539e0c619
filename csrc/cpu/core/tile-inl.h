// The blocking of a sweep: which shapes it works with, its tile of rows, and the reading ahead of the next
// tile.
//
// P [NT][Ps] stands for the products of a tile's rows with the queries, later for their logits and weights;
// ACC for the accumulators. csrc/README.md draws the picture.
#pragma once
#include "cpu/core/whole_rows-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

// 24 of the 32 registers of AVX-512 hold sums, else 12 of 16. Its width without it, which tests have, has the
// same blocks.
#if MEMOKERN_VBYTES == 64
#define MK_MR 12
#else
#define MK_MR 6
#endif

enum {
  MR = MK_MR,               // rows or queries of a register block of MR x 2 vectors; 2 MR x 1 in half a panel
  KC = MR > 6 ? 128 : 256,  // features of a block of the packed product: a panel of queries stays in L1
  DIRECT_B = 6,             // up to so many queries read the rows directly (direct-inl.h)
  DIRECT_D = 512,           // features of a block of the direct product: its queries stay in L1
  DIRECT_SUM = 2048,        // features that the direct product adds up in one register
  DIRECT_UNIT = 12,         // the rows of a tile are a multiple of it where products are direct,
  ROW_UNIT = 2 * MR,        // and of this where a tile is packed,
  NT_GROUPED = 252 / ROW_UNIT * ROW_UNIT,    // about 250 at most where queries pass a tile in groups,
  NT_UNGROUPED = 132 / ROW_UNIT * ROW_UNIT,  // and else 130, so that the logits of all queries stay in L1, L2
  BLOCK_B = 256,                             // queries of a sweep, at most
  PAIRS_ROWS = 512,                          // of fewer, integers save less than their queries take
  MAX_BLOCKS = (BLOCK_B + MR - 1) / MR
};

// The shapes that one sweep works with.
struct Plan {
  int64_t B, Bp;  // queries of a block; padded to whole vectors
  int64_t D, Dp;  // features; padded to whole panels of two vectors
  int64_t NT;     // rows of a tile
  int64_t Ps;     // stride of P: an odd number of cache lines, so that a column fits in L1
  int64_t depth;  // the most additions that one term of a product goes through
  int64_t group;  // queries that pass a tile together, from products to sums: a column of P each
  bool direct;    // few queries: the products read the rows as they are stored
  bool pairs;     // a tile may hold integers, and its first product be one of these (pair_dots-inl.h)
};

// Each tile loads and stores all accumulators once. Where these are many a packed tile is therefore high,
// though that takes it from L2 to L3 (it is read in order). Unpacked rows are read twice, and stay in L2.
// `grouped` allows few queries at a time to pass a tile of few features, which stays in L1 or L2, so that
// their part of P stays in L1; `integers` allows products of integers.
template <class R>
static Plan make_plan(int64_t B, const Source<R>& src, bool grouped = false, bool integers = false) {
  enum { W = Vec<R>::W, NR = 2 * W };
  const Rows& rows = src.rows;
  Plan pl;
  const int64_t blocks = (B + BLOCK_B - 1) / BLOCK_B;
  pl.direct = B <= DIRECT_B && !src.valued;  // which packing alone knows
  pl.B = blocks == 1 ? B : round_up((B + blocks - 1) / blocks, W);
  pl.Bp = round_up(pl.B, W);
  pl.D = rows.d;
  pl.Dp = round_up(pl.D, NR);
  pl.group = grouped && !pl.direct && pl.Dp <= KC ? imin(pl.B, (int64_t)NR) : pl.B;
  pl.Ps = (round_up(round_up(pl.group, W) * (int64_t)sizeof(R), 64) / 64 | 1) * 64 / (int64_t)sizeof(R);
  pl.depth = pl.direct ? imin(pl.Dp, (int64_t)DIRECT_SUM) / W + pl.Dp / DIRECT_SUM + W
                       : imin(pl.Dp, (int64_t)KC) + pl.Dp / KC + 1;
  pl.pairs = integers && !pl.direct && pl.Dp > KC && rows.n >= PAIRS_ROWS && is_whole(src);
  const int64_t budget =
      pl.direct ? (128 << 10) / size_of(rows.type) : (pl.B <= 16 ? 384 << 10 : 1 << 20) / (int64_t)sizeof(R);
  const int64_t unit = pl.direct ? DIRECT_UNIT : ROW_UNIT;
  pl.NT = imin(imax(budget / pl.Dp / unit * unit, unit), pl.group < pl.B ? NT_GROUPED : NT_UNGROUPED);
  pl.NT = imin(pl.NT, round_up(rows.n, unit));
  return pl;
}

template <class R>
struct Tile {
  int64_t n0, cnt;       // rows n0 .. n0 + cnt
  R* y;                  // [Dp/NR][NT][NR]; what lies beyond cnt is not used
  WholeRows<R> whole;    // the same as integers, of which a tile consists
  bool in_pairs;         // where its first product is one of integers
  R* sq;                 // [NT] |yc|^2
  double sq_max, y_max;  // the largest |yc|^2, and |yc|
  bool lost;             // a row is NaN, and so is its sq
  void set_norm(int64_t j, double v) {
    sq[j] = (R)v;
    lost |= v != v;
    sq_max = dmax(sq_max, v);
  }
};

// The next rows, which the processor is asked to fetch while it works on a tile: without it memory and
// arithmetic take turns. Lines are asked for a few at a time, and none is left out, because bursts and gaps
// throw the processor's own prefetcher off.
struct Prefetch {
  enum { LINE = 64 };
  const char *at, *row_end;
  int64_t rows, row_bytes, stride_bytes;
  void lines(int64_t n) __attribute__((always_inline)) {
    for (; n > 0 && rows > 0; n--) {
      __builtin_prefetch(at, 0, 2);
      at += LINE;
      if (at < row_end) continue;
      rows--;
      at = row_end + (stride_bytes - row_bytes);
      row_end += stride_bytes;
    }
  }
  int64_t lines_per_step(int64_t steps) const {  // so that all rows are asked for in so many steps
    steps = steps > 0 ? steps : 1;
    return (rows * ((row_bytes + LINE - 1) / LINE) + steps - 1) / steps;
  }
};
template <class R>
static Prefetch prefetch_of(const Source<R>& src, int64_t n0, int64_t cnt) {
  const int64_t size = size_of(src.rows.type), row = src.rows.d * size, stride = src.rows.stride * size;
  const char* at = (const char*)src.rows.data + n0 * stride;
  const Prefetch a = {at, at + row, cnt, row, stride};
  return a;
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
