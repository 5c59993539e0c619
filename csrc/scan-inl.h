// bound_scan: the rows that can matter to a query, by bounds on every logit from a few coordinates of each row.
//
// In the distance's own units: s_n = a <xc, yc_n> - a^2 |yc_n|^2 / 2 + sigma^2 b_n = (|xc|^2 - |x - a y_n|^2) / 2 + sigma^2 b_n, so
// t_n = (s_n - |xc|^2 / 2) / (sigma^2 T). A level of the ladder bounds s_n from above: the coordinates below dims[level] give
// their part of the product, the bands beyond it at most a |x_b||y_b| each (Cauchy-Schwarz). `best` is the largest
// s_n - |xc|^2 / 2 of rows evaluated by direct differences: proven. A row is dropped when its bound, widened by all
// that rounding can do (slack), is below best + |xc|^2 / 2 - sigma^2 T log(N / eps).
//
// A first look, at a few leading coordinates of every row, finds the row nearest in these; evaluated, it nearly always is
// the best, or close to it, and so the lists hold little in vain from the first row on.
//
// One task owns a block of queries and a range of rows, in chunks: level 0 of a whole chunk, queries across the lanes; the
// most promising row of each query evaluated; further levels of the whole chunk while many rows are left, else the rows
// left go to a list for each query, which climbs the rest of the ladder row by row at the end.
#pragma once
#include "posterior-inl.h"

