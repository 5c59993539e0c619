// bound_scan: the rows that can matter to each query. bounds-inl.h says why no other row can.
//
// Three phases, each a set of tasks (a block of queries and a range of rows): a first look finds a good row
// for each query, so that the lists hold little in vain from the first row on; a sample of rows shows which
// lists would be too long, and these queries are given up; the scan proper makes the lists. Then each list
// passes the levels of the index that its rows have not passed, row by row, and at last the full level
// (full_level-inl.h).
#pragma once
#include "cpu/scan/chunk-inl.h"
#include "cpu/scan/look-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

enum class Phase { kLook, kSample, kScan };

// Runs all tasks of a phase. Then every part knows the best row that any of them found. scratch has K - k0
// numbers for each task.
static int scan_tasks(const ScanCall& s, int threads, Phase phase, float* scratch) {
  const int64_t parts = phase == Phase::kSample ? 1 : s.parts, tasks = s.blocks * parts;
  const int workers = (int)imax(1, imin(threads, tasks));
  int failed = 0;
#pragma omp parallel for num_threads(workers) schedule(dynamic, 1) reduction(| : failed) if (workers > 1)
  for (int64_t i = 0; i < tasks; i++) {
    const int64_t block = i / parts, part = i % parts;
    const int64_t c0 = s.chunks * part / s.parts, c1 = s.chunks * (part + 1) / s.parts;
    float* own = scratch + i * (s.K - s.k0);
    ScanTask t;
    if (failed) continue;
    if (!t.reserve(s)) {
      failed |= kNoMemory;
      continue;
    }
    if (t.pace.ask()) {  // a task may be too short to ask on its way
      failed |= kStopped;
      continue;
    }
    t.load_block(block, s.lists + part * s.in->b);
    if (phase == Phase::kLook)
      first_look(t, c0 * s.NT, imin(s.N, c1 * s.NT));
    else if (phase == Phase::kSample)
      sample_lists(t, own);
    else
      scan_chunks(t, c0, c1, s.level + block * s.chunks, own);
    failed |= t.failed;
  }
  for (int64_t b = 0; b < s.in->b; b++) {
    double best = -kInf;
    for (int64_t j = 0; j < s.parts; j++) best = dmax(best, s.lists[j * s.in->b + b].best);
    for (int64_t j = 0; j < s.parts; j++) s.lists[j * s.in->b + b].best = best;
  }
  return failed;
}

struct Noise {
  double noise;
  int64_t b;
};
static int noisier(const void* a, const void* b) {
  const Noise &x = *(const Noise*)a, &y = *(const Noise*)b;
  return x.noise > y.noise ? -1 : x.noise < y.noise ? 1 : x.b < y.b ? -1 : 1;
}

// Forms blocks of queries, at most `most` each, of similar noise: what its noisiest query needs, the whole
// block gets. All blocks but the last have NR queries or more. Returns whether all queries are of similar
// noise.
static bool form_blocks(ScanCall& s, const Noise* all, int64_t count, int64_t most) {
  enum { NR = 2 * Vec<float>::W };
  s.count = s.blocks = 0;
  for (int64_t i = 0; i < count; i++) {
    if (s.lists && s.lists[all[i].b].given_up) continue;
    const int64_t first = s.blocks ? s.begin[s.blocks - 1] : 0, held = s.count - first;
    if (s.blocks == 0 || held == most || (held % NR == 0 && all[i].noise < all[first].noise / 4))
      s.begin[s.blocks++] = s.count;
    s.order[s.count++] = all[i].b;
  }
  s.begin[s.blocks] = s.count;
  return count == 0 || !(all[count - 1].noise < all[0].noise / 4);
}

// Gives up the queries whose lists would cost more than `most_listed` rows, if what that saves is worth
// reading the rows for a sweep. Since the rows are read then anyway, it also gives up those for which a list
// would save little: those above half of it, or, where two thirds are above half, those above an eighth,
// which may be an error of the sample. Only time depends on it.
static void give_up(ScanCall& s) {
  const double most_listed = (double)s.bound->most_listed;
  double saved = 0;
  int64_t long_ones = 0;
  for (int64_t b = 0; b < s.in->b; b++) {
    saved += dmax(0, s.expected[b] / most_listed - 1);
    long_ones += s.expected[b] > most_listed / 2;
  }
  if (saved < READING_COST) return;
  const double longest = 3 * long_ones > 2 * s.count ? most_listed / 8 : most_listed / 2;
  for (int64_t b = 0; b < s.in->b; b++)
    for (int64_t i = 0; i < s.parts && s.expected[b] > longest; i++) s.lists[i * s.in->b + b].given_up = true;
}

