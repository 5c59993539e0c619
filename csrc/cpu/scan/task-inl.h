// A task of a scan: a block of queries and a range of rows, with the work space for a chunk of these rows.
#pragma once
#include "cpu/core/packed-inl.h"
#include "cpu/scan/blocks-inl.h"
#include "cpu/scan/full_level-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

// Queries side by side, one in each lane.
struct Lanes {
  enum { W = Vec<float>::W, NR = 2 * W };
  int64_t B, Bp;   // how many; padded to whole vectors, but for one alone
  float* x0;       // the queries at level 0, packed as at() says
  float *a2, *s2;  // [Bp] alpha^2 and sigma^2
  float* least;    // [Bp] below which a bound is that of a row to drop
  float* best;     // [Bp] the largest guess in the rows bounded last,
  int32_t* where;  // [Bp] and the block of rows that it came from

  // Where feature k of query i lies in packed queries of K features: in panels of NR queries, the last of W
  // if that holds the rest.
  float* at(float* x, int64_t K, int64_t i, int64_t k) const {
    const int64_t i0 = i / NR * NR, n = imin(NR, Bp - i0);
    return x + i0 * K + k * n + (i - i0);
  }
};

// The lanes of queries that list rows: none without a query, or of one given up, which would list a NaN.
static uint64_t live_lanes(const Lanes& q) {
  uint64_t live = 0;
  for (int64_t i = 0; i < q.B; i++) live |= (uint64_t)(q.least[i] < (float)kInf) << i;
  return live;
}
// The lanes whose bounds p [Bp] of a row leave it.
MK_INLINE uint64_t lanes_of_row(const Lanes& q, const float* p) {
  enum { W = Lanes::W };
  uint64_t lanes = 0;
  for (int64_t i = 0; i < q.Bp; i += W)
    lanes |= (uint64_t)(~lanes_of(load(p + i) < load(q.least + i)) & ((1 << W) - 1)) << i;
  return lanes;
}

// A row of a chunk, and the lanes of the queries to which it is left.
struct RowLeft {
  int64_t j;
  uint64_t lanes;
};

struct ScanTask : Lanes {
  // LAST_ROWS: of a block that is filled up, a register's or for a query alone a vector's, which is larger
  // where AVX2 is compiled in AVX-512's width.
  enum { LAST_ROWS = (int)ROW_UNIT > (int)W ? (int)ROW_UNIT : (int)W };
  const ScanCall* s;
  const int64_t* order;  // [B] its queries
  float* x_one;          // [2][round_up(K, W)] one alone, as scan_rows takes it
  float* z;              // [Bp][k0 + bands] the same numbers, one query after the other
  float* x_look;         // the same at the first look
  float** x_packed;      // [levels] and at further levels, for whole chunks of rows
  float** x_rows;        // [levels] and for single rows; null until they are needed
  float* further;        // the memory for these,
  float* unused;         // and what is left of it
  uint64_t* lanes;       // [NT] the lanes to which each row of a chunk is left, but for a query alone
  RowLeft* left;         // [NT] the rows of a chunk that are left to some
  float* p;              // [NT][Bp] the bounds of a chunk
  float* y;              // a tile of a further level
  float *h, *bias;       // [NT] -|yc|^2 / 2 and the bias of a chunk's rows
  float* top;            // [Bp] the largest guess so far
  float* highest;        // [Bp] the highest bound behind all levels of a row that was evaluated
  float* last_rows;      // [LAST_ROWS][stride] and a vector more: the last block of rows, filled up
  Lanes some;            // those of the queries to which a block is left
  float* w;              // [box][Bp] the queries as boxes take them
  float* reach;          // [Bp] reach_of_boxes()
  List* lists;           // [b] of its part of the rows
  Arena arena;
  Pace pace;
  int failed;

