// posterior and posterior_state: which sweep answers a call, how it is shared among threads, and how parts
// are joined.
#pragma once
#include "cpu/posterior/small-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

// Lets the logits of two parts of the rows count from the same.
template <class R>
static void count_alike(Query<R>& a, State& in_a, Query<R>& b, State& in_b) {
  if (in_b.s == 0 || a.from == b.from) return;
  if (in_a.s == 0) {
    a.from = b.from;
    return;
  }
  const double from = dmin(a.from, b.from);
  count_from(a, in_a, from);
  count_from(b, in_b, from);
}

// Joins the states and accumulators of all parts of query b in those of the first part.
template <class R>
static void join_parts(const Plan& pl, SweepWork<R>* work, int parts, int64_t b) {
  for (int i = 1; i < parts; i++) {
    double fa, fb;
    if (work[i].q[b].mode == kNotFinite) work[0].q[b].mode = kNotFinite;  // a row of that part is NaN
    count_alike(work[0].q[b], work[0].st[b], work[i].q[b], work[i].st[b]);
    merge(work[0].st[b], work[i].st[b], fa, fb);
    Near<R>&near = work[0].close[b], &other = work[i].close[b];
    rescale(near, fa, pl.D);
    if (fb != 0 && other.s != 0) {
      for (int64_t d = 0; d < pl.D; d++)
        near.sum[d] = (R)(fb * other.sum[d] + (near.s == 0 ? 0 : near.sum[d]));
      near.s += fb * other.s;
    }
    for (int64_t d = 0; d < pl.Dp; d += 2 * Vec<R>::W) {
      R *a = acc_at(pl, work[0].acc, b, d), *z = acc_at(pl, work[i].acc, b, d);
      for (int e = 0; e < 2 * Vec<R>::W; e++)
        a[e] = (R)((fa == 0 ? 0 : fa * a[e]) + (fb == 0 ? 0 : fb * z[e]));
    }
  }
}

// The sweep for any number of features. Threads share the blocks of queries where these are many, else the
// rows.
template <class R>
static int posterior_general(const CentredRows<R>& c, const Queries& in, const Output& out, double b_max,
                             int threads) {
  const Rows& rows = c.src.rows;
  threads = threads_for(threads, (double)rows.n * rows.d * in.b);
  const Plan pl = make_plan<R>(in.b, c.src, true, in.weighting == kGaussian);
  const int64_t blocks = (in.b + pl.B - 1) / pl.B, tiles = (rows.n + pl.NT - 1) / pl.NT;
  const bool by_queries = blocks >= 2 * threads || tiles < 2;
  const int parts = (int)imax(1, imin(threads, by_queries ? blocks : tiles));
  WorkSpaces<SweepWork<R>> list(parts);
  if (!list.reserve(pl, in)) return kNoMemory;
  SweepWork<R>* work = list.items;
  const auto finish_query = [&](SweepWork<R>& w, int64_t b, int64_t b0) {
    const auto run = [&](int64_t d) { return acc_at(pl, w.acc, b, d); };
    finish(c.src, w.q[b], w.st[b], w.close[b], c.src.unit, run, b0 + b, out);
  };
  if (by_queries)
    return for_parts(threads, blocks, [&](int64_t k, int worker) {
      const int64_t b0 = k * pl.B, B = imin(pl.B, in.b - b0);
      const int failed = sweep(c.src, in, pl, b_max, b0, B, 0, rows.n, work[worker]);
      for (int64_t b = 0; b < B && !failed; b++) finish_query(work[worker], b, b0);
      return failed;
    });
  for (int64_t k = 0; k < blocks; k++) {
    const int64_t b0 = k * pl.B, B = imin(pl.B, in.b - b0);
    const int failed = for_parts(threads, parts, [&](int64_t i, int) {
      return sweep(c.src, in, pl, b_max, b0, B, imin(rows.n, tiles * i / parts * pl.NT),
                   imin(rows.n, tiles * (i + 1) / parts * pl.NT), work[i]);
    });
    if (failed) return failed;
    for (int64_t b = 0; b < B; b++) {
      join_parts(pl, work, parts, b);
      finish_query(work[0], b, b0);
    }
  }
  return kDone;
}

