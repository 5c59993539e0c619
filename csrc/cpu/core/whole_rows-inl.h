// Rows of uint8 as integers of 16 bits: the tile of products in pairs (pairs-inl.h), half as long as one of
// floats.
//
// A tile's u = raw + offset (source-inl.h) is v + rest, where v = raw + the whole part of the offset is an
// integer of at most 255, and rest is the same for all rows. Neither is rounded, so that floats made of them
// are those that a tile of floats would hold.
#pragma once
#include "cpu/core/pair_vec-inl.h"
#include "cpu/core/source-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

enum { MOST_WHOLE = 255 };  // |v| is at most this

// The rows of a tile, and what they are made with. There are none of most types.
template <class R>
struct WholeRows {
  static constexpr double largest = 0;
  static int64_t bytes(int64_t, int64_t) { return 0; }
  void take(int64_t, int64_t, Arena&) {}
  void set(const Source<R>&) {}
  const R* floats(int64_t, const uint8_t*, int64_t, int64_t) const { return nullptr; }
};
template <class R>
static bool is_whole(const Source<R>&) {
  return false;
}

#if MK_WHOLE_ROWS
// Whether u is a whole number and a rest of at most a half, where the centre is about among the values that
// the type has, and the processor gains by it.
static bool is_whole(const Source<float>& src) {
  if (src.rows.type != kU8 || src.valued || !has_pairs()) return false;
  bool all = true;
  for (int64_t d = 0; d < src.rows.d; d++)
    all &= src.offset[d] > -MOST_WHOLE - 0.499f && src.offset[d] < 0.499f;
  return all;
}

template <>
struct WholeRows<float> {
  enum { W = Vec<float>::W, NR = 2 * W, SAMPLE = 16 };
  int16_t* v;      // [Dp/NR][NT][NR]; what lies beyond cnt is some integer of that size
  int16_t* shift;  // [Dp] the whole part of the offset
  float* rest;     // [Dp] the offset less that
  float* panel;    // [NT][NR] for floats()
  double largest;  // |value| among those of a few rows

  static int64_t bytes(int64_t Dp, int64_t NT) {
    return Arena::bytes<int16_t>(Dp * NT) + Arena::bytes<int16_t>(Dp) + Arena::bytes<float>(Dp) +
           Arena::bytes<float>(NR * NT);
  }
  void take(int64_t Dp, int64_t NT, Arena& arena) {
    v = arena.take_raw<int16_t>(Dp * NT);
    shift = arena.take<int16_t>(Dp);
    rest = arena.take<float>(Dp);
    panel = arena.take<float>(NR * NT);
  }
  void set(const Source<float>& src) {
    for (int64_t d = 0; d < src.rows.d; d++) {
      shift[d] = (int16_t)(int)(src.offset[d] - 0.5f);  // to the nearest, as it is below a half
      rest[d] = src.offset[d] - (float)shift[d];
    }
    const Rows& rows = src.rows;
    largest = 0;
    for (int64_t i = 0; i < SAMPLE; i++)
      for (int64_t d = 0; d < rows.d; d++) {
        const uint8_t raw = ((const uint8_t*)rows.data)[rows.n * i / SAMPLE * rows.stride + d];
        largest = dmax(largest, __builtin_fabs(raw * rows.scale + rows.shift));
      }
  }
  // Row j of the tile's panel at feature d, as floats.
  void to_floats(int64_t d, int64_t j, int64_t NT, float* to) const {
    const int16_t* from = v + d * NT + j * NR;
    for (int i = 0; i < 2; i++) store(to + i * W, floats_of(wide_of(from + i * W)) + load(rest + d + i * W));
  }
  // A panel of `count` of its rows as floats, [NT][NR], until the next call. Of the others any numbers.
  const float* floats(int64_t d, const uint8_t* rows, int64_t count, int64_t NT) const {
    for (int64_t i = 0; i < count; i++) to_floats(d, rows[i], NT, panel + rows[i] * NR);
    return panel;
  }
};
#endif

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
