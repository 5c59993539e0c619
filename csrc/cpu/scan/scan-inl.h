// bound_scan: the rows that can matter to each query. bounds-inl.h says why no other row can.
//
// Three phases, each a set of tasks (a block of queries and a range of rows): a first look finds a good row
// for each query, so that the lists hold little in vain from the first row on; a sample of rows shows which
// lists would be too long, and these queries are given up; the scan proper makes the lists. Lists whose rows
// have not passed the levels of the index by then pass them, row by row; and at last all pass the full level
// (full_level-inl.h).
//
// Where the index has blocks of rows (blocks-inl.h), the first look is by them, and so is the scan proper of
// queries to which few of them are left (block_scan-inl.h).
#pragma once
#include "cpu/scan/block_scan-inl.h"
#include "cpu/scan/group-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

enum class Phase { kLook, kSample, kScan };

// Runs all tasks of a phase. Then every part knows the best row that any of them found. scratch has K - k0
// numbers for each thread.
static int scan_tasks(const ScanCall& s, int threads, Phase phase, float* scratch) {
  const int64_t parts = phase == Phase::kSample ? 1 : s.parts;
  const int failed = for_parts(threads, s.blocks * parts, [&](int64_t i, int worker) {
    const int64_t block = i / parts, part = i % parts;
    const int64_t c0 = s.chunks * part / s.parts, c1 = s.chunks * (part + 1) / s.parts;
    float* own = scratch + worker * (s.K - s.k0);
    ScanTask t;
    if (!t.reserve(s)) return (int)kNoMemory;
    if (t.pace.ask()) return (int)kStopped;  // a task may be too short to ask on its way
    t.load_block(block, s.lists + part * s.in->b);
    if (phase == Phase::kLook && s.in_blocks)
      look_at_blocks(t, part);
    else if (phase == Phase::kLook)
      first_look(t, c0 * s.NT, imin(s.N, c1 * s.NT));
    else if (phase == Phase::kSample)
      sample_lists(t, own);
    else if (by_blocks(s, block))
      scan_blocks(t, part, own);
    else
      scan_chunks(t, c0, c1, own);
    return t.failed;
  });
  if (phase == Phase::kLook) return failed ? failed : consider_found(s, threads);
  for (int64_t b = 0; b < s.in->b; b++) {
    double best = -kInf;
    for (int64_t j = 0; j < s.parts; j++) best = dmax(best, s.lists[j * s.in->b + b].best);
    for (int64_t j = 0; j < s.parts; j++) s.lists[j * s.in->b + b].best = best;
  }
  return failed;
}

static int later_row(const void* a, const void* b) {
  const uint32_t x = ((const Entry*)a)->n, y = ((const Entry*)b)->n;
  return x < y ? -1 : x > y;
}
// Puts a list in ascending order, which blocks of rows are not.
static void sort_rows(List& l) {
  bool ascend = true;
  for (int64_t j = 1; j < l.count; j++) ascend &= l.e[j - 1].n < l.e[j].n;
  if (!ascend) qsort((void*)l.e, l.count, sizeof(Entry), later_row);
}

// Passes the lists of all parts through the levels that they have not passed, and joins the parts of each
// list in the first.
static int join_lists(ScanCall& s, int threads, float* scratch) {
  enum { LISTS = 4 };  // of a part
  const int64_t B = s.in->b, fine = s.K - s.k0, all = s.parts * B;
  const int failed = for_parts(threads, (all + LISTS - 1) / LISTS, [&](int64_t i, int worker) {
    for (int64_t t = i * LISTS; t < imin(all, (i + 1) * LISTS); t++) {
      List& l = s.lists[t];
      const int64_t b = t % B;
      Pace pace = {s.in->watch, 0};
      if (l.given_up || l.count == 0 || !s.q[b].active) continue;
      if (pace.ask()) return (int)kStopped;
      l.filter(s.q[b].least(l.best));
      pass_levels(s, b, l, scratch + worker * fine);
    }
    return (int)kDone;
  });
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
    if (s.in_blocks) sort_rows(l);
  }
  return kDone;
}