  // Numbers that a further level adds up for a row: coordinates, bands that they replace, and at level 1 the
  // error. They are padded to panels.
  static int64_t numbers(const ScanCall& s, int64_t level) {
    const LogitBounds& in = *s.bound;
    const int64_t coordinates = in.dims[level] - in.dims[level - 1];
    return coordinates + in.first_band[level] - in.first_band[level - 1] + (level == 1);
  }
  static int64_t depth(const ScanCall& s, int64_t level) { return round_up(numbers(s, level), (int64_t)NR); }
  bool reserve(const ScanCall& call) {
    s = &call;
    failed = kDone;
    pace = {s->in->watch, 0};
    int64_t deepest = 0, all = 0;
    for (int64_t l = 1; l <= s->last_level; l++) {
      deepest = imax(deepest, depth(*s, l));
      all += depth(*s, l);
    }
    const int64_t L = s->lanes, K0 = s->k0 + s->bands, NT = imax(s->NT, kBlockRows);
    const int64_t blocks = s->in_blocks ? L : 0, box = s->in_blocks ? s->box : 0;
    if (!arena.reserve(Arena::bytes<float>(s->stride * L) + Arena::bytes<float>(2 * s->stride + 2 * W) +
                       Arena::bytes<float>(K0 * L) + Arena::bytes<float>(LOOK_COORDINATES * L) +
                       2 * Arena::bytes<float>(all * L) + Arena::bytes<float>(NT * L) +
                       Arena::bytes<float>(SCAN_TILE_ROWS * deepest) + 2 * Arena::bytes<float>(NT) +
                       7 * Arena::bytes<float>(L) + Arena::bytes<float>(LAST_ROWS * s->stride + W) +
                       Arena::bytes<int32_t>(L) + 2 * Arena::bytes<float*>(s->last_level + 1) +
                       Arena::bytes<RowLeft>(NT) + Arena::bytes<uint64_t>(NT + LAST_ROWS) +
                       Arena::bytes<float>(s->stride * blocks) + Arena::bytes<float>(box * blocks) +
                       5 * Arena::bytes<float>(blocks) + Arena::bytes<int32_t>(blocks)))
      return false;
    x0 = arena.take<float>(s->stride * L);
    x_one = arena.take_raw<float>(2 * s->stride + 2 * W);
    x_look = arena.take<float>(LOOK_COORDINATES * L);
    further = arena.take_raw<float>(2 * all * L);  // queries_of_level fills it
    z = arena.take<float>(K0 * L);
    p = arena.take_raw<float>(NT * L);  // which level 0 writes, as it does h and bias
    y = arena.take<float>(SCAN_TILE_ROWS * deepest);
    h = arena.take_raw<float>(NT);
    bias = arena.take_raw<float>(NT);
    a2 = arena.take<float>(L);
    s2 = arena.take<float>(L);
    least = arena.take<float>(L);
    best = arena.take<float>(L);
    top = arena.take<float>(L);
    highest = arena.take<float>(L);
    last_rows = arena.take<float>(LAST_ROWS * s->stride + W);
    where = arena.take<int32_t>(L);
    x_packed = arena.take<float*>(s->last_level + 1);
    x_rows = arena.take<float*>(s->last_level + 1);
    left = arena.take_raw<RowLeft>(NT);
    lanes = arena.take_raw<uint64_t>(NT + LAST_ROWS);
    some.x0 = arena.take<float>(s->stride * blocks);
    w = arena.take<float>(box * blocks);
    some.a2 = arena.take<float>(blocks);
    some.s2 = arena.take<float>(blocks);
    some.least = arena.take<float>(blocks);
    some.best = arena.take<float>(blocks);
    reach = arena.take<float>(blocks);
    some.where = arena.take<int32_t>(blocks);
    return true;
  }
  // Takes a block of queries; lists [b] are those of its part of the rows.
  __attribute__((noinline)) void load_block(int64_t block, List* to) {
    order = s->order + s->begin[block];
    B = s->begin[block + 1] - s->begin[block];
    Bp = B == 1 ? 1 : round_up(B, (int64_t)W);
    lists = to;
    const int64_t K0 = s->k0 + s->bands;
    memset((void*)x0, 0, s->stride * s->lanes * sizeof(float));
    for (int64_t i = 0; i < Bp; i++) {
      const int64_t b = i < B ? order[i] : 0;
      const ScanQuery& q = s->q[b];
      const bool active = i < B && q.active;
      a2[i] = active ? (float)(q.a * q.a) : 0;
      s2[i] = active ? (float)q.s2 : 1;
      least[i] = active ? q.least(to[b].best) : (float)kInf;
      top[i] = highest[i] = (float)-kInf;
      if (!active) continue;
      const float* norms = s->bound->norms + b * (s->bands + 1);
      for (int64_t k = 0; k < s->k0; k++)
        *at(x0, K0, i, k) = z[i * K0 + k] = (float)q.alpha * s->bound->z[b * s->K + k];
      for (int64_t k = 0; k < s->bands; k++)
        *at(x0, K0, i, s->k0 + k) = z[i * K0 + s->k0 + k] = (float)q.a * norms[k];
      if (!s->in_blocks) continue;
      for (int64_t k = 0; k < s->box; k++) w[k * Bp + i] = s->w[b * s->box + k];
      reach[i] = reach_of_boxes(*s, b, to[b].best);
    }
    for (int64_t l = 0; l <= s->last_level; l++) x_packed[l] = x_rows[l] = nullptr;
    unused = further;
  }
  // Bounds from the first K columns of cnt rows of the index, of which k0 count fully in a guess. Each row's
  // bounds come p_row after those of the row before.
  __attribute__((noinline)) void bound_rows(const Lanes& q, const float* coarse, int64_t cnt, const float* x,
                                            int64_t k0, int64_t K, int64_t p_row) {
    if (q.Bp == 1) return bound_rows_of_one(q, coarse, cnt, x, k0, K, p_row);
    const int64_t row = s->stride, Bp = q.Bp;
    const float *a2 = q.a2, *s2 = q.s2;
    float* best = q.best;
    int32_t* where = q.where;
    for (int64_t i = 0; i < Bp; i++) best[i] = (float)-kInf;
    for (int64_t j = 0; j < cnt; j += ROW_UNIT) {
      const float* rows = coarse + j * row;
      if (j + ROW_UNIT > cnt) {  // the last block of rows, filled up with copies
        for (int64_t i = 0; i < ROW_UNIT; i++) {
          const int64_t from = imin(j + i, cnt - 1);
          memcpy((void*)(last_rows + i * row), coarse + from * row, row * sizeof(float));
          h[j + i] = h[from];
          bias[j + i] = bias[from];
        }
        rows = last_rows;
      }
      // The processor's own prefetcher does not follow as many rows as are read side by side.
      const char *next = (const char*)(coarse + (j + ROW_UNIT) * row),
                 *stop = (const char*)(coarse + imin(j + 2 * ROW_UNIT, cnt) * row);
      for (; next < stop; next += 64) __builtin_prefetch(next);
      const float* b = s->no_bias ? nullptr : bias + j;
      for (int64_t i = 0; i < Bp; i += NR) {
        const float* xi = x + i * K;
        float* to = p + j * p_row + i;
        if (Bp - i >= NR) {
          scan_block<MR, 2>(rows, row, k0, K, xi, h + j, b, a2 + i, s2 + i, to, Bp, best + i, where + i,
                            (int32_t)j);
          scan_block<MR, 2>(rows + MR * row, row, k0, K, xi, h + j + MR, b ? b + MR : b, a2 + i, s2 + i,
                            to + MR * Bp, Bp, best + i, where + i, (int32_t)j + MR);
        } else {
          scan_block<ROW_UNIT, 1>(rows, row, k0, K, xi, h + j, b, a2 + i, s2 + i, to, Bp, best + i, where + i,
                                  (int32_t)j);
        }
      }
      for (int64_t i = 0; p_row && i < ROW_UNIT; i++) lanes[j + i] = lanes_of_row(q, p + (j + i) * p_row);
    }
  }

