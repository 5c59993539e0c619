// bound_scan: the rows that can matter to a query; why nothing else can is in bounds-inl.h.
//
// A first look, at a few leading coordinates of every row, finds the row nearest in these (on CIFAR-10 eight of them find the
// best row for 96 % of queries at sigma = 1.1, for 66 % at 1.9). It is evaluated, so that the lists hold little in vain from the first row on.
//
// One task owns a block of queries and a range of rows, in chunks: level 0 of a whole chunk, queries across the lanes; the
// most promising row of each query evaluated; further levels of the whole chunk while many rows are left, else the rows
// left go to a list for each query, which climbs the rest of the ladder row by row, and then the last level (last-inl.h).
#pragma once
#include "cpu/scan/full_level-inl.h"

namespace memokern { namespace MEMOKERN_ISA_NS {

// A task's work space, and its steps.
struct ScanWork {
  enum { W = Vec<float>::W, NR = 2 * W };
  enum Phase { LOOK, SAMPLE, SCAN };
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
    if (!arena.reserve(Arena::bytes<float>(s->stride * L) + Arena::bytes<float>(SCAN_LOOK * L) + Arena::bytes<float>(all * L) +
                       Arena::bytes<float>(s->NT * L) + Arena::bytes<float>(SCAN_TILE * deepest) +
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
    who = s->who + s->begin[block];
    B = s->begin[block + 1] - s->begin[block];
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
  // Bounds from the first K columns of cnt rows of the index, of which k0 count fully in a guess; each row's bounds come
  // p_row after those of the row before.
  __attribute__((noinline)) void blocks(const float* coarse, int64_t cnt, const float* x, int64_t k0, int64_t K, int64_t p_row) {
    const int64_t row = s->stride;
    for (int64_t i = 0; i < Bp; i++) best[i] = (float)-kInf;
    for (int64_t j = 0; j < cnt; j += UNIT) {
      const float* rows = coarse + j * row;
      if (j + UNIT > cnt) {  // the last, filled up with copies
        for (int64_t i = 0; i < UNIT; i++) {
          const int64_t from = imin(j + i, cnt - 1);
          memcpy((void*)(last + i * row), coarse + from * row, row * sizeof(float));
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
      blocks(s->bound->coarse + n * s->stride, cnt, x_look, K, K, 0);
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
  // How long the lists would be, and the work on the way there in rows listed, as some rows show.
  // `taken` [SCAN_SAMPLE][stride] of the index, row j of them being row N j / SCAN_SAMPLE.
  void sample(const float* taken, float* scratch) {
    const int64_t K0 = s->k0 + s->nb, step = imin(SCAN_SAMPLE, s->NT);
    List few[SCAN_B];
    memset((void*)few, 0, sizeof few);
    for (int64_t j0 = 0; j0 < SCAN_SAMPLE; j0 += step) {
      const int64_t cnt = imin(step, SCAN_SAMPLE - j0);
      for (int64_t j = 0; j < cnt; j++) {
        const int64_t n = s->sampled(j0 + j);
        h[j] = (float)(-0.5 * s->rows->sq_norms[n]);
        if (!s->none) bias[j] = (float)s->in->bias[n];
      }
      blocks(taken + j0 * s->stride, cnt, x0, s->k0, K0, Bp);
      for (int64_t i = 0; i < B; i++)
        for (int64_t j = 0; j < cnt && least[i] < (float)kInf; j++)
          if (p[j * Bp + i] >= least[i]) failed |= !few[i].push((uint32_t)s->sampled(j0 + j), p[j * Bp + i]);
    }
    const double each = (double)s->N / SCAN_SAMPLE;
    for (int64_t i = 0; i < B; i++) {
      few[i].best = lists[who[i]].best;
      few[i].levels = s->zero;
      if (few[i].count * each > s->bound->cap) climb(*s, who[i], few[i], scratch);
      double listed = few[i].work * (1 + kIndexShare / s->count) / (kListedCycles * s->D) + few[i].count * (kLastShare + kRowShare / s->count);
      if ((listed + few[i].count) * each > s->bound->cap) listed += few[i].count * last_share(*s, who[i], few[i]);
      s->length[who[i]] = listed * each * kBetter;
      lists[who[i]].best = few[i].best;  // proven too
      free(few[i].e);
    }
  }
  void level0(int64_t n0, int64_t cnt) {
    const int64_t K0 = s->k0 + s->nb;
    for (int64_t j = 0; j < cnt; j++) {
      h[j] = (float)(-0.5 * s->rows->sq_norms[n0 + j]);
      if (!s->none) bias[j] = (float)s->in->bias[n0 + j];
    }
    blocks(s->bound->coarse + n0 * s->stride, cnt, x0, s->k0, K0, Bp);
    for (int64_t i = 0; i < B; i++) {  // the most promising row of each query, if it promises more than those before
      const Scanned& q = s->q[who[i]];
      List& l = lists[who[i]];
      if (!(best[i] > top[i]) || !q.active || l.lost) continue;
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
    Ahead none = {};  // the index is small: its rows come by themselves
    const int64_t tile = imax(UNIT, imin(SCAN_TILE, SCAN_L1 / K / UNIT * UNIT));
    for (int64_t j0 = 0; j0 < cnt; j0 += tile) {
      const int64_t m = imin(tile, cnt - j0);
      (in.half ? tile_level<F16> : tile_level<float>)(*s, level, n0 + j0, m, y);
      for (int64_t k = 0; k < K; k += KC)
        for (int64_t i = 0; i < Bp; i += NR) {
          const int64_t n = imin(NR, Bp - i), len = imin(KC, K - k);
          const float *x = x_level[level] + i * K + k * n, *rows = y + k * SCAN_TILE;
          float* to = p + j0 * Bp + i;
          if (n == NR)
            for (int64_t j = 0; j < m; j += MR) micro<float, MR, 2, 1, NR>(rows + j * NR, 1, NR, SCAN_TILE * NR, x, NR, len, to + j * Bp, Bp, true, none, 0);
          else
            for (int64_t j = 0; j < m; j += UNIT) micro<float, UNIT, 1, 1, NR>(rows + j * NR, 1, NR, SCAN_TILE * NR, x, W, len, to + j * Bp, Bp, true, none, 0);
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
    const int64_t most = (int64_t)((1 + SCAN_WORTH) * s->bound->cap / kLastShare), limit = imax(SCAN_LIST, most);
    for (int64_t i = 0; i < B; i++) {
      List& l = lists[who[i]];
      if (l.count <= limit) continue;
      l.filter(least[i]);
      if (l.count <= limit / 4 * 3) continue;
      climb(*s, who[i], l, scratch);
      least[i] = s->q[who[i]].least(l.best);
      if (l.count <= most) continue;
      l.lost = true;
      l.count = l.done = 0;
      least[i] = (float)kInf;
    }
  }
  void run(int64_t block, int64_t part, Phase phase, float* scratch) {
    const int64_t c0 = s->chunks * part / s->parts, c1 = s->chunks * (part + 1) / s->parts, n_end = imin(s->N, c1 * s->NT);
    load(block, s->lists + part * s->in->b);
    if (phase == LOOK) return look(c0 * s->NT, n_end);
    if (phase == SAMPLE) return sample(s->taken, scratch);
    uint8_t* level = s->level + block * s->chunks;
    for (int64_t i = 0; i < B; i++) lists[who[i]].levels = level;
    for (int64_t c = c0; c < c1; c++) {
      const int64_t n0 = c * s->NT, cnt = imin(s->NT, n_end - n0);
      level0(n0, cnt);
      int64_t left = count(cnt), l = 0;
      // A level for the whole chunk costs K / 4 for each query and row (and the tile); row by row, some 128 + K.
      for (; l < s->top; l++) {
        const int64_t K = depth(*s, l + 1);
        if (left * (224 + K) < cnt * K * (Bp + 8) / 5) break;
        extend(l + 1, n0, cnt);
        left = count(cnt);
      }
      level[c] = (uint8_t)l;
      for (int64_t i = 0; i < B; i++) lists[who[i]].level = (int)imax(lists[who[i]].level, l + 1);
      if (left > 0) list_rows(n0, cnt, scratch);
    }
  }
};

// All tasks of a phase; then what one part found serves all.
static int scan_tasks(const Scan& s, int threads, ScanWork::Phase phase, float* scratch) {
  const int64_t parts = phase == ScanWork::SAMPLE ? 1 : s.parts, tasks = s.blocks * parts;
  const int workers = (int)imax(1, imin(threads, tasks));
  int failed = 0;
#pragma omp parallel for num_threads(workers) schedule(dynamic, 1) reduction(| : failed) if (workers > 1)
  for (int64_t t = 0; t < tasks; t++) {
    ScanWork w;
    if (w.reserve(s)) {
      w.run(t / parts, t % parts, phase, scratch + t * (s.K - s.k0));
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

struct Noise { double noise; int64_t b; };
static int noisier(const void* a, const void* b) {
  const Noise &x = *(const Noise*)a, &y = *(const Noise*)b;
  return x.noise > y.noise ? -1 : x.noise < y.noise ? 1 : x.b < y.b ? -1 : 1;
}

// Queries of like noise share a block: what the noisiest needs, all of it get. All blocks but the last have NR queries or more.
// Returns whether the queries are all alike.
static bool form_blocks(Scan& s, const Noise* all, int64_t count, int64_t most) {
  enum { NR = 2 * Vec<float>::W };
  s.count = s.blocks = 0;
  for (int64_t i = 0; i < count; i++) {
    if (s.lists && s.lists[all[i].b].lost) continue;
    const int64_t first = s.blocks ? s.begin[s.blocks - 1] : 0, held = s.count - first;
    if (s.blocks == 0 || held == most || (held % NR == 0 && all[i].noise < all[first].noise / 4)) s.begin[s.blocks++] = s.count;
    s.who[s.count++] = all[i].b;
  }
  s.begin[s.blocks] = s.count;
  return count == 0 || !(all[count - 1].noise < all[0].noise / 4);
}

// Gives up the queries whose lists would be longer than the cap, if what that saves is worth a sweep over the rows for
// them; then those, too, for which little would be saved: half, or, if they are few, what may be an error of the sample.
// Only time rests on it.
static void give_up(Scan& s) {
  const double cap = (double)s.bound->cap;
  double saved = 0;
  int64_t most = 0;
  for (int64_t b = 0; b < s.in->b; b++) {
    saved += dmax(0, s.length[b] / cap - 1);
    most += s.length[b] > cap / 2;
  }
  if (saved < SCAN_WORTH) return;
  const double longest = 3 * most > 2 * s.count ? cap / 8 : cap / 2;
  for (int64_t b = 0; b < s.in->b; b++)
    for (int64_t i = 0; i < s.parts && s.length[b] > longest; i++) s.lists[i * s.in->b + b].lost = true;
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
  if (!arena.reserve(Arena::bytes<Scanned>(B) + Arena::bytes<Noise>(B) + Arena::bytes<double>(B) + Arena::bytes<int64_t>(B) + Arena::bytes<int64_t>(B / NR + 2))) return 1;
  s.q = arena.take<Scanned>(B);
  s.length = arena.take<double>(B);
  Noise* all = arena.take<Noise>(B);
  s.who = arena.take<int64_t>(B);
  s.begin = arena.take<int64_t>(B / NR + 2);
  s.y_max = __builtin_sqrt(y2);
  int64_t active = 0;
  for (int64_t b = 0; b < B; b++) {
    s.q[b] = scan_query(s, b, s.y_max, __builtin_sqrt(c), b_max);
    s.length[b] = 0;
    if (s.q[b].active) all[active++] = {s.q[b].scale / (s.q[b].a * s.q[b].a), b};
  }
  qsort((void*)all, active, sizeof(Noise), noisier);
  const int64_t fewest = imax((active + SCAN_B - 1) / SCAN_B, imax(1, imin(threads, active / NR)));
  s.lanes = imax(W, round_up((active + fewest - 1) / fewest, active > NR ? NR : W));
  const bool alike = form_blocks(s, all, active, s.lanes);
  s.parts = (alike && s.blocks % threads == 0) || s.blocks >= 4 * threads ? 1 : threads;
  s.NT = round_up(imin(SCAN_P / 4 / s.lanes, (s.N + s.parts - 1) / s.parts), UNIT);
  s.chunks = (s.N + s.NT - 1) / s.NT;
  s.parts = imin(s.parts, s.chunks);
  s.lists = (List*)calloc(imax(1, B * s.parts), sizeof(List));
  const int64_t most = active / NR + 1;  // blocks: without the queries given up they may be more
  if (!s.lists || !work.reserve(Arena::bytes<uint8_t>(most * s.chunks) + Arena::bytes<uint8_t>(s.chunks) + Arena::bytes<float>(SCAN_SAMPLE * s.stride) +
                                  Arena::bytes<float>(most * s.parts * fine) + Arena::bytes<float>(B * s.parts * fine))) return 1;
  s.level = work.take<uint8_t>(most * s.chunks);
  s.zero = work.take<uint8_t>(s.chunks);
  float* scratch = work.take<float>(most * s.parts * fine);
  for (int64_t i = 0; i < B * s.parts; i++) {
    s.lists[i].best = -kInf;
    s.lists[i].tried = -1;
  }
  if (scan_tasks(s, threads, ScanWork::LOOK, scratch)) return 1;
  if (in.cap < s.N && s.N >= 4 * SCAN_SAMPLE) {
    s.taken = work.take<float>(SCAN_SAMPLE * s.stride);
    for (int64_t j = 0; j < SCAN_SAMPLE; j++) memcpy((void*)(s.taken + j * s.stride), in.coarse + s.sampled(j) * s.stride, s.stride * sizeof(float));
    if (scan_tasks(s, threads, ScanWork::SAMPLE, scratch)) return 1;
    give_up(s);
    form_blocks(s, all, active, s.lanes);
  }
  if (scan_tasks(s, threads, ScanWork::SCAN, scratch)) return 1;
  const int64_t climbs = s.parts * B;
  float* climbing = work.take<float>(climbs * fine);
  const int workers = (int)imax(1, imin(threads, climbs));
#pragma omp parallel for num_threads(workers) schedule(dynamic, 1) if (workers > 1)
  for (int64_t t = 0; t < climbs; t++) {
    List& l = s.lists[t];
    const int64_t b = t % B;
    if (l.lost || !s.q[b].active) continue;
    l.filter(s.q[b].least(l.best));
    climb(s, b, l, climbing + t * fine);
  }
  for (int64_t b = 0; b < B; b++) {  // the parts of a list, joined
    List& l = s.lists[b];
    for (int64_t i = 1; i < s.parts; i++) {
      const List& part = s.lists[i * B + b];
      l.best = dmax(l.best, part.best);
      l.lost |= part.lost;
      l.level = (int)imax(l.level, part.level);
    }
    if (l.lost) continue;
    l.filter(s.q[b].least(l.best));
    for (int64_t i = 1; i < s.parts; i++) {
      List& part = s.lists[i * B + b];
      part.filter(s.q[b].least(l.best));
      for (int64_t j = 0; j < part.count; j++)
        if (!l.push(part.e[j].n, part.e[j].up)) return 1;
    }
  }
  if (last_level(s, threads)) return 1;
  const double log_n = __builtin_log(s.N / in.eps);
  out.start[0] = 0;
  for (int64_t b = 0; b < B; b++) {
    const List& l = s.lists[b];
    const bool lost = !s.q[b].active || l.lost || !(l.best > -kInf) || l.count > (1 + SCAN_WORTH) * in.cap;
    out.start[b + 1] = out.start[b] + (lost ? 0 : l.count);
    out.level[b] = lost ? 0 : imax(1, l.level);
    out.threshold[b] = lost ? __builtin_nan("") : l.best / s.q[b].scale - log_n;
  }
  out.index = (int64_t*)malloc(imax(1, out.start[B]) * sizeof(int64_t));
  if (!out.index) return 1;
  for (int64_t b = 0; b < B; b++)
    for (int64_t j = 0; j < out.start[b + 1] - out.start[b]; j++) out.index[out.start[b] + j] = s.lists[b].e[j].n;
  return 0;
}

static int run_bound_scan(const Rows& rows, const Queries& in, const Bounds& bound, Lists& out, bool f64, int threads) {
  out.index = nullptr;
  out.start[0] = 0;
  if (in.b == 0) return 0;
  Centred<float> centred;
  if (!centred.prepare(rows)) return 1;
  Scan s;
  memset((void*)&s, 0, sizeof s);
  s.rows = &rows;
  s.in = &in;
  s.bound = &bound;
  s.f64 = f64;
  s.f = centred.src;
  s.d.rows = rows;
  s.exact_f = exact_for(s.f);
  s.exact_d = exact_for(s.d);
  s.whole = whole_for(rows.type);
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
