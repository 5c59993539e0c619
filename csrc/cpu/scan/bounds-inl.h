// What bound_scan (scan-inl.h) is made of: bounds on every logit from a few coordinates of a row, and their rounding.
//
// In the distance's own units: s_n = a <xc, yc_n> - a^2 |yc_n|^2 / 2 + sigma^2 b_n = (|xc|^2 - |x - a y_n|^2) / 2 + sigma^2 b_n, so
// t_n = (s_n - |xc|^2 / 2) / (sigma^2 T). A level of the ladder bounds s_n from above: the coordinates below dims[level] give
// their part of the product, the bands beyond it at most a |x_b||y_b| each (Cauchy-Schwarz). `best` is the largest
// s_n - |xc|^2 / 2 of rows evaluated by direct differences: proven. A row is dropped when its bound, widened by all
// that rounding can do (slack), is below best + |xc|^2 / 2 - sigma^2 T log(N / eps).
#pragma once
#include "cpu/scan/full_product-inl.h"

namespace memokern { namespace MEMOKERN_ISA_NS {

enum {
  SCAN_B = 64,           // queries of a block
  SCAN_P = 256 << 10,    // bytes of a chunk's bounds: they are read again at once, from L2
  SCAN_TILE = 10 * UNIT, // rows of a tile of the further levels
  SCAN_L1 = 4096,        // numbers of it, about: with a panel of queries and bounds they stay in L1
  SCAN_LIST = 4096,      // a list is let grow to so many rows, or what costs as much as a sweep for its query alone
  SCAN_LOOK = 16,        // coordinates of the first look
  SCAN_SAMPLE = 256,     // rows that show how long a list would be
  SCAN_WORTH = 2,        // what reading the rows for a sweep costs, in queries of it, about
  SCAN_MANY = 24         // rows for which it pays to evaluate one of them, or to prepare a query for whole products
};
// What a row costs that is listed, in cycles for each feature, about. Of that the last level: for each query, and for the row, which
// all share; and the ladder's reading of the index, for all, to its arithmetic for each. CIFAR-10, uint8, 1 to 64 queries.
static const double kListedCycles = 1.3, kLastShare = 0.09, kRowShare = 0.6, kIndexShare = 12;
// What a list is shorter by once the whole index has shown better rows than the first look. Held-out images, sigma = 1.9 to 3.3.
static const double kBetter = 0.5;
// Of a row's bound beyond its coordinates, how much a good guess of s_n counts: bounds alone prefer rows of large norm,
// coordinates alone those of small norm. CIFAR-10, 32 coordinates: 0.15 to 0.3 find the best row of 58 of 64 queries or more up
// to sigma = 1.1, and of 52 at 1.9.
static const float kHope = 0.2f;

struct Entry { uint32_t n; float up; };
struct List {
  Entry* e;
  int64_t count, room, done;  // the first `done` entries are at the top of the ladder
  double best;                // of rows evaluated
  int64_t tried;              // the last of them
  const uint8_t* levels;      // [chunks] of a chunk's rows as they were listed
  int level;                  // levels used
  double work;                // cycles spent on its rows by the ladder, about
  bool lost;                  // given up
  bool push(uint32_t n, float up) {
    if (count == room) {
      const int64_t more = imax(256, 2 * room);
      Entry* grown = (Entry*)realloc((void*)e, more * sizeof(Entry));
      if (!grown) return false;
      e = grown;
      room = more;
    }
    e[count].n = n;
    e[count++].up = up;
    return true;
  }
  void filter(float least) {
    int64_t kept = 0, kept_done = 0;
    for (int64_t i = 0; i < count; i++) {
      if (e[i].up < least) continue;
      kept_done += i < done;
      e[kept++] = e[i];
    }
    count = kept;
    done = kept_done;
  }
};

struct Scanned {         // a query
  bool active;
  double alpha, a, s2;   // a = |alpha|, sigma^2
  double reach, scale;   // |xc|^2 / 2 - sigma^2 T log(N / eps) - slack; sigma^2 T
  // Below it, a computed bound is that of a row to drop.
  float least(double best) const {
    const float v = (float)(best + reach);
    return active ? v - __builtin_fabsf(v) * 1.3e-7f : (float)kInf;
  }
};

// The call, and what all tasks share.
struct Scan {
  const Rows* rows;
  const Queries* in;
  const Bounds* bound;
  bool f64;
  Source<float> f;       // for direct differences and whole products
  Source<double> d;      // for direct differences: only `rows` is set
  Exact<float>::F exact_f;
  Exact<double>::F exact_d;
  Whole::F whole;
  double y_max;
  Scanned* q;            // [b]
  int64_t N, D, k0, K, nb, stride, top;  // stride of coarse; the last level
  int64_t* who;          // [count] the queries in range, the noisiest first
  int64_t* begin;        // [blocks + 1] in `who`
  double* length;        // [b] of a list, as some rows show
  int64_t count, lanes, blocks, parts, NT, chunks;  // lanes: queries of a block, at most
  uint8_t* level;        // [blocks][chunks]
  const uint8_t* zero;   // [chunks]
  float* taken;          // [SCAN_SAMPLE][stride] some rows of the index, or null: no list can be too long
  List* lists;           // [parts][b]
  bool none;             // no bias