namespace memokern { namespace MEMOKERN_ISA_NS {

enum {
  SCAN_B = 64,           // queries of a block
  SCAN_P = 256 << 10,    // bytes of a chunk's bounds: they are read again at once, from L2
  SCAN_TILE = 10 * UNIT, // rows of a tile of the further levels
  SCAN_LIST = 4096,      // a list is let grow to so many rows, or twice the cap
  SCAN_LOOK = 8          // coordinates of the first look
};
// Of a row's bound beyond its coordinates, how much a good guess of s_n counts: bounds alone prefer rows of large norm,
// coordinates alone those of small norm. On images any value from 0.15 to 0.3 finds the best row nearly always.
static const float kHope = 0.2f;

struct Entry { uint32_t n; float up; };
struct List {
  Entry* e;
  int64_t count, room, done;  // the first `done` entries are at the top of the ladder
  double best;                // of rows evaluated
  int64_t tried;              // the last of them
  const uint8_t* levels;      // [chunks] of a chunk's rows as they were listed
  int level;                  // levels used
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
  Source<float> f;       // for direct differences: only `rows` is set
  Source<double> d;
  Exact<float>::F exact_f;
  Exact<double>::F exact_d;
  Scanned* q;            // [b]
  int64_t N, D, k0, K, nb, stride, top;  // stride of coarse; the last level
  const int64_t* who;    // [count] the queries in range
  int64_t count, lanes, blocks, parts, NT, chunks;
  uint8_t* level;        // [blocks][chunks]
  List* lists;           // [parts][b]
  bool none;             // no bias

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
static void scan_block(const float* y, int64_t stride, int64_t k0, int64_t K, const float* x, const float* h, const float* bias, const float* a2, const float* s2, float* p, int64_t ps, float* best, int32_t* where, int32_t j) {
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
template <class S> static void climb(const Scan& s, int64_t b, List& l, float* x) {
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
    if (kept > 1 && promising >= 0) {  // one exact row, to drop others that would each cost as much
      s.consider(b, promising, l);
      least = q.least(l.best);
    }
  }
  l.filter(least);
  l.done = l.count;
}
template <class S> static void tile_level(const Scan& s, int64_t level, int64_t n0, int64_t cnt, float* y) {
  enum { NR = 2 * Vec<float>::W };
  const Bounds& in = *s.bound;
  const int64_t fine = s.K - s.k0, k1 = in.dims[level - 1] - s.k0, len = in.dims[level] - in.dims[level - 1], b1 = in.first_band[level - 1], b2 = in.first_band[level];
  for (int64_t j = 0; j < cnt; j++) {
    const S* z = (const S*)in.fine + (n0 + j) * fine + k1;
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

// A task's work space, and its steps.
struct ScanWork {
  enum { W = Vec<float>::W, NR = 2 * W };
  const Scan* s;
  const int64_t* who;    // [B] its queries; in whole vectors, Bp
  int64_t B, Bp;
  float *x0, *x_look, *xl, *p, *y, *h, *bias, *a2, *s2, *least, *best, *top, *last;
  int32_t* where;
  float** x_level;       // [levels] packed queries of the further levels, when they are there
  List* lists;           // [b] of its part
  Arena arena;
  bool failed;

  static int64_t depth(const Scan& s, int64_t level) {
    return round_up(s.bound->dims[level] - s.bound->dims[level - 1] + s.bound->first_band[level] - s.bound->first_band[level - 1] + (level == 1), (int64_t)NR);
  }
  bool reserve(const Scan& scan) {
    s = &scan;
    failed = false;
    int64_t deepest = 0, all = 0;
    for (int64_t l = 1; l <= s->top; l++) {
      deepest = imax(deepest, depth(*s, l));
      all += depth(*s, l);
    }
    const int64_t L = s->lanes;
    if (!arena.reserve(Arena::bytes<float>(s->stride * L) + Arena::bytes<float>(SCAN_LOOK * L) + Arena::bytes<float>(all * L) + Arena::bytes<float>(s->NT * L) + Arena::bytes<float>(SCAN_TILE * deepest) +
                       2 * Arena::bytes<float>(s->NT) + 6 * Arena::bytes<float>(L) + Arena::bytes<float>(UNIT * s->stride) + Arena::bytes<int32_t>(L) + Arena::bytes<float*>(s->top + 1)))
      return false;
    x0 = arena.take<float>(s->stride * L);
    x_look = arena.take<float>(SCAN_LOOK * L);
    xl = arena.take<float>(all * L);
    p = arena.take<float>(s->NT * L);
    y = arena.take<float>(SCAN_TILE * deepest);
    h = arena.take<float>(s->NT);
    bias = arena.take<float>(s->NT);
    a2 = arena.take<float>(L);
    s2 = arena.take<float>(L);
    least = arena.take<float>(L);
    best = arena.take<float>(L);
    top = arena.take<float>(L);
    last = arena.take<float>(UNIT * s->stride);
    where = arena.take<int32_t>(L);
    x_level = arena.take<float*>(s->top + 1);
    return true;
  }
  // Feature k of the depth K of query i: panels of NR queries, the last of W if that holds the rest.
  float* at(float* x, int64_t K, int64_t i, int64_t k) const {
    const int64_t i0 = i / NR * NR, n = imin(NR, Bp - i0);
    return x + i0 * K + k * n + (i - i0);
  }
  __attribute__((noinline)) void load(int64_t block, List* to) {
    who = s->who + block * s->lanes;
    B = imin(s->lanes, s->count - block * s->lanes);
    Bp = round_up(B, (int64_t)W);
    lists = to;
    const int64_t K0 = s->k0 + s->nb;
    memset((void*)x0, 0, s->stride * s->lanes * sizeof(float));
    for (int64_t i = 0; i < Bp; i++) {
      const int64_t b = i < B ? who[i] : 0;
      const bool active = i < B && s->q[b].active;
      a2[i] = active ? (float)(s->q[b].a * s->q[b].a) : 0;
      s2[i] = active ? (float)s->q[b].s2 : 1;
      least[i] = active ? s->q[b].least(to[b].best) : (float)kInf;
      top[i] = (float)-kInf;
      if (!active) continue;
      for (int64_t k = 0; k < s->k0; k++) *at(x0, K0, i, k) = (float)s->q[b].alpha * s->bound->z[b * s->K + k];
      for (int64_t k = 0; k < s->nb; k++) *at(x0, K0, i, s->k0 + k) = (float)s->q[b].a * s->bound->norms[b * (s->nb + 1) + k];
    }
    for (int64_t l = 0; l <= s->top; l++) x_level[l] = nullptr;
  }
  // Bounds from the first K columns of the rows n0 .. n0 + cnt, of which k0 count fully in a guess; each row's bounds come
  // p_row after those of the row before.
  __attribute__((noinline)) void blocks(int64_t n0, int64_t cnt, const float* x, int64_t k0, int64_t K, int64_t p_row) {
    const int64_t row = s->stride;
    for (int64_t i = 0; i < Bp; i++) best[i] = (float)-kInf;
    for (int64_t j = 0; j < cnt; j += UNIT) {
      const float* rows = s->bound->coarse + (n0 + j) * row;
      if (j + UNIT > cnt) {  // the last, filled up with copies
        for (int64_t i = 0; i < UNIT; i++) {
          const int64_t from = imin(j + i, cnt - 1);
          memcpy((void*)(last + i * row), s->bound->coarse + (n0 + from) * row, row * sizeof(float));
          h[j + i] = h[from];
          bias[j + i] = bias[from];
        }
        rows = last;
      }
      const float* b = s->none ? nullptr : bias + j;
      for (int64_t i = 0; i < Bp; i += NR) {
        const float* xi = x + i * K;
        float* to = p + j * p_row + i;
        if (Bp - i >= NR) {
          scan_block<MR, 2>(rows, row, k0, K, xi, h + j, b, a2 + i, s2 + i, to, Bp, best + i, where + i, (int32_t)j);
          scan_block<MR, 2>(rows + MR * row, row, k0, K, xi, h + j + MR, b ? b + MR : b, a2 + i, s2 + i, to + MR * Bp, Bp, best + i, where + i, (int32_t)j + MR);
        } else {
          scan_block<UNIT, 1>(rows, row, k0, K, xi, h + j, b, a2 + i, s2 + i, to, Bp, best + i, where + i, (int32_t)j);
        }
      }
    }
  }
  // The first look: s_n from a few coordinates alone, as if the others were zero.
  void look(int64_t n0, int64_t n1) {
    const int64_t K = imin(SCAN_LOOK, s->k0), K0 = s->k0 + s->nb;
    for (int64_t i = 0; i < Bp; i++)
      for (int64_t k = 0; k < K; k++) *at(x_look, K, i, k) = *at(x0, K0, i, k);
    int64_t found[SCAN_B];
    for (int64_t i = 0; i < B; i++) found[i] = -1;
    for (int64_t n = n0; n < n1; n += s->NT) {
      const int64_t cnt = imin(s->NT, n1 - n);
      for (int64_t j = 0; j < cnt; j++) {
        const float* c = s->bound->coarse + (n + j) * s->stride;
        h[j] = 0;
        for (int64_t k = 0; k < K; k++) h[j] -= 0.5f * c[k] * c[k];
        if (!s->none) bias[j] = (float)s->in->bias[n + j];
      }
      blocks(n, cnt, x_look, K, K, 0);
      for (int64_t i = 0; i < B; i++) {
        if (!(best[i] > top[i])) continue;
        for (int64_t j = where[i]; j < imin(where[i] + (int64_t)UNIT, cnt); j++) {
          const float* c = s->bound->coarse + (n + j) * s->stride;
          float v = a2[i] * h[j] + (s->none ? 0 : s2[i] * bias[j]);
          for (int64_t k = 0; k < K; k++) v += c[k] * *at(x_look, K, i, k);
          if (!(v > top[i])) continue;
          top[i] = v;
          found[i] = n + j;
        }
      }
    }
    for (int64_t i = 0; i < B; i++) {
      top[i] = (float)-kInf;
      if (found[i] >= 0) s->consider(who[i], found[i], lists[who[i]]);
      least[i] = s->q[who[i]].least(lists[who[i]].best);
    }
  }
  void level0(int64_t n0, int64_t cnt) {
    const int64_t K0 = s->k0 + s->nb;
    for (int64_t j = 0; j < cnt; j++) {
      h[j] = (float)(-0.5 * s->rows->sq_norms[n0 + j]);
      if (!s->none) bias[j] = (float)s->in->bias[n0 + j];
    }
    blocks(n0, cnt, x0, s->k0, K0, Bp);
    for (int64_t i = 0; i < B; i++) {  // the most promising row of each query, if it promises more than those before
      const Scanned& q = s->q[who[i]];
      List& l = lists[who[i]];
      if (!(best[i] > top[i]) || !q.active) continue;
      top[i] = best[i];
      int64_t n = -1;
      float most = (float)-kInf, bound = 0;
      for (int64_t j = where[i]; j < imin(where[i] + (int64_t)UNIT, cnt); j++) {
        const float* c = s->bound->coarse + (n0 + j) * s->stride;
        float product = 0;
        for (int64_t k = 0; k < s->k0; k++) product += c[k] * *at(x0, K0, i, k);
        const float guess = (1 - kHope) * (product + a2[i] * h[j] + (s->none ? 0 : s2[i] * bias[j])) + kHope * p[j * Bp + i];
        if (!(guess > most)) continue;
        most = guess;
        bound = p[j * Bp + i];
        n = n0 + j;
      }
      if (n < 0) continue;
      if (bound < q.least(l.best)) continue;  // it cannot be better
      s->consider(who[i], n, l);
      if (!l.lost) least[i] = q.least(l.best);
    }
  }
  int64_t count(int64_t cnt) const {
    Vec<float>::I sum = {};
    int64_t total = 0;
    for (int64_t j = 0; j < cnt; j++)
      for (int64_t i = 0; i < Bp; i += W) sum += MEMOKERN_ISA_NS::load(p + j * Bp + i) < MEMOKERN_ISA_NS::load(least + i);
    for (int i = 0; i < W; i++) total += sum[i];
    return cnt * Bp + total;  // a lane of a comparison that holds is -1
  }
  // The next level of a whole chunk.
  void extend(int64_t level, int64_t n0, int64_t cnt) {
    const Bounds& in = *s->bound;
    const int64_t K = depth(*s, level), k1 = in.dims[level - 1], k2 = in.dims[level], b1 = in.first_band[level - 1], b2 = in.first_band[level];
    if (!x_level[level]) {
      float* x = xl;
      for (int64_t l = 1; l < level; l++) x += depth(*s, l) * s->lanes;
      x_level[level] = x;
      memset((void*)x, 0, K * s->lanes * sizeof(float));
      for (int64_t i = 0; i < B; i++) {
        const Scanned& q = s->q[who[i]];
        if (!q.active) continue;
        const float* norms = in.norms + who[i] * (s->nb + 1);
        int64_t k = 0;
        for (int64_t d = k1; d < k2; d++) *at(x, K, i, k++) = (float)q.alpha * in.z[who[i] * s->K + d];
        for (int64_t e = b1; e < b2; e++) *at(x, K, i, k++) = -(float)q.a * norms[e];
        if (level == 1) *at(x, K, i, k) = (float)q.a * norms[s->nb];
      }
    }
    for (int64_t j0 = 0; j0 < cnt; j0 += SCAN_TILE) {
      const int64_t m = imin(SCAN_TILE, cnt - j0);
      (in.half ? tile_level<F16> : tile_level<float>)(*s, level, n0 + j0, m, y);
      for (int64_t k = 0; k < K; k += KC)
        for (int64_t i = 0; i < Bp; i += NR) {
          const int64_t n = imin(NR, Bp - i), len = imin(KC, K - k);
          const float *x = x_level[level] + i * K + k * n, *rows = y + k * SCAN_TILE;
          float* to = p + j0 * Bp + i;
          if (n == NR)
            for (int64_t j = 0; j < m; j += MR) micro<float, MR, 2, 1, NR>(rows + j * NR, 1, NR, SCAN_TILE * NR, x, NR, len, to + j * Bp, Bp, true);
          else
            for (int64_t j = 0; j < m; j += UNIT) micro<float, UNIT, 1, 1, NR>(rows + j * NR, 1, NR, SCAN_TILE * NR, x, W, len, to + j * Bp, Bp, true);
        }
    }
  }
  void list_rows(int64_t n0, int64_t cnt, float* scratch) {
    bool full = false;
    uint64_t live = 0;  // lanes without a query, or of one given up, list nothing: not even a NaN
    for (int64_t i = 0; i < B; i++) live |= (uint64_t)(least[i] < (float)kInf) << i;
    for (int64_t j = 0; j < cnt; j++) {
      const float* to = p + j * Bp;
      uint64_t bits = 0;
      for (int64_t i = 0; i < Bp; i += W) bits |= (uint64_t)(~lanes_of(MEMOKERN_ISA_NS::load(to + i) < MEMOKERN_ISA_NS::load(least + i)) & ((1 << W) - 1)) << i;
      for (bits &= live; bits; bits &= bits - 1) {
        const int e = __builtin_ctzll(bits);
        full |= !lists[who[e]].push((uint32_t)(n0 + j), to[e]);
      }
    }
    failed |= full;
    const int64_t cap = s->bound->cap, limit = imax(SCAN_LIST, 2 * cap);
    for (int64_t i = 0; i < B; i++) {
      List& l = lists[who[i]];
      if (l.count <= limit) continue;
      l.filter(least[i]);
      if (l.count <= limit / 4 * 3) continue;
      (s->bound->half ? climb<F16> : climb<float>)(*s, who[i], l, scratch);
      least[i] = s->q[who[i]].least(l.best);
      if (l.count <= cap) continue;
      l.lost = true;
      l.count = l.done = 0;
      least[i] = (float)kInf;
    }
  }
  void run(int64_t block, int64_t part, bool looking, float* scratch) {
    const int64_t c0 = s->chunks * part / s->parts, c1 = s->chunks * (part + 1) / s->parts, n_end = imin(s->N, c1 * s->NT);
    load(block, s->lists + part * s->in->b);
    if (looking || s->parts == 1) look(c0 * s->NT, n_end);
    if (looking && s->parts > 1) return;
    uint8_t* level = s->level + block * s->chunks;
    for (int64_t i = 0; i < B; i++) lists[who[i]].levels = level;
    for (int64_t c = c0; c < c1; c++) {
      const int64_t n0 = c * s->NT, cnt = imin(s->NT, n_end - n0);
      level0(n0, cnt);
      int64_t left = count(cnt), l = 0;
      // A level for the whole chunk costs K / 4 for each query and row (and the tile); row by row, some 128 + K.
      for (; l < s->top; l++) {
        const int64_t K = depth(*s, l + 1);
        if (left * (128 + K) < cnt * K * (Bp + 8) / 4) break;
        extend(l + 1, n0, cnt);
        left = count(cnt);
      }
      level[c] = (uint8_t)l;
      for (int64_t i = 0; i < B; i++) lists[who[i]].level = (int)imax(lists[who[i]].level, l + 1);
      if (left > 0) list_rows(n0, cnt, scratch);
    }
  }
};

// All tasks; then what one part found serves all. looking: of more parts than one only the first look, so that they start
// from the best of all rows.
static int scan_tasks(const Scan& s, int threads, bool looking, float* scratch) {
  const int64_t tasks = s.blocks * s.parts;
  const int workers = (int)imax(1, imin(threads, tasks));
  int failed = 0;
#pragma omp parallel for num_threads(workers) schedule(dynamic, 1) reduction(| : failed) if (workers > 1)
  for (int64_t t = 0; t < tasks; t++) {
    ScanWork w;
    if (w.reserve(s)) {
      w.run(t / s.parts, t % s.parts, looking, scratch + t * (s.K - s.k0));
      failed |= w.failed;
    } else {
      failed = 1;
    }
  }
  for (int64_t b = 0; b < s.in->b; b++) {
    double best = -kInf;
    for (int64_t j = 0; j < s.parts; j++) best = dmax(best, s.lists[j * s.in->b + b].best);
    for (int64_t j = 0; j < s.parts; j++) s.lists[j * s.in->b + b].best = best;
  }
  return failed;
}

static int scan_all(Scan& s, Lists& out, int threads) {
  const Bounds& in = *s.bound;
  const int64_t B = s.in->b;
  double y2 = 0, c = 0, b_max = 0;
  for (int64_t n = 0; n < s.N; n++) y2 = dmax(y2, s.rows->sq_norms[n]);
  for (int64_t d = 0; d < s.D; d++) c += s.rows->center[d] * s.rows->center[d];
  for (int64_t n = 0; !s.none && n < s.N; n++) {
    const double v = s.in->bias[n];
    b_max = !(v < kInf) ? kInf : v > -kInf ? dmax(b_max, __builtin_fabs(v)) : b_max;
  }
  const int64_t fine = s.K - s.k0, W = Vec<float>::W, NR = 2 * W;
  Arena arena, work;
  if (!arena.reserve(Arena::bytes<Scanned>(B) + Arena::bytes<int64_t>(B))) return 1;
  s.q = arena.take<Scanned>(B);
  int64_t* who = arena.take<int64_t>(B);
  for (int64_t b = 0; b < B; b++) {
    s.q[b] = scan_query(s, b, __builtin_sqrt(y2), __builtin_sqrt(c), b_max);
    if (s.q[b].active) who[s.count++] = b;
  }
  s.who = who;
  s.blocks = imax((s.count + SCAN_B - 1) / SCAN_B, imax(1, imin(threads, s.count / NR)));
  s.lanes = imax(W, round_up((s.count + s.blocks - 1) / s.blocks, s.count > NR ? NR : W));
  s.blocks = (s.count + s.lanes - 1) / s.lanes;
  s.parts = s.blocks % threads == 0 || s.blocks >= 4 * threads ? 1 : threads;
  s.NT = round_up(imin(SCAN_P / 4 / s.lanes, (s.N + s.parts - 1) / s.parts), UNIT);
  s.chunks = (s.N + s.NT - 1) / s.NT;
  s.parts = imin(s.parts, s.chunks);
  s.lists = (List*)calloc(B * s.parts, sizeof(List));
  if (!s.lists || !work.reserve(Arena::bytes<uint8_t>(s.blocks * s.chunks) + Arena::bytes<float>(s.blocks * s.parts * fine) + Arena::bytes<float>(B * s.parts * fine))) return 1;
  s.level = work.take<uint8_t>(s.blocks * s.chunks);
  float* scratch = work.take<float>(s.blocks * s.parts * fine);
  for (int64_t i = 0; i < B * s.parts; i++) {
    s.lists[i].best = -kInf;
    s.lists[i].tried = -1;
  }
  if (s.parts > 1 && scan_tasks(s, threads, true, scratch)) return 1;
  if (scan_tasks(s, threads, false, scratch)) return 1;
  const int64_t climbs = s.parts * B;
  float* climbing = work.take<float>(climbs * fine);
  const int workers = (int)imax(1, imin(threads, climbs));
#pragma omp parallel for num_threads(workers) schedule(dynamic, 1) if (workers > 1)
  for (int64_t t = 0; t < climbs; t++) {
    List& l = s.lists[t];
    const int64_t b = t % B;
    if (l.lost || !s.q[b].active) continue;
    l.filter(s.q[b].least(l.best));
    (in.half ? climb<F16> : climb<float>)(s, b, l, climbing + t * fine);
  }
  const double log_n = __builtin_log(s.N / in.eps);
  out.start[0] = 0;
  for (int64_t b = 0; b < B; b++) {
    double best = -kInf;
    int64_t count = 0, level = 1;
    bool lost = !s.q[b].active;
    for (int64_t i = 0; i < s.parts; i++) {
      best = dmax(best, s.lists[i * B + b].best);
      lost |= s.lists[i * B + b].lost;
      level = imax(level, s.lists[i * B + b].level);
    }
    for (int64_t i = 0; i < s.parts; i++) {
      s.lists[i * B + b].filter(s.q[b].least(best));
      count += s.lists[i * B + b].count;
    }
    lost |= !(best > -kInf) || count > in.cap;
    out.start[b + 1] = out.start[b] + (lost ? 0 : count);
    out.level[b] = lost ? 0 : level;
    out.threshold[b] = lost ? __builtin_nan("") : best / s.q[b].scale - log_n;
  }
  out.index = (int64_t*)malloc(imax(1, out.start[B]) * sizeof(int64_t));
  if (!out.index) return 1;
  for (int64_t b = 0; b < B; b++) {
    int64_t* to = out.index + out.start[b];
    for (int64_t i = 0; out.level[b] > 0 && i < s.parts; i++)
      for (int64_t j = 0; j < s.lists[i * B + b].count; j++) *to++ = s.lists[i * B + b].e[j].n;
  }
  return 0;
}

static int run_bound_scan(const Rows& rows, const Queries& in, const Bounds& bound, Lists& out, bool f64, int threads) {
  out.index = nullptr;
  out.start[0] = 0;
  if (in.b == 0) return 0;
  Scan s;
  memset((void*)&s, 0, sizeof s);
  s.rows = &rows;
  s.in = &in;
  s.bound = &bound;
  s.f64 = f64;
  s.f.rows = s.d.rows = rows;
  s.exact_f = exact_for(s.f);
  s.exact_d = exact_for(s.d);
  s.N = rows.n;
  s.D = rows.d;
  s.top = bound.levels - 1;
  s.k0 = bound.dims[0];
  s.K = bound.dims[s.top];
  s.nb = bound.bands;
  s.stride = s.k0 + s.nb + 1;
  s.none = in.bias == nullptr;
  const int failed = scan_all(s, out, threads);
  for (int64_t i = 0; s.lists && i < s.parts * in.b; i++) free(s.lists[i].e);
  free(s.lists);
  return failed;
}

} }  // namespace
