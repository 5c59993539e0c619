// project: queries to the coordinates of an index, where these are those of a cosine transform
// (memokern/index/basis.py).
//
// One query after the other, in the caches of one core: x - alpha c; the channels transformed; along each
// column, then, transposed, along each row, only the frequencies that the coordinates kept have; the
// coordinates gathered in their order; norms of the bands in double. Cosines of an even frequency are
// symmetric about the middle, those of an odd one antisymmetric, so that sums and differences of opposite
// values halve the products. The stored cosines are symmetric to 2^-52 only, which is far within what
// Cosine.error() in basis.py grants: that counts n + 1 roundings of a product, where there is one for the
// sum, one for the cosine, and n / 2 here.
#pragma once
#include "cpu/core/convert-inl.h"
#include "cpu/core/memory-inl.h"
#include "cpu/core/watch-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

enum {
  SIDE = kProjectionSide,
  PROJECT_B = 8  // queries of a part
};

// out [F][m] = c [F][n] in [n][m]; m is a multiple of W. fold [n + 1][m] receives the sums of opposite rows,
// then their differences.
static void fold_transform(const float* in, int64_t n, int64_t m, const float* c, int64_t F, float* fold,
                           float* out) {
  enum { W = Vec<float>::W, M = 8 };
  typedef Vec<float>::T V;
  const int64_t half = n / 2, sums = (n + 1) / 2;
  float* differences = fold + sums * m;
  for (int64_t r = 0; r < half; r++)
    for (int64_t i = 0; i < m; i += W) {
      const V a = load(in + r * m + i), b = load(in + (n - 1 - r) * m + i);
      store(fold + r * m + i, a + b);
      store(differences + r * m + i, a - b);
    }
  if (sums > half) memcpy((void*)(fold + half * m), in + half * m, m * sizeof(float));
  for (int odd = 0; odd < 2; odd++) {
    const float* from = odd ? differences : fold;
    const int64_t depth = odd ? half : sums;
    for (int64_t f0 = odd; f0 < F; f0 += 2 * M) {
      const float* row[M];  // beyond the last frequency, that one again
      float* to[M];
      for (int j = 0; j < M; j++) {
        const int64_t f = f0 + 2 * imin(j, (F - 1 - f0) / 2);
        row[j] = c + f * n;
        to[j] = out + f * m;
      }
      for (int64_t i = 0; i < m; i += W) {
        V r[M] = {};
        for (int64_t k = 0; k < depth; k++) {
          const V v = load(from + k * m + i);
#pragma GCC unroll 8
          for (int j = 0; j < M; j++) r[j] += splat<float>(row[j][k]) * v;
        }
#pragma GCC unroll 8
        for (int j = 0; j < M; j++) store(to[j] + i, r[j]);
      }
    }
  }
}

// A norm as float32, rounded up, as `rounded_up` in memokern/index/projection.py does.
MK_INLINE float norm_up(double v) {
  const double up = v * (1 + 2.5 * 0x1p-24) + 0x1p-120;
  return (float)up;
}

struct ProjectWork {
  float *value, *turned, *fold, *box, *swapped, *boxes, *found;
  Arena arena;
  bool reserve(const CosineTransform& t) {
    const int64_t w = round_up(t.width, (int64_t)SIDE), h = round_up(t.height, (int64_t)SIDE),
                  side = imax(w, h);
    const int64_t size = round_up(t.size, (int64_t)SIDE), values = t.d() + SIDE,
                  turns = t.channels * t.height * w;
    if (!arena.reserve(Arena::bytes<float>(values) + Arena::bytes<float>(turns) +
                       3 * Arena::bytes<float>((side + 1) * side) + Arena::bytes<float>(t.numbers) +
                       Arena::bytes<float>(size)))
      return false;
    value = arena.take<float>(values);
    turned = arena.take<float>(turns);
    fold = arena.take<float>((side + 1) * side);
    box = arena.take<float>((side + 1) * side);
    swapped = arena.take<float>((side + 1) * side);
    boxes = arena.take<float>(t.numbers);
    found = arena.take<float>(size);
    return true;
  }
};

// x - alpha c, as channels of pixels, into value. Returns its norm.
static double centred_pixels(const CosineTransform& t, const float* x, float alpha, float* value) {
  enum { WD = Vec<double>::W };
  const float* c = t.center;
  const int64_t D = t.d();
  if (t.channels_last) {
    const int64_t C = t.channels, area = t.height * t.width;
    for (int64_t i = 0; i < area; i++)
      for (int64_t k = 0; k < C; k++) value[k * area + i] = x[i * C + k] - alpha * c[i * C + k];
  } else {
    enum { W = Vec<float>::W };
    int64_t d = 0;
    for (; d + W <= D; d += W) store(value + d, load(x + d) - alpha * load(c + d));
    for (; d < D; d++) value[d] = x[d] - alpha * c[d];
  }
  Vec<double>::T s0 = {}, s1 = {};
  int64_t d = 0;
  for (; d + 2 * WD <= D; d += 2 * WD) {
    const Vec<double>::T a = Convert<double, float>::vec(value + d),
                         b = Convert<double, float>::vec(value + d + WD);
    s0 += a * a;
    s1 += b * b;
  }
  double sum = hsum<double>(s0 + s1);
  for (; d < D; d++) sum += (double)value[d] * value[d];
  return __builtin_sqrt(sum);
}

