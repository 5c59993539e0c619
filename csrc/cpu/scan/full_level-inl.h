// The last level of a scan: the product over all features, for the rows that are left, of which it leaves
// few.
//
// It goes row by row through the lists of many queries at once: a row comes from memory once for all the
// queries that have it, and meets them, 2 or 4 bytes a feature, in L2.
#pragma once
#include "cpu/scan/levels-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

enum {
  FULL_B = 64,     // queries together
  FULL_PIECES = 4  // ranges of rows for each thread
};
// The error that a product may have, of sigma^2 T log(N / eps). With a tenth of it hardly fewer rows would be
// left.
static const double kFullProductError = 0.04;

// A query, and what is left of its list.
struct FullLevelQuery {
  int64_t b;
  List* l;
  FullProductQuery x;
};

static bool prepare_full_product(const ScanCall& s, int64_t b, FullProductQuery& to) {
  const ScanQuery& q = s.q[b];
  const double size = s.bound->norms[b * (s.bands + 1) + s.bands];
  const double enough = kFullProductError * q.scale * __builtin_log(s.N / s.bound->eps) / dmax(q.a, 1e-30);
  return s.in->f64 ? to.prepare(s.src, (const double*)s.in->x + b * s.D, q.alpha, size, s.y_max, enough)
                   : to.prepare(s.src, (const float*)s.in->x + b * s.D, q.alpha, size, s.y_max, enough);
}
// The upper bound of s_n that follows from a product as computed.
MK_INLINE float full_bound(const ScanCall& s, int64_t b, const FullProductQuery& x, int64_t n,
                           double product) {
  const ScanQuery& q = s.q[b];
  return (float)(q.alpha * product - 0.5 * q.a * q.a * s.rows->sq_norms[n] + q.s2 * s.bias(n) +
                 q.a * x.error);
}

// The share of a list that this level leaves, as some of its rows show.
static double share_left(const ScanCall& s, int64_t b, const List& l) {
  enum { SOME = 16 };
  FullProductQuery x;
  const FullProductQuery* px = &x;
  if (l.count == 0 || !prepare_full_product(s, b, x)) return 1;
  const int64_t some = imin(SOME, l.count);
  const float least = s.q[b].least(l.best);
  int64_t left = 0;
  for (int64_t i = 0; i < some; i++) {
    const int64_t n = l.e[l.count * i / some].n;
    double product;
    s.full_product(s.src, n, &px, 1, &product);
    left += !(full_bound(s, b, x, n, product) < least);
  }
  return (double)left / some;
}

static const Entry* first_from_row(const List& l, int64_t n) {  // rows ascend
  int64_t low = 0, high = l.count;
  while (low < high) {
    const int64_t mid = (low + high) / 2;
    if ((int64_t)l.e[mid].n < n)
      low = mid + 1;
    else
      high = mid;
  }
  return l.e + low;
}

// The rows n0 .. n1 of all lists. Returns kDone or kStopped.
static int full_level_rows(const ScanCall& s, FullLevelQuery* qs, int64_t count, int64_t n0, int64_t n1) {
  enum { WINDOW = 2048 };
  const int64_t stride = s.rows->stride * size_of(s.rows->type),
                row_bytes = imin(s.D * size_of(s.rows->type), 8192);
  Entry* at[FULL_B];  // the next entry of each list
  for (int64_t i = 0; i < count; i++) at[i] = (Entry*)first_from_row(*qs[i].l, n0);
  Pace pace = {s.in->watch, 0};
  if (pace.ask()) return kStopped;
  for (int64_t w0 = n0; w0 < n1; w0 += WINDOW) {
    const int64_t rows = imin(WINDOW, n1 - w0);
    uint64_t having[WINDOW + 1] = {};  // which queries have each row; behind the last, one for the search
    having[rows] = 1;
    for (int64_t i = 0; i < count; i++) {
      const Entry* end = qs[i].l->e + qs[i].l->count;
      for (const Entry* e = at[i]; e < end && (int64_t)e->n < w0 + rows; e++)
        having[e->n - w0] |= (uint64_t)1 << i;
    }
    const auto next = [&](int64_t j) {
      while (!having[j]) j++;
      return j;
    };
    for (int64_t j = next(0); j < rows;) {
      int64_t met = 0;
      Entry* e[FULL_B];
      const FullLevelQuery* q[FULL_B];
      const FullProductQuery* x[FULL_B];
      for (uint64_t left = having[j]; left; left &= left - 1) {
        const int64_t i = __builtin_ctzll(left);
        q[met] = qs + i;
        x[met] = &qs[i].x;
        e[met++] = at[i]++;
      }
      const int64_t then = next(j + 1), n = w0 + j;
      if (then < rows) {  // the processor's own prefetcher begins anew in each page
        const char* p = (const char*)s.rows->data + (w0 + then) * stride;
        for (int64_t k = 0; k < row_bytes; k += 64) __builtin_prefetch(p + k);
      }
      double product[FULL_B];
      if (pace.stopped(met * s.D / 4)) return kStopped;
      s.full_product(s.src, n, x, met, product);
      for (int64_t i = 0; i < met; i++) {
        const float up = full_bound(s, q[i]->b, q[i]->x, n, product[i]);
        if (up < e[i]->up) e[i]->up = up;
      }
      j = then;
    }
  }
  return kDone;
}

// The last level of all lists that are long enough to pay for it. s.lists [b] must hold all rows left to each
// query.
static int full_level(const ScanCall& s, int threads) {
  Arena arena;
  const int64_t B = s.in->b;
  if (!arena.reserve(Arena::bytes<int64_t>(B))) return kNoMemory;
  int64_t *long_ones = arena.take<int64_t>(B), many = 0;
  for (int64_t b = 0; b < B; b++)
    if (s.q[b].active && !s.lists[b].given_up && s.lists[b].count > WORTH_EVALUATING) long_ones[many++] = b;
  int failed = kDone;
  for (int64_t g = 0; g < many && !failed; g += FULL_B) {
    FullLevelQuery qs[FULL_B];
    const int64_t count = imin(FULL_B, many - g), pieces = imin(s.N, threads * FULL_PIECES);
    failed = for_parts(threads, count, [&](int64_t i, int) {
      qs[i].b = long_ones[g + i];
      qs[i].l = s.lists + qs[i].b;
      return prepare_full_product(s, qs[i].b, qs[i].x) ? kDone : kNoMemory;
    });
    if (failed) break;
    failed = for_parts(threads, pieces, [&](int64_t i, int) {
      return full_level_rows(s, qs, count, s.N * i / pieces, s.N * (i + 1) / pieces);
    });
    if (failed) break;
    for_parts(threads, count, [&](int64_t i, int) {
      List& l = *qs[i].l;
      int64_t best = 0;
      for (int64_t j = 1; j < l.count; j++)
        if (l.e[j].up > l.e[best].up) best = j;
      s.consider(qs[i].b, l.e[best].n, l);
      l.filter(s.q[qs[i].b].least(l.best));
      return kDone;
    });
  }
  return failed;
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
