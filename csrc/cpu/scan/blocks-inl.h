// Blocks of rows that no row of theirs can matter to a query, by the box that holds them.
//
// In the notation of bounds-inl.h, and with the numbers as level 0 has them (w = z / a, and for each band
// v_b = |x_b| / |a|), the bound of a row at level 0 is a sum of squares:
//   s_n <= a^2 / 2 (q - |w - y_n|^2 - sum over b of (v_b - |y_nb|)^2 + e_n),
//   q = |w|^2 + sum over b of v_b^2,  e_n = |y_n|^2 + sum over b of |y_nb|^2 - |yc_n|^2 <= excess.
// The squares are at least the squared distance r^2 of the query from a box that holds (y_n, |y_nb|) for all
// rows of a block; some coordinates of y_n may enter by their norm, as a band does. So no row of a block
// matters with
//   r^2 > q + excess - 2 (best + reach) / a^2,
// where best + reach is what level 0 compares its bounds with.
//
// Rounding, u = 2^-24: w and v are rounded once, which moves the query by at most u |(w, v)|; each of the K
// differences is rounded, and so are the sums of squares: r^2 comes out at most (1 + (K + 6) u) times too
// large. What underflows makes it smaller. reach_of_boxes() grants both.
#pragma once
#include "cpu/scan/bounds-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

enum {
  LOOK_BLOCKS = 8,     // nearest to a query in the leading coordinates, which its first look goes through
  SAMPLE_PANELS = 16,  // that show how many blocks are left to a query
  PANEL_SIZE = 2 * kPanelBlocks
};

// Numbers of a box, and those of them that are coordinates.
static int64_t box_coordinates(int64_t k0) { return imin(k0, kBoxCoordinates); }
static int64_t box_numbers(int64_t k0, int64_t bands) {
  return box_coordinates(k0) + (k0 > kBoxCoordinates) + bands;
}

// The query as boxes take it, w [box]. Returns q.
static double box_query(const ScanCall& s, int64_t b, float* w) {
  const double a = s.q[b].a, alpha = s.q[b].alpha;
  const float *z = s.bound->z + b * s.K, *norms = s.bound->norms + b * (s.bands + 1);
  const int64_t single = box_coordinates(s.k0);
  double q = 0, others = 0;
  int64_t k = 0;
  for (; k < single; k++) {
    w[k] = (float)(z[k] / alpha);
    q += (double)z[k] * z[k];
  }
  for (int64_t i = single; i < s.k0; i++) others += (double)z[i] * z[i];
  if (s.k0 > single) w[k++] = (float)(__builtin_sqrt(others) / a);
  q += others;
  for (int64_t e = 0; e < s.bands; e++) {
    w[k++] = (float)(norms[e] / a);
    q += (double)norms[e] * norms[e];
  }
  return q / (a * a);
}

// A computed r^2 above this is that of a block to skip.
static float reach_of_boxes(const ScanCall& s, int64_t b, double best) {
  const ScanQuery& query = s.q[b];
  if (!query.active) return -1;
  if (query.a < 1e-12) return (float)kInf;  // a^2 may have no digits left
  const double a2 = query.a * query.a, q = s.box_q[b], u = 6e-8;
  const double bound = best + query.reach;
  // 1e-12: of the double arithmetic here.
  const double r2 = q + s.bound->excess - 2 * bound / a2 + 1e-12 * (q + 2 * __builtin_fabs(bound) / a2);
  const double moved = __builtin_sqrt(dmax(0, r2)) + 1.01 * u * __builtin_sqrt(q);
  return (float)(moved * moved * (1 + (s.box + 8) * u) * (1 + u));
}

// r^2 of a query w, whose numbers lie `step` apart, to the boxes of a panel, from `K` numbers of each.
static void box_distances(const float* panel, int64_t K, const float* w, int64_t step, float* r2) {
  enum { W = Vec<float>::W };
  typedef Vec<float>::T F;
  for (int e = 0; e < kPanelBlocks; e += W) {
    F sum = {};
    for (int64_t k = 0; k < K; k++) {
      const F v = splat<float>(w[k * step]), low = load(panel + k * PANEL_SIZE + e),
              high = load(panel + k * PANEL_SIZE + kPanelBlocks + e);
      const F d = vmax(vmax(low - v, v - high), F{});
      sum += d * d;
    }
    store(r2 + e, sum);
  }
}

// r^2 of V vectors of queries w [K], `step` apart, to box e of a panel.
template <int V>
static void distances_of_queries(const float* panel, int64_t e, int64_t K, const float* w, int64_t step,
                                 float* r2) {
  enum { W = Vec<float>::W };
  typedef Vec<float>::T F;
  F sum[V] = {};
  for (int64_t k = 0; k < K; k++) {
    const F low = splat<float>(panel[k * PANEL_SIZE + e]),
            high = splat<float>(panel[k * PANEL_SIZE + kPanelBlocks + e]);
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const F x = load(w + k * step + v * W), d = vmax(vmax(low - x, x - high), F{});
      sum[v] += d * d;
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) store(r2 + v * W, sum[v]);
}

// About the share of the blocks that are left to a query.
static double blocks_left(const ScanCall& s, int64_t b, double best) {
  const float* w = s.w + b * s.box;
  const float reach = reach_of_boxes(s, b, best);
  const int64_t panels = s.panels, step = imax(1, panels / SAMPLE_PANELS);
  int64_t seen = 0, left = 0;
  for (int64_t p = step / 2; p < panels; p += step) {
    float r2[kPanelBlocks];
    box_distances(s.bound->boxes + p * s.box * PANEL_SIZE, s.box, w, 1, r2);
    const int64_t count = imin(kPanelBlocks, s.all_blocks - p * kPanelBlocks);
    for (int64_t e = 0; e < count; e++) left += !(r2[e] > reach);
    seen += count;
  }
  return seen ? (double)left / (double)seen : 1;
}

// Asks for the rows of a block.
MK_INLINE void ask_for_rows(const ScanCall& s, int64_t block) {
  const char *at = (const char*)s.rows_from(block),
             *stop = (const char*)(s.rows_from(block) + s.rows_of_block(block) * s.stride);
  for (; at < stop; at += 64) __builtin_prefetch(at);
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