// Gathers the queries that a sweep of few features handed back for `which`, asks for them by `again`, and
// scatters the results.
template <class R, class Again>
static int handed_back_again(const CentredRows<R>& c, const Queries& in, const Output& out,
                             const char* handed_back, char which, Again again) {
  const int64_t D = c.src.rows.d;
  int64_t count = 0;
  for (int64_t b = 0; b < in.b; b++) count += handed_back[b] == which;
  if (count == 0) return kDone;
  const OutputArrays to = arrays_of(out);
  Arena arena;
  const Conditions& asked = in.conditions;
  const int64_t K = asked.rows ? asked.k : 0;
  if (!arena.reserve(3 * Arena::bytes<R>(count * D) + 10 * Arena::bytes<double>(count) +
                     2 * Arena::bytes<double>(count * K) + Arena::bytes<int64_t>(count)))
    return kNoMemory;
  R *x = arena.take<R>(count * D), *vectors[2];
  for (int i = 0; i < 2; i++) vectors[i] = to.vectors[i] ? arena.take<R>(count * D) : nullptr;
  double *number[4], *condition[2], *column[6];
  for (double*& v : number) v = arena.take<double>(count);
  for (double*& v : condition) v = arena.take<double>(count * K);
  int64_t* left_out = arena.take<int64_t>(count);
  for (double*& v : column) v = arena.take<double>(count);
  int64_t k = 0;
  for (int64_t b = 0; b < in.b; b++) {
    if (handed_back[b] != which) continue;
    memcpy(x + k * D, (const R*)in.x + b * D, D * sizeof(R));
    number[0][k] = in.sigma[b];
    number[1][k] = in.alpha[b];
    number[2][k] = in.temperature[b];
    number[3][k] = asked.rows ? asked.h[b] : 0;
    for (int64_t i = 0; i < K; i++) {
      condition[0][k * K + i] = asked.c[b * K + i];
      condition[1][k * K + i] = asked.a[b * K + i];
    }
    left_out[k++] = in.leave_out ? in.leave_out[b] : -1;
  }
  const Conditions conditions = {asked.rows, condition[0], number[3], condition[1], asked.k};
  const Queries rest = {x,         in.f64,  count,        number[0],  number[1],
                        number[2], in.bias, in.weighting, conditions, in.leave_out ? left_out : nullptr,
                        in.watch};
  const Sums sums = {vectors[0], column[0], column[1], column[2], column[3], vectors[1]};
  const States states = {column[0], column[1],  column[2],  column[3], column[4],
                         column[5], vectors[0], vectors[1], nullptr};
  const Output gathered = {out.sums ? &sums : nullptr, out.states ? &states : nullptr};
  const int failed = again(rest, gathered);
  if (failed) return failed;
  k = 0;
  for (int64_t b = 0; b < in.b; b++) {
    if (handed_back[b] != which) continue;
    for (int i = 0; i < 2; i++)
      if (vectors[i]) memcpy((R*)to.vectors[i] + b * D, vectors[i] + k * D, D * sizeof(R));
    for (int i = 0; i < to.columns; i++) to.column[i][b] = column[i][k];
    k++;
  }
  return kDone;
}

// The sweep for few features: first about the centre; for what that hands back by differences of the values
// as they are; and in general for the rest.
template <class R>
static int posterior_small(const CentredRows<R>& c, const Queries& in, const Output& out, double b_max,
                           int threads, bool centred) {
  enum { W = Vec<R>::W };
  const int parts = (int)imax(1, imin(threads, in.b / (2 * W)));
  Arena marks;
  if (!marks.reserve(Arena::bytes<char>(in.b))) return kNoMemory;
  char* handed_back = marks.take<char>(in.b);
  const typename Small<R>::F part = small_for<R>(c.src.rows.d, centred);
  const auto run_part = [&](int64_t i, int) {
    const int64_t b0 = in.b * i / parts / W * W, b1 = i + 1 == parts ? in.b : in.b * (i + 1) / parts / W * W;
    return part(c.src, in, b_max, b0, b1, out, handed_back + b0);
  };
  int failed = for_parts(threads, parts, run_part);
  if (failed) return failed;
  const auto general = [&](const Queries& rest, const Output& to) {
    return posterior_general(c, rest, to, b_max, threads);
  };
  const auto as_they_are = [&](const Queries& rest, const Output& to) {
    return centred ? posterior_small(c, rest, to, b_max, threads, false) : general(rest, to);
  };
  failed = handed_back_again(c, in, out, handed_back, kAsTheyAre, as_they_are);
  return failed ? failed : handed_back_again(c, in, out, handed_back, kInGeneral, general);
}

template <class R>
static int posterior_typed(const Rows& rows, const Queries& in, const Output& out, int threads) {
  if (in.b == 0 && !out.states) return kDone;
  CentredRows<R> c;
  if (!c.prepare(rows, in.bias)) return kNoMemory;
  if (out.states) memcpy((void*)out.states->center, c.src.center, rows.d * sizeof(double));
  if (in.b == 0) return kDone;
  const double b_max = largest_bias(in.bias, rows.n);
  const bool few = in.b < 32 && (rows.d > 4 || rows.n > FEW_ROWS);
  if (rows.d > SMALL_D || few || in.weighting != kGaussian)
    return posterior_general(c, in, out, b_max, threads);
  return posterior_small(c, in, out, b_max, threads, true);
}

static int run_posterior(const Rows& rows, const Queries& in, const Sums& sums, int threads) {
  const Output out = {&sums, nullptr};
  return in.f64 ? posterior_typed<double>(rows, in, out, threads)
                : posterior_typed<float>(rows, in, out, threads);
}
static int run_posterior_state(const Rows& rows, const Queries& in, const States& states, int threads) {
  const Output out = {nullptr, &states};
  return in.f64 ? posterior_typed<double>(rows, in, out, threads)
                : posterior_typed<float>(rows, in, out, threads);
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