// What was found of each query, but the rows themselves.
static void write_starts(const ScanCall& s, const ScanResult& out) {
  const double log_n = __builtin_log(s.N / s.bound->eps);
  out.start[0] = 0;
  for (int64_t b = 0; b < s.in->b; b++) {
    const List& l = s.lists[b];
    const bool given_up = !s.q[b].active || l.given_up || !(l.best > -kInf) ||
                          (double)l.count > (1 + s.bound->reading) * (double)s.bound->most_listed;
    out.start[b + 1] = out.start[b] + (given_up ? 0 : l.count);
    out.level[b] = given_up ? 0 : imax(1, l.level);
    out.threshold[b] = given_up ? __builtin_nan("") : l.best / s.q[b].scale - log_n;
  }
}
static void write_rows(const ScanCall& s, const int64_t* start, int64_t* index) {
  for (int64_t b = 0; b < s.in->b; b++)
    for (int64_t j = 0; j < start[b + 1] - start[b]; j++) index[start[b] + j] = s.lists[b].e[j].n;
}

static double largest_of(const double* v, int64_t n) {  // at least 0
  enum { W = Vec<double>::W };
  Vec<double>::T m[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int j = 0; j < 4; j++) m[j] = vmax(load(v + i + j * W), m[j]);
  double most = 0;
  for (int j = 0; j < 4; j++)
    for (int e = 0; e < W; e++) most = dmax(most, m[j][e]);
  for (; i < n; i++) most = dmax(most, v[i]);
  return most;
}

// A scan, with its memory.
struct Scan {
  ScanCall s;
  CentredRows<float> centred;
  Arena arena, work;
  Scan() { memset((void*)&s, 0, sizeof s); }
  ~Scan() {
    for (int64_t i = 0; s.lists && i < s.parts * s.in->b; i++) free(s.lists[i].e);
    free(s.lists);
  }
  bool prepare(const Rows& rows, const Queries& in, const LogitBounds& bound);
  int run(int threads);

 private:
  Scan(const Scan&);
  // Queries of a block, and parts of the rows, of about WORK_PER_THREAD multiplications.
  void choose_shapes(int64_t active, int threads) {
    enum { W = Vec<float>::W, NR = 2 * W };
    const int64_t fewest = imax(1, (active + SCAN_B - 1) / SCAN_B);
    s.lanes = imax(W, round_up((active + fewest - 1) / fewest, active > NR ? NR : W));
    const double work = (double)s.N * s.lanes * (s.stride + LOOK_COORDINATES);
    const int64_t wanted = (2 * threads + fewest - 1) / fewest;
    s.parts = threads == 1 ? 1 : imax(1, imin(wanted, (int64_t)(work / WORK_PER_THREAD)));
    s.NT = round_up(imin(SCAN_CHUNK_BYTES / 4 / s.lanes, (s.N + s.parts - 1) / s.parts), ROW_UNIT);
    s.chunks = (s.N + s.NT - 1) / s.NT;
    s.parts = imin(s.parts, s.chunks);
  }
};

bool Scan::prepare(const Rows& rows, const Queries& in, const LogitBounds& bound) {
  if (!centred.prepare(rows, nullptr, false)) return false;
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
  s.in_blocks = bound.order && s.no_bias;
  s.all_blocks = (s.N + kBlockRows - 1) / kBlockRows;
  s.panels = (s.all_blocks + kPanelBlocks - 1) / kPanelBlocks;
  s.box = box_numbers(s.k0, s.bands);
  return true;
}

