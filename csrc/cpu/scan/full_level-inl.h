// The last level of the ladder: the product over all features, for the rows left of all queries together, which leaves few.
// Row by row: a row comes from memory once for all the queries that have it, and meets theirs, 2 or 4 bytes a feature, in L2.
#pragma once
#include "cpu/scan/bounds-inl.h"

namespace memokern { namespace MEMOKERN_ISA_NS {

enum {
  LAST_B = 64,     // queries together
  LAST_PIECES = 4  // ranges of rows for each thread
};
static const double kLastError = 0.04;  // of sigma^2 T log(N / eps): with ten times less hardly fewer rows are left

// Queries and what is left of their lists.
struct LastQuery {
  int64_t b;
  List* l;
  WholeQuery x;
};

static bool prepare(const Scan& s, int64_t b, WholeQuery& to) {
  const Scanned& q = s.q[b];
  const double size = s.bound->norms[b * (s.nb + 1) + s.nb], enough = kLastError * q.scale * __builtin_log(s.N / s.bound->eps) / dmax(q.a, 1e-30);
  return s.f64 ? to.prepare(s.f, (const double*)s.in->x + b * s.D, q.alpha, size, s.y_max, enough)
               : to.prepare(s.f, (const float*)s.in->x + b * s.D, q.alpha, size, s.y_max, enough);
}
// The bound of s_n for a product as computed.
MK_INLINE float last_bound(const Scan& s, int64_t b, const WholeQuery& x, int64_t n, double product) {
  const Scanned& q = s.q[b];
  return (float)(q.alpha * product - 0.5 * q.a * q.a * s.rows->sq_norms[n] + q.s2 * s.bias(n) + q.a * x.error);
}

// Which part of a list the last level leaves, as some rows show.
static double last_share(const Scan& s, int64_t b, const List& l) {
  enum { SOME = 16 };
  WholeQuery x;
  const WholeQuery* px = &x;
  if (l.count == 0 || !prepare(s, b, x)) return 1;
  const int64_t some = imin(SOME, l.count);
  const float least = s.q[b].least(l.best);
  int64_t left = 0;
  for (int64_t i = 0; i < some; i++) {
    const int64_t n = l.e[l.count * i / some].n;
    double product;
    s.whole(s.f, n, &px, 1, &product);
    left += !(last_bound(s, b, x, n, product) < least);
  }
  return (double)left / some;
}

static const Entry* from_row(const List& l, int64_t n) {  // rows ascend
  int64_t low = 0, high = l.count;
  while (low < high) {
    const int64_t mid = (low + high) / 2;
    if ((int64_t)l.e[mid].n < n) low = mid + 1;
    else high = mid;
  }
  return l.e + low;
}

// The rows n0 .. n1 of all lists.
static void last_rows(const Scan& s, LastQuery* qs, int64_t count, int64_t n0, int64_t n1) {
  enum : uint32_t { NONE = ~0u };  // no row: there are fewer
  uint32_t next[LAST_B];
  Entry *at[LAST_B], *end[LAST_B];
  for (int64_t i = 0; i < LAST_B; i++) {
    next[i] = NONE;
    if (i >= count) continue;
    at[i] = (Entry*)from_row(*qs[i].l, n0);
    end[i] = (Entry*)from_row(*qs[i].l, n1);
    if (at[i] < end[i]) next[i] = at[i]->n;
  }
  const int64_t stride = s.rows->stride * size_of(s.rows->type), row_bytes = imin(s.D * size_of(s.rows->type), 8192);
  const auto first = [&] {
    uint32_t n = NONE;
    for (int i = 0; i < LAST_B; i++) n = next[i] < n ? next[i] : n;
    return n;
  };
  for (uint32_t n = first(); n != NONE;) {
    int64_t met = 0;
    Entry* e[LAST_B];
    const LastQuery* q[LAST_B];
    const WholeQuery* x[LAST_B];
    for (int i = 0; i < LAST_B; i++) {
      if (next[i] != n) continue;
      q[met] = qs + i;
      x[met] = &qs[i].x;
      e[met++] = at[i]++;
      next[i] = at[i] < end[i] ? at[i]->n : NONE;
    }
    const uint32_t then = first();
    if (then != NONE) {  // the processor's own prefetcher begins anew in each page
      const char* p = (const char*)s.rows->data + then * stride;
      for (int64_t k = 0; k < row_bytes; k += 64) __builtin_prefetch(p + k);
    }
    double product[LAST_B];
    s.whole(s.f, n, x, met, product);
    for (int64_t i = 0; i < met; i++) {
      const float up = last_bound(s, q[i]->b, q[i]->x, n, product[i]);
      if (up < e[i]->up) e[i]->up = up;
    }
    n = then;
  }
}

// lists [b]: all rows left of each query, ascending.
static int last_level(const Scan& s, int threads) {
  Arena arena;
  const int64_t B = s.in->b;
  if (!arena.reserve(Arena::bytes<int64_t>(B))) return 1;
  int64_t *long_ones = arena.take<int64_t>(B), many = 0;
  for (int64_t b = 0; b < B; b++)
    if (s.q[b].active && !s.lists[b].lost && s.lists[b].count > SCAN_MANY) long_ones[many++] = b;
  int failed = 0;  // of all threads: read only after a barrier
  for (int64_t g = 0; g < many && !failed; g += LAST_B) {
    LastQuery qs[LAST_B];
    const int64_t count = imin(LAST_B, many - g), pieces = imin(s.N, threads * LAST_PIECES);
    const int workers = (int)imin(threads, imax(count, pieces));
#pragma omp parallel num_threads(workers) if (workers > 1)
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count; i++) {
        qs[i].b = long_ones[g + i];
        qs[i].l = s.lists + qs[i].b;
        if (!prepare(s, qs[i].b, qs[i].x)) {
#pragma omp atomic write
          failed = 1;
        }
      }
      if (!failed) {
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < pieces; i++) last_rows(s, qs, count, s.N * i / pieces, s.N * (i + 1) / pieces);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; i++) {
          List& l = *qs[i].l;
          int64_t best = 0;
          for (int64_t j = 1; j < l.count; j++)
            if (l.e[j].up > l.e[best].up) best = j;
          s.consider(qs[i].b, l.e[best].n, l);
          l.filter(s.q[qs[i].b].least(l.best));
        }
      }
    }
  }
  return failed;
}

} }  // namespace
