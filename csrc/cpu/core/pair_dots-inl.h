// The first product of a sweep in integers, and its error.
//
// A query is rounded to 15 bits, x = unit hi + dx, and the product with a row, <x, u> = unit <hi, v> + <unit
// hi, rest> + <dx, u> by the names of whole_rows-inl.h, is exact but for the last part and a few roundings of
// its sum. hi is rounded up or down by numbers that stand for chance and depend on the feature alone, so that
// dx has nothing to do with the rows: whatever these are, |<dx, u>| is above 2 unit |u| with a probability
// below 2 e^-8 (Hoeffding's inequality), and for roundings of all sizes that is 4.9 standard deviations.
// Where the nearest row must be found it is bounded by |dx| |u|.
//
// Rows that this could matter to are multiplied again with dx, in units of unit / 32000: refined(). Nothing
// is known of a query that a float cannot hold in the units of the rows, and one that is next to nothing is
// all dx.
#pragma once
#include "cpu/core/pairs-inl.h"
#include "cpu/core/query-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

// The queries of a sweep in integers. There are none for most types.
template <class R>
struct PairQueries {
  static int64_t bytes(const Plan&) { return 0; }
  void take(const Plan&, Arena&) {}
  void put(const Source<R>&, const Plan&, const WholeRows<R>&, const R*, int64_t, Query<R>&) {}
  void dots(const Plan&, const Tile<R>&, int64_t, R*, Prefetch&) const {}
  double refined(const Source<R>&, const Plan&, const Tile<R>&, const Query<R>&, int64_t, int64_t) {
    return 0;
  }
};

// Whether the product in integers bounds distances about as well as that of floats does: not where few
// features of a query are large beside the others.
template <class R>
MK_INLINE bool is_sharp_in_pairs(const Query<R>& q) {
  return q.i1 <= 8 * q.e1;
}

#if MK_WHOLE_ROWS
template <>
struct PairQueries<float> {
  typedef Vec<float>::T V;
  enum { W = Vec<float>::W, NR = 2 * W, MOST = 32760, DIGIT = 32000, REFINED_SUM = 2048 };
  int32_t* hi;    // pairs in panels, as query_at() says of floats
  float* unit;    // [Bp]
  float* shared;  // [Bp] <unit hi, rest>
  float* dither;  // [Dp] where a fraction is rounded up: above 1 less this
  int16_t* row;   // [Dp]
  float* scaled;  // [Dp]
  // Of a query that was refined: hi and dx as rows [B][2][Dp], and <x, rest>.
  int16_t* digits;
  double* shared_whole;  // [B]
  bool* has_digits;      // [B]
  bool by_vnni;

  static int64_t bytes(const Plan& pl) {
    return Arena::bytes<int32_t>(pl.Bp * pl.Dp / 2) + 2 * Arena::bytes<float>(pl.Bp) +
           2 * Arena::bytes<float>(pl.Dp) + Arena::bytes<int16_t>(pl.Dp) +
           Arena::bytes<int16_t>(2 * pl.B * pl.Dp) + Arena::bytes<double>(pl.B) + Arena::bytes<bool>(pl.B);
  }
  void take(const Plan& pl, Arena& arena) {
    hi = arena.take_raw<int32_t>(pl.Bp * pl.Dp / 2);
    unit = arena.take<float>(pl.Bp);
    shared = arena.take<float>(pl.Bp);
    dither = arena.take<float>(pl.Dp);
    row = arena.take<int16_t>(pl.Dp);
    scaled = arena.take<float>(pl.Dp);
    digits = arena.take_raw<int16_t>(2 * pl.B * pl.Dp);
    shared_whole = arena.take<double>(pl.B);
    has_digits = arena.take<bool>(pl.B);
    by_vnni = has_vnni();
    for (int64_t d = 0; d < pl.Dp; d++) {  // splitmix64
      uint64_t z = ((uint64_t)d + 1) * 0x9e3779b97f4a7c15;
      z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
      z = (z ^ z >> 27) * 0x94d049bb133111eb;
      dither[d] = (float)((z ^ z >> 31) >> 40) * 0x1p-24f;
    }
  }
  // Where the pairs of query b are: feature d, which is even, at [d / 2 * lanes].
  int32_t* pairs_of(const Plan& pl, int64_t b, int64_t& lanes) const {
    const int64_t b0 = b / NR * NR;
    lanes = imin(NR, pl.Bp - b0);
    return hi + b0 * (pl.Dp / 2) + (b - b0);
  }