// The transform along the channels, in rows of whole vectors. What lies beyond a row's end is not a pixel,
// and is never read.
static void turn_channels(const CosineTransform& t, const float* value, float* turned) {
  enum { W = Vec<float>::W };
  typedef Vec<float>::T V;
  const int64_t C = t.channels, wide = round_up(t.width, (int64_t)SIDE), area = t.height * t.width;
  for (int64_t c = 0; c < C; c++) {
    if (t.box[2 * c] == 0) continue;
    const float* turn = t.turn + c * C;
    for (int64_t r = 0; r < t.height; r++) {
      const float* from = value + r * t.width;
      float* to = turned + (c * t.height + r) * wide;
      for (int64_t i = 0; i < t.width; i += W) {
        V v = turn[0] * load(from + i);
        for (int64_t k = 1; k < C; k++) v += turn[k] * load(from + k * area + i);
        store(to + i, v);
      }
    }
  }
}

static void project_one(const CosineTransform& t, const float* x, double alpha, float* z, float* norms,
                        double* margin, double* sq, ProjectWork& w) {
  enum { WD = Vec<double>::W };
  typedef Vec<double>::T D;
  const int64_t H = t.height, wide = round_up(t.width, (int64_t)SIDE);
  const double norm = centred_pixels(t, x, (float)alpha, w.value);
  turn_channels(t, w.value, w.turned);
  float* box = w.boxes;
  for (int64_t c = 0; c < t.channels; c++) {
    const int64_t high = t.box[2 * c], across = t.box[2 * c + 1], tall = round_up(high, (int64_t)SIDE);
    if (high == 0) continue;
    fold_transform(w.turned + c * H * wide, H, wide, t.down, high, w.fold, w.box);
    for (int64_t i = 0; i < t.width; i++) {
      float* to = w.swapped + i * tall;
      for (int64_t r = 0; r < high; r++) to[r] = w.box[r * wide + i];
      for (int64_t r = high; r < tall; r++) to[r] = 0;
    }
    fold_transform(w.swapped, t.width, tall, t.across, across, w.fold, box);
    box += across * tall;
  }
  for (int64_t i = 0; i < t.size; i++) w.found[i] = w.boxes[t.place[i]];
  memcpy((void*)z, w.found, t.kept * sizeof(float));

  // The four bounds: of |xc| from above, of |xc| from below, of the coordinates' error, and the margin.
  double bound[4];
  for (int i = 0; i < 4; i++)
    bound[i] =
        t.bound_weights[i] * norm + t.bound_weights[4 + i] * __builtin_fabs(alpha) + t.bound_weights[8 + i];
  const double high = bound[0], low = dmax(0, bound[1]);
  *margin = high < t.largest ? bound[3] : kInf;  // kInf where the query is NaN too
  *sq = low * low;
  double known = 0;
  for (int64_t b = -1; b < t.bands; b++) {  // the coordinates before the first band, then the bands
    const int64_t from = b < 0 ? 0 : t.edges[b], to = imin(t.edges[b + 1], t.size);
    if (from >= t.size) break;
    D s = {};
    int64_t k = from;
    for (; k + WD <= to; k += WD) {
      const D v = Convert<double, float>::vec(w.found + k);
      s += v * v;
    }
    double sum = hsum<double>(s);
    for (; k < to; k++) sum += (double)w.found[k] * w.found[k];
    known += sum;
    if (b >= 0) norms[b] = norm_up(__builtin_sqrt(sum));
  }
  if (t.size < t.d()) {  // the last band was not computed: it is what the norm leaves
    const double least = dmax(0, __builtin_sqrt(known) - bound[2]), rest = (high - least) * (high + least);
    norms[t.bands - 1] = norm_up(__builtin_sqrt(dmax(0, rest)));
  }
  norms[t.bands] = norm_up(high);
}

static int run_project(const CosineTransform& t, const float* x, const double* alpha, int64_t b,
                       const Projected& out, Watch* watch, int threads) {
  const int64_t D = t.d(), pieces = (b + PROJECT_B - 1) / PROJECT_B;
  return for_parts(threads, pieces, [&](int64_t i, int) {
    ProjectWork w;
    Pace pace = {watch, 0};
    if (!w.reserve(t)) return (int)kNoMemory;
    for (int64_t j = i * PROJECT_B; j < imin(b, (i + 1) * PROJECT_B); j++) {
      if (pace.stopped(8 * D)) return (int)kStopped;
      project_one(t, x + j * D, alpha[j], out.z + j * t.kept, out.norms + j * (t.bands + 1), out.margin + j,
                  out.sq + j, w);
    }
    return (int)kDone;
  });
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
