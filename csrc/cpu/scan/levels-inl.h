// The levels of the index: bounds of many rows at a time at level 0, of one row at a time or of a tile at the
// others.
#pragma once
#include "cpu/scan/bounds-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

// The sign of each lane of a comparison, as bits.
#if MEMOKERN_VBYTES == 32 && defined(__AVX2__)
MK_INLINE int lanes_of(Vec<float>::I m) { return _mm256_movemask_ps((__m256)m); }
#elif MEMOKERN_VBYTES == 64 && defined(__AVX512DQ__)
MK_INLINE int lanes_of(Vec<float>::I m) { return _mm512_movepi32_mask((__m512i)m); }
#else
MK_INLINE int lanes_of(Vec<float>::I m) {
  enum { W = Vec<float>::W };
  int bits = 0;
  for (int i = 0; i < W; i++) bits |= (m[i] & 1) << i;
  return bits;
}
#endif

// Level 0 of M rows against V vectors of queries: the bounds p = a2 h + s2 b + <y, x> with h = -|yc|^2 / 2,
// a2 = alpha^2 and s2 = sigma^2; `best` keeps the largest guess of each lane, `where` the block of rows j
// that it came from. The first k0 of the K coordinates count fully in a guess, the others are bands.
template <int M, int V>
static void scan_block(const float* y, int64_t stride, int64_t k0, int64_t K, const float* x, const float* h,
                       const float* bias, const float* a2, const float* s2, float* p, int64_t ps, float* best,
                       int32_t* where, int32_t j) {
  enum { W = Vec<float>::W };
  typedef Vec<float>::T F;
  typedef Vec<float>::I I;
  F r[M][V];
  float guess[M][V][W];
#pragma GCC unroll 24
  for (int i = 0; i < M; i++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      r[i][v] = splat<float>(h[i]) * load(a2 + v * W);
      if (bias) r[i][v] += splat<float>(bias[i]) * load(s2 + v * W);
    }
  int64_t k = 0;
  for (; k < k0; k++, x += V * W)
#pragma GCC unroll 24
    for (int i = 0; i < M; i++)
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) r[i][v] += splat<float>(y[i * stride + k]) * load(x + v * W);
#pragma GCC unroll 24
  for (int i = 0; i < M; i++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) store(guess[i][v], r[i][v]);
  for (; k < K; k++, x += V * W)
#pragma GCC unroll 24
    for (int i = 0; i < M; i++)
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) r[i][v] += splat<float>(y[i * stride + k]) * load(x + v * W);
#pragma GCC unroll 2
  for (int v = 0; v < V; v++) {
    F top = splat<float>((float)-kInf);
#pragma GCC unroll 24
    for (int i = 0; i < M; i++) {
      store(p + i * ps + v * W, r[i][v]);
      top = vmax(load(guess[i][v]) * (1 - kBandsInGuess) + r[i][v] * kBandsInGuess, top);
    }
    const F old = load(best + v * W);
    const I more = top > old, at = *(const I*)(where + v * W);
    store(best + v * W, vmax(top, old));
    *(I*)(where + v * W) = (at & ~more) | ((j - (I){}) & more);
  }
}

// sum[i] is that of the lanes of v[i], for four vectors.
MK_INLINE void sums_of_four(const Vec<float>::T* v, float* sum) {
#if defined(__AVX2__)
  __m256 part[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
#if MEMOKERN_VBYTES == 64
    part[i] = _mm256_add_ps(((const __m256*)(v + i))[0], ((const __m256*)(v + i))[1]);
#else
    part[i] = v[i];
#endif
  }
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(part[0], part[1]), _mm256_hadd_ps(part[2], part[3]));
  _mm_storeu_ps(sum, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
  enum { W = Vec<float>::W };
  for (int i = 0; i < 4; i++) {
    float part[W];
    store(part, v[i]);
#pragma GCC unroll 4
    for (int h = W / 2; h > 0; h /= 2)
#pragma GCC unroll 8
      for (int e = 0; e < h; e++) part[e] += part[e + h];
    sum[i] = part[0];
  }
#endif
}
// Lane i of the result is the sum of the lanes of v[i], for W vectors.
MK_INLINE Vec<float>::T lane_sums(const Vec<float>::T* v) {
  enum { W = Vec<float>::W };
  float sum[W];
#pragma GCC unroll 4
  for (int i = 0; i < W; i += 4) sums_of_four(v + i, sum + i);
  return load(sum);
}