// Passes the lists of all parts through the levels that they have not passed, and joins the parts of each
// list in the first.
static int join_lists(ScanCall& s, int threads, float* scratch) {
  const int64_t B = s.in->b, fine = s.K - s.k0, all = s.parts * B;
  const int workers = (int)imax(1, imin(threads, all));
  int failed = 0;
#pragma omp parallel for num_threads(workers) schedule(dynamic, 1) reduction(| : failed) if (workers > 1)
  for (int64_t t = 0; t < all; t++) {
    List& l = s.lists[t];
    const int64_t b = t % B;
    Pace pace = {s.in->watch, 0};
    if (failed || l.given_up || !s.q[b].active) continue;
    if (pace.ask()) {
      failed |= kStopped;
      continue;
    }
    l.filter(s.q[b].least(l.best));
    pass_levels(s, b, l, scratch + t * fine);
  }
  if (failed) return failed;
  for (int64_t b = 0; b < B; b++) {
    List& l = s.lists[b];
    for (int64_t i = 1; i < s.parts; i++) {
      const List& part = s.lists[i * B + b];
      l.best = dmax(l.best, part.best);
      l.given_up |= part.given_up;
      l.level = (int)imax(l.level, part.level);
    }
    if (l.given_up) continue;
    l.filter(s.q[b].least(l.best));
    for (int64_t i = 1; i < s.parts; i++) {
      List& part = s.lists[i * B + b];
      part.filter(s.q[b].least(l.best));
      for (int64_t j = 0; j < part.count; j++)
        if (!l.push(part.e[j].n, part.e[j].up)) return kNoMemory;
    }
  }
  return kDone;
}

static int write_lists(const ScanCall& s, ScanResult& out) {
  const int64_t B = s.in->b;
  const double log_n = __builtin_log(s.N / s.bound->eps);
  out.start[0] = 0;
  for (int64_t b = 0; b < B; b++) {
    const List& l = s.lists[b];
    const bool given_up = !s.q[b].active || l.given_up || !(l.best > -kInf) ||
                          l.count > (1 + READING_COST) * s.bound->most_listed;
    out.start[b + 1] = out.start[b] + (given_up ? 0 : l.count);
    out.level[b] = given_up ? 0 : imax(1, l.level);
    out.threshold[b] = given_up ? __builtin_nan("") : l.best / s.q[b].scale - log_n;
  }
  out.index = (int64_t*)malloc(imax(1, out.start[B]) * sizeof(int64_t));
  if (!out.index) return kNoMemory;
  for (int64_t b = 0; b < B; b++)
    for (int64_t j = 0; j < out.start[b + 1] - out.start[b]; j++)
      out.index[out.start[b] + j] = s.lists[b].e[j].n;
  return kDone;
}