  int64_t sampled(int64_t j) const { return N * j / SCAN_SAMPLE; }
  double bias(int64_t n) const { return none ? 0 : in->bias[n]; }
  // A proven lower bound of s_n - |xc|^2 / 2: the difference, less its own rounding.
  double evaluate(int64_t b, int64_t n) const {
    const double r2 = f64 ? exact_d(d, n, (const double*)in->x + b * D, q[b].alpha) : exact_f(f, n, (const float*)in->x + b * D, q[b].alpha);
    const double v = q[b].s2 * bias(n) - 0.5 * r2, less = (D + 16) * 2.3e-16 * r2 + 1e-15 * __builtin_fabs(q[b].s2 * bias(n));
    return v == v && v > -kInf ? v - less : -kInf;
  }
  void consider(int64_t b, int64_t n, List& l) const {
    if (n == l.tried) return;
    l.tried = n;
    l.best = dmax(l.best, evaluate(b, n));
  }
};

// What rounding can do to a computed bound of any row, u = 2^-24:
//   the products: `margin`, given; a further 64 u of their size for the query times alpha, its norms, the sum of levels
//   |yc|^2 and the bias: rounded, multiplied, and in each of the sums that follow: (stride + 64) u of their size
//   double: sq_norms, |xc|^2, and direct differences x - alpha y of values that lie off the centre
static Scanned scan_query(const Scan& s, int64_t b, double y_max, double c, double b_max) {
  const Queries& in = *s.in;
  Scanned q;
  const double sigma = in.sigma[b], T = in.temperature[b], sq = s.bound->sq[b], margin = s.bound->margin[b];
  q.alpha = in.alpha[b];
  q.a = __builtin_fabs(q.alpha);
  q.s2 = sigma * sigma;
  q.scale = q.s2 * T;
  const double u = 6e-8, x = __builtin_sqrt(sq), span = q.scale * __builtin_log(s.N / s.bound->eps);
  const double product = q.a * x * y_max, rest = 0.5 * q.a * q.a * y_max * y_max + q.s2 * b_max;
  const double slack = q.a * margin + 64 * u * product + (s.stride + 64) * u * rest + 1e-12 * sq + 1e-15 * q.a * (c + y_max) * (x + q.a * y_max) + 1e-35;
  q.reach = 0.5 * sq - span - slack;
  // Out of these ranges float could overflow, or lose sigma^2 b: the caller has a way for every query.
  q.active = sigma > 1e-15 && sigma < 1e15 && T > 1e-15 && T < 1e15 && q.a < 1e15 && sq < 1e30 && margin >= 0 && slack < 1e30 && span < 1e30 && product + rest < 1e30;
  return q;
}

#if MEMOKERN_VBYTES == 32 && defined(__AVX2__)
MK_INLINE int lanes_of(Vec<float>::I m) { return _mm256_movemask_ps((__m256)m); }
#else
MK_INLINE int lanes_of(Vec<float>::I m) {
  enum { W = Vec<float>::W };
  int bits = 0;
  for (int i = 0; i < W; i++) bits |= (m[i] & 1) << i;
  return bits;
}
#endif

// Bounds of M rows against V vectors of queries at level 0: p = a2 h + s2 b + <y, x>, h = -|yc|^2 / 2; and the largest
// guess of each lane, with the block of rows it came from.
template <int M, int V>
static void scan_block(const float* y, int64_t stride, int64_t k0, int64_t K, const float* x, const float* h, const float* bias, const float* a2,
                       const float* s2, float* p, int64_t ps, float* best, int32_t* where, int32_t j) {
  enum { W = Vec<float>::W };
  typedef Vec<float>::T F;
  typedef Vec<float>::I I;
  F r[M][V];
  float guess[M][V][W];
#pragma GCC unroll 12
  for (int i = 0; i < M; i++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) {
      r[i][v] = splat<float>(h[i]) * load(a2 + v * W);
      if (bias) r[i][v] += splat<float>(bias[i]) * load(s2 + v * W);
    }
  int64_t k = 0;
  for (; k < k0; k++, x += V * W)
#pragma GCC unroll 12
    for (int i = 0; i < M; i++)
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) r[i][v] += splat<float>(y[i * stride + k]) * load(x + v * W);
#pragma GCC unroll 12
  for (int i = 0; i < M; i++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) store(guess[i][v], r[i][v]);
  for (; k < K; k++, x += V * W)
#pragma GCC unroll 12
    for (int i = 0; i < M; i++)
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) r[i][v] += splat<float>(y[i * stride + k]) * load(x + v * W);
#pragma GCC unroll 2
  for (int v = 0; v < V; v++) {
    F top = splat<float>((float)-kInf);
#pragma GCC unroll 12
    for (int i = 0; i < M; i++) {
      store(p + i * ps + v * W, r[i][v]);
      top = vmax(load(guess[i][v]) * (1 - kHope) + r[i][v] * kHope, top);
    }
    const F old = load(best + v * W);
    const I more = top > old, at = *(const I*)(where + v * W);
    store(best + v * W, vmax(top, old));
    *(I*)(where + v * W) = (at & ~more) | ((j - (I){}) & more);
  }
}