// Afterwards the lists have all rows that are left to each query.
int Scan::run(int threads) {
  const LogitBounds& in = *s.bound;
  const int64_t B = s.in->b;
  double c = 0, b_max = 0;
  for (int64_t d = 0; d < s.D; d++) c += s.rows->center[d] * s.rows->center[d];
  for (int64_t n = 0; !s.no_bias && n < s.N; n++) {
    const double v = s.in->bias[n];
    b_max = !(v < kInf) ? kInf : v > -kInf ? dmax(b_max, __builtin_fabs(v)) : b_max;
  }
  const int64_t fine = s.K - s.k0;
  const int64_t boxed = s.in_blocks ? B : 0;
  if (!arena.reserve(Arena::bytes<ScanQuery>(B) + Arena::bytes<Noise>(B) + Arena::bytes<double>(B) +
                     2 * Arena::bytes<int64_t>(B + 2) + Arena::bytes<float>(boxed * s.box) +
                     Arena::bytes<double>(boxed) + Arena::bytes<float>(boxed) +
                     Arena::bytes<int64_t>(boxed * LOOK_MORE)))
    return kNoMemory;
  s.q = arena.take<ScanQuery>(B);
  s.w = arena.take_raw<float>(boxed * s.box);
  s.box_q = arena.take<double>(boxed);
  s.left = arena.take<float>(boxed);
  s.next = arena.take_raw<int64_t>(boxed * LOOK_MORE);
  s.expected = arena.take<double>(B);
  Noise* all = arena.take<Noise>(B);
  s.order = arena.take<int64_t>(B + 2);
  s.begin = arena.take<int64_t>(B + 2);
  s.y_max = __builtin_sqrt(largest_of(s.rows->sq_norms, s.N));
  int64_t active = 0;
  for (int64_t b = 0; b < B; b++) {
    s.q[b] = scan_query(s, b, s.y_max, __builtin_sqrt(c), b_max);
    s.expected[b] = 0;
    if (s.in_blocks) s.box_q[b] = box_query(s, b, s.w + b * s.box);
    if (s.q[b].active) all[active++] = {s.q[b].scale / (s.q[b].a * s.q[b].a), b};
  }
  qsort((void*)all, active, sizeof(Noise), noisier);
  choose_shapes(active, threads);
  form_blocks(s, all, active, s.lanes);
  s.lists = (List*)calloc(imax(1, B * s.parts), sizeof(List));
  if (!s.lists ||
      !work.reserve(Arena::bytes<float>(SAMPLE_ROWS * s.stride) + Arena::bytes<float>(threads * fine)))
    return kNoMemory;
  float* scratch = work.take_raw<float>(threads * fine);
  for (int64_t i = 0; i < B * s.parts; i++) {
    s.lists[i].best = -kInf;
    s.lists[i].tried = s.lists[i].found = -1;
    s.lists[i].guess = (float)-kInf;
  }
  int failed = scan_tasks(s, threads, Phase::kLook, scratch);
  if (failed) return failed;
  bool sampled = false;
  for (int64_t i = 0; i < s.count; i++) sampled |= s.may_be_long(s.order[i]);
  if (sampled && in.most_listed < s.N && s.N >= 4 * SAMPLE_ROWS) {
    s.sample = work.take_raw<float>(SAMPLE_ROWS * s.stride);
    for (int64_t j = 0; j < SAMPLE_ROWS; j++)
      memcpy((void*)(s.sample + j * s.stride), in.coarse + s.sampled(j) * s.stride, s.stride * sizeof(float));
    failed = scan_tasks(s, threads, Phase::kSample, scratch);
    if (failed) return failed;
    give_up(s);
    form_blocks(s, all, active, s.lanes);
  }
  failed = scan_tasks(s, threads, Phase::kScan, scratch);
  if (!failed) failed = join_lists(s, threads, scratch);
  return failed ? failed : full_level(s, threads);
}

// The work of a scan in multiplications, at least; with blocks of rows, about half of what it would be if all
// blocks were left.
static double scan_work(const Rows& rows, const Queries& in, const LogitBounds& bound) {
  const int64_t lanes = round_up(in.b, (int64_t)Vec<float>::W);
  const double all = (double)rows.n * lanes * (bound.dims[0] + bound.bands + LOOK_COORDINATES);
  return bound.order ? all / 2 : all;
}

static int run_bound_scan(const Rows& rows, const Queries& in, const LogitBounds& bound, ScanResult& out,
                          int threads) {
  out.index = nullptr;
  out.start[0] = 0;
  if (in.b == 0) return kDone;
  Scan scan;
  if (!scan.prepare(rows, in, bound)) return kNoMemory;
  const int failed = scan.run(threads_for(threads, scan_work(rows, in, bound)));
  if (failed) return failed;
  write_starts(scan.s, out);
  out.index = (int64_t*)malloc(imax(1, out.start[in.b]) * sizeof(int64_t));
  if (!out.index) return kNoMemory;
  write_rows(scan.s, out.start, out.index);
  return kDone;
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