  // Takes query b, of which xc [Dp] are the centred features, and adds to q the error of its products: i0 +
  // i1 |yc| in integers, r1 |yc| where they are refined.
  //
  // A part of i1, and i0, are the roundings: a sum of KC features is exact, becomes float, and is multiplied
  // by the unit and added to the others in one rounding or two. No partial sum is above |x| |v|, where |v| <=
  // |u| + |rest|. `shared` goes through as many roundings and at most 20 of its own sums.
  void put(const Source<float>& src, const Plan& pl, const WholeRows<float>& rows, const float* xc, int64_t b,
           Query<float>& q) {
    float* x = scaled;
    for (int64_t d = 0; d < pl.D; d++) x[d] = (float)(xc[d] * src.unit);
    V most = {};
    for (int64_t d = 0; d < pl.Dp; d += W) most = vmax(most, vmax(load(x + d), -load(x + d)));
    float largest = 0;
    for (int i = 0; i < W; i++) largest = most[i] > largest ? most[i] : largest;
    const bool fits = largest < 1e30f, tiny = largest < 1e-30f;
    unit[b] = tiny || !fits ? 0.0f : largest / MOST;
    const float inverse = unit[b] == 0 ? 0.0f : 1 / unit[b];
    double off = 0, with_rest = 0;
    const float *fraction = dither, *rest = rows.rest;  // not read again after each store
    int16_t* whole = row;
    for (int64_t k = 0; k < pl.Dp; k += 8 * NR) {
      V sq = {}, dot = {};
      for (int64_t d = k; d < imin(pl.Dp, k + 8 * NR); d += NR) {
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
          const int64_t at = d + i * W;
          const V f = load(x + at) * inverse, h = floor_of(f + load(fraction + at));
          sq += (f - h) * (f - h);
          dot += h * load(rest + at);
          store_whole(whole + at, h);
        }
      }
      off += hsum<float>(sq);
      with_rest += hsum<float>(dot);
    }
    int64_t lanes;
    int32_t* to = pairs_of(pl, b, lanes);
    for (int64_t d = 0; d < pl.Dp; d += 2) memcpy(to + d / 2 * lanes, whole + d, sizeof *to);
    shared[b] = (float)(with_rest * unit[b]);
    has_digits[b] = false;
    const double u = 1.01 * Precision<float>::u, a = __builtin_fabs(q.a1), size = __builtin_sqrt(q.xx),
                 root = __builtin_sqrt((double)pl.D), scale = __builtin_fabs(src.unit);
    // The fractions are of quotients that are off by up to 0.004.
    const double dx = tiny ? size * scale : unit[b] * (1.001 * __builtin_sqrt(off) + 0.005 * root);
    const double likely = q.mode == kZeroSigma || tiny ? dx : dmin(dx, 2.02 * unit[b]);
    const double sums = (double)(pl.Dp / KC + 8) * u * size;
    q.i0 = a * (sums + 20 * u * size) * 0.5 * root * scale;
    q.i1 = fits ? a * (likely / scale + sums) : kInf;
    q.r1 = fits ? a * ((tiny ? 1 : 2 * u) * size + 0.6 * unit[b] / DIGIT * root / scale) : kInf;
  }

  // p[j][b] = <u_j, x_b> for the first B queries, up to that error.
  void dots(const Plan& pl, const Tile<float>& t, int64_t B, float* p, Prefetch& next) const {
    const auto panel = by_vnni ? &PairQueries::block<Vnni, MR, 2> : &PairQueries::block<Plain, MR, 2>;
    const auto half =
        by_vnni ? &PairQueries::block<Vnni, ROW_UNIT, 1> : &PairQueries::block<Plain, ROW_UNIT, 1>;
    const int64_t groups = (t.cnt + MR - 1) / MR;
    const int64_t ahead = next.lines_per_step(2 * (pl.Dp / NR) * ((B + NR - 1) / NR) * groups);
    for (int64_t k = 0; k < pl.Dp; k += KC)
      for (int64_t b = 0; b < B; b += NR) {
        const int64_t lanes = imin(NR, pl.Bp - b), K = imin(KC, pl.Dp - k) / 2;
        const int32_t* xb = hi + (b * pl.Dp + k * lanes) / 2;
        const int32_t* y = (const int32_t*)(t.whole.v + k * pl.NT);
        if (lanes == NR)
          for (int64_t j = 0; j < t.cnt; j += MR)
            (this->*panel)(y + j * W, pl.NT * W, xb, K, k > 0, b, p + j * pl.Ps + b, pl.Ps, next, ahead);
        else
          for (int64_t j = 0; j < t.cnt; j += ROW_UNIT)
            (this->*half)(y + j * W, pl.NT * W, xb, K, k > 0, b, p + j * pl.Ps + b, pl.Ps, next, 2 * ahead);
      }
  }

  // <u_j, x_b> for row j of the tile and query q, which is the b-th: of the errors in put() only the half of
  // a unit of dx is left.
  double refined(const Source<float>& src, const Plan& pl, const Tile<float>& t, const Query<float>& q,
                 int64_t b, int64_t j) {
    if (!has_digits[b]) make_digits(src, pl, t.whole, q, b);
    const uint8_t* raw = (const uint8_t*)src.rows.data + (t.n0 + j) * src.rows.stride;
    const int16_t* digit = digits + 2 * b * pl.Dp;
    int64_t total[2] = {};
    for (int64_t d = 0; d < pl.D;) {
      const int64_t end = imin(pl.D, d + REFINED_SUM);
      Pairs sum[2] = {};
      const auto add = [&](const uint8_t* from) {
        const Shorts v = shorts_of(from) + load(t.whole.shift + d);
        Plain::add((Pairs)v, (Pairs)load(digit + d), (Pairs)load(digit + pl.Dp + d), sum[0], sum[1]);
      };
      for (; d + NR <= end; d += NR) add(raw + d);
      if (d < end) {
        uint8_t tail[NR] = {};
        memcpy(tail, raw + d, end - d);
        add(tail);
        d = end;
      }
      for (int i = 0; i < 2; i++)
        for (int e = 0; e < W; e++) total[i] += sum[i][e];
    }
    const double one = unit[b];
    return one * ((double)total[0] + (double)total[1] / DIGIT) + shared_whole[b];
  }

 private:
  template <class S, int M, int V>
  __attribute__((noinline)) void block(const int32_t* y, int64_t y_next, const int32_t* x, int64_t K,
                                       bool add, int64_t b, float* p, int64_t p_j, Prefetch& next,
                                       int64_t ahead) const {
    Pairs sum[M][V];
    pairs_kernel<S, M, V, W>(y, 1, W, y_next, x, K, sum, next, ahead);
#pragma GCC unroll 24
    for (int i = 0; i < M; i++)
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) {
        float* to = p + i * p_j + v * W;
        store(to,
              (add ? load(to) : load(shared + b + v * W)) + floats_of(sum[i][v]) * load(unit + b + v * W));
      }
  }
  void make_digits(const Source<float>& src, const Plan& pl, const WholeRows<float>& rows,
                   const Query<float>& q, int64_t b) {
    int64_t lanes;
    const int32_t* from = pairs_of(pl, b, lanes);
    int16_t *high = digits + 2 * b * pl.Dp, *low = high + pl.Dp;
    const double one = unit[b], per = one == 0 ? 0 : DIGIT / one;
    double with_rest = 0;
    for (int64_t d = 0; d < pl.Dp; d += 2) memcpy(high + d, from + d / 2 * lanes, sizeof *from);
    memset((void*)(low + pl.D), 0, (pl.Dp - pl.D) * sizeof *low);
    for (int64_t d = 0; d < pl.D; d++) {
      const double v = ((double)q.x[d] - q.alpha * src.center[d]) * src.unit, dx = (v - one * high[d]) * per;
      low[d] = (int16_t)(int)__builtin_floor(dx + 0.5);
    }
    for (int64_t d = 0; d < pl.D; d++)
      with_rest += ((double)q.x[d] - q.alpha * src.center[d]) * src.unit * rows.rest[d];
    shared_whole[b] = with_rest;
    has_digits[b] = true;
  }
};
#endif

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