// The part of a level's step that is a product: <z[k1:k2], x[k1:k2]>.
template <class S> static float segment(const S* p, const float* x, int64_t count) {
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

// What a level adds for query b: a z in `x` [K - k0], and -a |x_b| for the bands that its coordinates replace. At level 1 the
// stored coordinates' own error comes in, and stays.
template <class S> // The whole ladder, as the index is stored.
static void climb(const Scan& s, int64_t b, List& l, float* x) {
  const Bounds& in = *s.bound;
  const Scanned& q = s.q[b];
  const int64_t fine = s.K - s.k0;
  const float* norms = in.norms + b * (s.nb + 1);
  for (int64_t k = 0; k < fine; k++) x[k] = (float)q.alpha * in.z[b * s.K + s.k0 + k];
  enum { AHEAD = 12 };
  float least = q.least(l.best);
  for (int64_t level = 1; level <= s.top && l.count > 1 && l.done < l.count; level++) {
    const int64_t k1 = in.dims[level - 1] - s.k0, k2 = in.dims[level] - s.k0, b1 = in.first_band[level - 1], b2 = in.first_band[level];
    const float pad = level == 1 ? (float)q.a * norms[s.nb] : 0;
    l.work += (l.count - l.done) * (128 + k2 - k1) / 6.0;
    int64_t kept = l.done, promising = -1, end = 0;  // rows before `end` are of the chunks looked up
    bool below = false;
    float top = (float)-kInf;
    for (int64_t i = l.done; i < l.count; i++) {
      Entry e = l.e[i];
      if (i + AHEAD < l.count) {
        const int64_t n = l.e[i + AHEAD].n;
        const char *at = (const char*)((const S*)in.fine + n * fine + k1), *stop = at + (k2 - k1) * sizeof(S);
        for (; at < stop; at += 64) __builtin_prefetch(at);
        __builtin_prefetch(in.coarse + n * s.stride + s.k0 + b1);
      }
      if (e.up < least) continue;
      if (e.n >= end) {  // rows ascend
        const int64_t c = e.n / s.NT;
        end = (c + 1) * s.NT;
        below = l.levels[c] < level;
      }
      if (below) {
        const float* y = in.coarse + e.n * s.stride + s.k0;
        float sum = segment((const S*)in.fine + e.n * fine + k1, x + k1, k2 - k1), bands = pad * y[s.nb];
        for (int64_t k = b1; k < b2; k++) bands -= (float)q.a * norms[k] * y[k];
        e.up += sum + bands;
        if (e.up < least) continue;
      }
      if (e.up > top) {
        top = e.up;
        promising = e.n;
      }
      l.e[kept++] = e;
    }
    l.count = kept;
    l.level = (int)imax(l.level, level + 1);
    if (kept > SCAN_MANY && promising >= 0) {  // one exact row, to drop others
      s.consider(b, promising, l);
      least = q.least(l.best);
    }
  }
  l.filter(least);
}
// The whole ladder, as the index is stored.
static void climb(const Scan& s, int64_t b, List& l, float* x) {
  (s.bound->half ? climb<F16> : climb<float>)(s, b, l, x);
  l.done = l.count;
}
template <class S> static void tile_level(const Scan& s, int64_t level, int64_t n0, int64_t cnt, float* y) {
  enum { NR = 2 * Vec<float>::W };
  const Bounds& in = *s.bound;
  const int64_t fine = s.K - s.k0, k1 = in.dims[level - 1] - s.k0, len = in.dims[level] - in.dims[level - 1], b1 = in.first_band[level - 1], b2 = in.first_band[level];
  enum { AHEAD = 8 };
  for (int64_t j = 0; j < cnt; j++) {
    const S* z = (const S*)in.fine + (n0 + j) * fine + k1;
    if (n0 + j + AHEAD < s.N) {  // a piece of each row: too far apart for the processor's own prefetcher
      const char *at = (const char*)(z + AHEAD * fine), *stop = at + len * sizeof(S);
      for (; at < stop; at += 64) __builtin_prefetch(at);
    }
    const float* c = in.coarse + (n0 + j) * s.stride + s.k0;
    float* dst = y + j * NR;
    int64_t k = 0;
    for (; k + NR <= len; k += NR, dst += SCAN_TILE * NR) {
      store(dst, Convert<float, S>::vec(z + k));
      store(dst + NR / 2, Convert<float, S>::vec(z + k + NR / 2));
    }
    S raw[NR];
    memset((void*)raw, 0, sizeof raw);
    memcpy((void*)raw, z + k, (len - k) * sizeof(S));
    float tail[NR];
    store(tail, Convert<float, S>::vec(raw));
    store(tail + NR / 2, Convert<float, S>::vec(raw + NR / 2));
    int64_t i = len - k;
    for (int64_t e = b1; e <= b2; e++) {  // the bands replaced, then the pad
      if (e == b2 && level > 1) break;
      if (i == NR) {
        memcpy((void*)dst, tail, sizeof tail);
        dst += SCAN_TILE * NR;
        memset((void*)tail, 0, sizeof tail);
        i = 0;
      }
      tail[i++] = e == b2 ? c[s.nb] : c[e];
    }
    memcpy((void*)dst, tail, sizeof tail);
  }
}

} }  // namespace