// Level 0 of W rows against one query, which scan_block would compute for as many queries as a vector has
// lanes: here the lanes are coordinates of a row, then rows. x [2][round_up(K, W)] has the k0 coordinates
// that count fully and zeros, then the bands behind as many zeros. What lies in a row's vector beyond K is
// cut off. Returns the bounds; `guess` receives the guesses.
MK_INLINE Vec<float>::T scan_rows(const float* y, int64_t stride, int64_t k0, int64_t K, const float* x,
                                  Vec<float>::T base, Vec<float>::T& guess) {
  enum { W = Vec<float>::W };
  typedef Vec<float>::T F;
  typedef Vec<float>::I I;
  const int64_t padded = round_up(K, (int64_t)W), last = padded - W, first_band = k0 / W * W;
  I used;
#pragma GCC unroll 16
  for (int e = 0; e < W; e++) used[e] = last + e < K ? -1 : 0;
  F full[W], bands[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) {
    const float* row = y + i * stride;
    const F tail = (F)((I)load(row + last) & used);
    full[i] = last < k0 ? tail * load(x + last) : F{};
    bands[i] = tail * load(x + padded + last);
    for (int64_t k = 0; k < k0 && k < last; k += W) full[i] += load(row + k) * load(x + k);
    for (int64_t k = first_band; k < last; k += W) bands[i] += load(row + k) * load(x + padded + k);
  }
  const F known = base + lane_sums(full);
  if (k0 == K) return guess = known;
  const F rest = lane_sums(bands);
  guess = known + kBandsInGuess * rest;
  return known + rest;
}

// <p, x> over `count` stored coordinates: what a level adds to a product.
template <class S>
static float segment(const S* p, const float* x, int64_t count) {
  enum { W = Vec<float>::W };
  typedef Vec<float>::T F;
  F s0 = {}, s1 = {}, s2 = {}, s3 = {};
  int64_t k = 0;
  for (; k + 4 * W <= count; k += 4 * W) {
    s0 += Convert<float, S>::vec(p + k) * load(x + k);
    s1 += Convert<float, S>::vec(p + k + W) * load(x + k + W);
    s2 += Convert<float, S>::vec(p + k + 2 * W) * load(x + k + 2 * W);
    s3 += Convert<float, S>::vec(p + k + 3 * W) * load(x + k + 3 * W);
  }
  for (; k + W <= count; k += W) s0 += Convert<float, S>::vec(p + k) * load(x + k);
  s0 = (s0 + s1) + (s2 + s3);
  float sum = 0, tail[W];
  if (k < count) {
    S raw[W];
    memset((void*)raw, 0, sizeof raw);
    memcpy((void*)raw, p + k, (count - k) * sizeof(S));
    store(tail, Convert<float, S>::vec(raw));
    for (int i = 0; i < count - k; i++) sum += tail[i] * x[k + i];
  }
  float part[W];
  store(part, s0);
#pragma GCC unroll 4
  for (int h = W / 2; h > 0; h /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < h; i++) part[i] += part[i + h];
  return sum + part[0];
}

// Asks for a row's piece of the index ahead of time: the pieces lie too far apart for the processor's own
// prefetcher. (Inlined, as all functions that only ask must be: GCC leaves out calls of those.)
template <class S>
MK_INLINE void ask_for_piece(const ScanCall& s, int64_t level, int64_t n) {
  const int64_t k1 = s.bound->dims[level - 1] - s.k0, k2 = s.bound->dims[level] - s.k0;
  const S* z = (const S*)s.bound->fine + n * (s.K - s.k0);
  const char *at = (const char*)(z + k1), *stop = (const char*)(z + k2);
  for (; at < stop; at += 64) __builtin_prefetch(at);
  __builtin_prefetch(s.bound->coarse + n * s.stride + s.k0 + s.bound->first_band[level - 1]);
}