static int scan_all(ScanCall& s, ScanResult& out, int threads) {
  const LogitBounds& in = *s.bound;
  const int64_t B = s.in->b;
  double y2 = 0, c = 0, b_max = 0;
  for (int64_t n = 0; n < s.N; n++) y2 = dmax(y2, s.rows->sq_norms[n]);
  for (int64_t d = 0; d < s.D; d++) c += s.rows->center[d] * s.rows->center[d];
  for (int64_t n = 0; !s.no_bias && n < s.N; n++) {
    const double v = s.in->bias[n];
    b_max = !(v < kInf) ? kInf : v > -kInf ? dmax(b_max, __builtin_fabs(v)) : b_max;
  }
  const int64_t fine = s.K - s.k0, W = Vec<float>::W, NR = 2 * W;
  Arena arena, work;
  if (!arena.reserve(Arena::bytes<ScanQuery>(B) + Arena::bytes<Noise>(B) + Arena::bytes<double>(B) +
                     Arena::bytes<int64_t>(B) + Arena::bytes<int64_t>(B / NR + 2)))
    return kNoMemory;
  s.q = arena.take<ScanQuery>(B);
  s.expected = arena.take<double>(B);
  Noise* all = arena.take<Noise>(B);
  s.order = arena.take<int64_t>(B);
  s.begin = arena.take<int64_t>(B / NR + 2);
  s.y_max = __builtin_sqrt(y2);
  int64_t active = 0;
  for (int64_t b = 0; b < B; b++) {
    s.q[b] = scan_query(s, b, s.y_max, __builtin_sqrt(c), b_max);
    s.expected[b] = 0;
    if (s.q[b].active) all[active++] = {s.q[b].scale / (s.q[b].a * s.q[b].a), b};
  }
  qsort((void*)all, active, sizeof(Noise), noisier);
  const int64_t fewest = imax((active + SCAN_B - 1) / SCAN_B, imax(1, imin(threads, active / NR)));
  s.lanes = imax(W, round_up((active + fewest - 1) / fewest, active > NR ? NR : W));
  const bool alike = form_blocks(s, all, active, s.lanes);
  s.parts = (alike && s.blocks % threads == 0) || s.blocks >= 4 * threads ? 1 : threads;
  s.NT = round_up(imin(SCAN_CHUNK_BYTES / 4 / s.lanes, (s.N + s.parts - 1) / s.parts), ROW_UNIT);
  s.chunks = (s.N + s.NT - 1) / s.NT;
  s.parts = imin(s.parts, s.chunks);
  s.lists = (List*)calloc(imax(1, B * s.parts), sizeof(List));
  const int64_t most_blocks = active / NR + 1;  // without the queries that are given up there may be more
  if (!s.lists ||
      !work.reserve(Arena::bytes<uint8_t>(most_blocks * s.chunks) + Arena::bytes<uint8_t>(s.chunks) +
                    Arena::bytes<float>(SAMPLE_ROWS * s.stride) +
                    Arena::bytes<float>(most_blocks * s.parts * fine) +
                    Arena::bytes<float>(B * s.parts * fine)))
    return kNoMemory;
  s.level = work.take<uint8_t>(most_blocks * s.chunks);
  s.level_zero = work.take<uint8_t>(s.chunks);
  float* scratch = work.take<float>(most_blocks * s.parts * fine);
  for (int64_t i = 0; i < B * s.parts; i++) {
    s.lists[i].best = -kInf;
    s.lists[i].tried = -1;
  }
  int failed = scan_tasks(s, threads, Phase::kLook, scratch);
  if (failed) return failed;
  if (in.most_listed < s.N && s.N >= 4 * SAMPLE_ROWS) {
    s.sample = work.take<float>(SAMPLE_ROWS * s.stride);
    for (int64_t j = 0; j < SAMPLE_ROWS; j++)
      memcpy((void*)(s.sample + j * s.stride), in.coarse + s.sampled(j) * s.stride, s.stride * sizeof(float));
    failed = scan_tasks(s, threads, Phase::kSample, scratch);
    if (failed) return failed;
    give_up(s);
    form_blocks(s, all, active, s.lanes);
  }
  failed = scan_tasks(s, threads, Phase::kScan, scratch);
  if (!failed) failed = join_lists(s, threads, work.take<float>(s.parts * B * fine));
  if (!failed) failed = full_level(s, threads);
  return failed ? failed : write_lists(s, out);
}

static int run_bound_scan(const Rows& rows, const Queries& in, const LogitBounds& bound, ScanResult& out,
                          int threads) {
  out.index = nullptr;
  out.start[0] = 0;
  if (in.b == 0) return kDone;
  CentredRows<float> centred;
  if (!centred.prepare(rows, nullptr, false)) return kNoMemory;
  ScanCall s;
  memset((void*)&s, 0, sizeof s);
  s.rows = &rows;
  s.in = &in;
  s.bound = &bound;
  s.src = centred.src;
  s.src_f64.rows = rows;
  s.exact = exact_for(s.src);
  s.exact_f64 = exact_for(s.src_f64);
  s.full_product = full_product_for(rows.type);
  s.N = rows.n;
  s.D = rows.d;
  s.last_level = bound.levels - 1;
  s.k0 = bound.dims[0];
  s.K = bound.dims[s.last_level];
  s.bands = bound.bands;
  s.stride = s.k0 + s.bands + 1;
  s.no_bias = in.bias == nullptr;
  const int failed = scan_all(s, out, threads);
  for (int64_t i = 0; s.lists && i < s.parts * in.b; i++) free(s.lists[i].e);
  free(s.lists);
  return failed;
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