 private:
  // The same for one query, W rows at a time; `where` is the row of the largest guess itself.
  void bound_rows_of_one(const Lanes& q, const float* coarse, int64_t cnt, const float* x, int64_t k0,
                         int64_t K, int64_t p_row) {
    typedef Vec<float>::T F;
    typedef Vec<float>::I I;
    const int64_t row = s->stride, padded = round_up(K, (int64_t)W);
    memset((void*)x_one, 0, 2 * padded * sizeof(float));
    memcpy((void*)x_one, x, k0 * sizeof(float));
    memcpy((void*)(x_one + padded + k0), x + k0, (K - k0) * sizeof(float));
    F largest = splat<float>((float)-kInf), guess;
    I at = {};
    for (int64_t j = 0; j < cnt; j += W) {
      const float* rows = coarse + j * row;
      const int64_t n = imin(W, cnt - j);
      F base = {};
      // The last rows, filled up with copies: their vectors may reach beyond the end.
      if ((j + W - 1) * row + padded > cnt * row) {
        for (int64_t i = 0; i < W; i++) {
          const int64_t from = imin(j + i, cnt - 1);
          memcpy((void*)(last_rows + i * row), coarse + from * row, row * sizeof(float));
          base[i] = h[from] * q.a2[0] + (s->no_bias ? 0 : bias[from] * q.s2[0]);
        }
        rows = last_rows;
      } else {
        base = load(h + j) * q.a2[0];
        if (!s->no_bias) base += load(bias + j) * q.s2[0];
      }
      const char *next = (const char*)(coarse + (j + W) * row),
                 *stop = (const char*)(coarse + imin(j + 2 * W, cnt) * row);
      for (; next < stop; next += 64) __builtin_prefetch(next);
      const F bounds = scan_rows(rows, row, k0, K, x_one, base, guess);
      if (p_row && n == W)
        store(p + j, bounds);
      else if (p_row)
        for (int64_t i = 0; i < n; i++) p[j + i] = bounds[i];
      const I more = guess > largest;
      largest = vmax(guess, largest);
      at = (at & ~more) | (((int32_t)j - (I){}) & more);
    }
    q.best[0] = (float)-kInf;
    for (int i = 0; i < W; i++)
      if (largest[i] > q.best[0]) {
        q.best[0] = largest[i];
        q.where[0] = (int32_t)imin(at[i] + i, cnt - 1);
      }
  }
};

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