// Takes the rows of query b's list through all levels that they have not passed, row by row. A level adds the
// product of the coordinates that are new, and takes off a |x_b||y_b| for the bands that these replace. At
// level 1 the error of the stored coordinates comes in, and stays. x [K - k0] is work space.
template <class S>
static void pass_levels_typed(const ScanCall& s, int64_t b, List& l, float* x) {
  const LogitBounds& in = *s.bound;
  const ScanQuery& q = s.q[b];
  const int64_t fine = s.K - s.k0;
  const float* norms = in.norms + b * (s.bands + 1);
  for (int64_t k = 0; k < fine; k++) x[k] = (float)q.alpha * in.z[b * s.K + s.k0 + k];
  enum { AHEAD = 12 };  // entries whose numbers are asked for before they are needed
  // The only row that is left may be left to its part only.
  const int64_t alone = s.parts > 1 ? 0 : 1;
  float least = q.least(l.best);
  for (int64_t level = 1; level <= s.last_level && l.count > alone && l.done < l.count; level++) {
    const int64_t k1 = in.dims[level - 1] - s.k0, k2 = in.dims[level] - s.k0;
    const int64_t b1 = in.first_band[level - 1], b2 = in.first_band[level];
    const float stored = level == 1 ? (float)q.a * norms[s.bands] : 0;
    l.work += (l.count - l.done) * (128 + k2 - k1) / 6.0;
    int64_t kept = l.done, promising = -1;
    float top = (float)-kInf;
    for (int64_t i = l.done; i < l.count; i++) {
      Entry e = l.e[i];
      if (i + AHEAD < l.count) ask_for_piece<S>(s, level, l.e[i + AHEAD].n);
      if (e.up < least) continue;
      const float* y = in.coarse + e.n * s.stride + s.k0;
      const float sum = segment((const S*)in.fine + e.n * fine + k1, x + k1, k2 - k1);
      float bands = stored * y[s.bands];
      for (int64_t k = b1; k < b2; k++) bands -= (float)q.a * norms[k] * y[k];
      e.up += sum + bands;
      if (e.up < least) continue;
      if (e.up > top) {
        top = e.up;
        promising = e.n;
      }
      l.e[kept++] = e;
    }
    l.count = kept;
    l.level = (int)imax(l.level, level + 1);
    // The most promising row, evaluated exactly, makes others drop out.
    if (kept > WORTH_EVALUATING && promising >= 0) {
      s.consider(b, promising, l);
      least = q.least(l.best);
    }
  }
  l.filter(least);
}
static void pass_levels(const ScanCall& s, int64_t b, List& l, float* x) {
  (s.bound->fine_is_half ? pass_levels_typed<F16> : pass_levels_typed<float>)(s, b, l, x);
  l.done = l.count;
}

// What a level adds for row n: the new coordinates, the norms of the bands that they replace, and at level 1
// the stored coordinates' error, then zeros; NR numbers, and the next NR `step` after them.
template <class S>
MK_INLINE void piece_of_level(const ScanCall& s, int64_t level, int64_t n, float* dst, int64_t step) {
  enum { NR = 2 * Vec<float>::W };
  const LogitBounds& in = *s.bound;
  const int64_t k1 = in.dims[level - 1] - s.k0, len = in.dims[level] - in.dims[level - 1];
  const int64_t b1 = in.first_band[level - 1], b2 = in.first_band[level];
  const S* z = (const S*)in.fine + n * (s.K - s.k0) + k1;
  const float* c = in.coarse + n * s.stride + s.k0;
  int64_t k = 0;
  for (; k + NR <= len; k += NR, dst += step) {
    store(dst, Convert<float, S>::vec(z + k));
    store(dst + NR / 2, Convert<float, S>::vec(z + k + NR / 2));
  }
  float tail[NR] = {};
  if (k < len) {
    S raw[NR];
    memset((void*)raw, 0, sizeof raw);
    memcpy((void*)raw, z + k, (len - k) * sizeof(S));
    store(tail, Convert<float, S>::vec(raw));
    store(tail + NR / 2, Convert<float, S>::vec(raw + NR / 2));
  }
  int64_t i = len - k;
  for (int64_t e = b1; e <= b2; e++) {  // the bands replaced, then the error
    if (e == b2 && level > 1) break;
    if (i == NR) {
      memcpy((void*)dst, tail, sizeof tail);
      dst += step;
      memset((void*)tail, 0, sizeof tail);
      i = 0;
    }
    tail[i++] = e == b2 ? c[s.bands] : c[e];
  }
  memcpy((void*)dst, tail, sizeof tail);
}

// The same for the rows n0 .. n0 + cnt, packed like a tile of the sweep: y [depth/NR][SCAN_TILE_ROWS][NR].
template <class S>
static void tile_of_level(const ScanCall& s, int64_t level, int64_t n0, int64_t cnt, float* y) {
  enum { NR = 2 * Vec<float>::W, AHEAD = 8 };
  for (int64_t j = 0; j < cnt; j++) {
    if (n0 + j + AHEAD < s.N) ask_for_piece<S>(s, level, n0 + j + AHEAD);
    piece_of_level<S>(s, level, n0 + j, y + j * NR, SCAN_TILE_ROWS * NR);
  }
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
