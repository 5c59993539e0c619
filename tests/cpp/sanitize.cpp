// Every kernel, on problems of awkward sizes in memory of exactly their size, for AddressSanitizer,
// UndefinedBehaviorSanitizer and ThreadSanitizer to watch (`make sanitize-cpu`).
//
// The arguments SHARE OF leave every OF-th problem, from number SHARE on. MEMOKERN_TABLE names the kernels.
// That the values are right is for other tests. Here it is checked that one thread and three find about the
// same, that a scan lists the nearest row, and that a call can be stopped wherever it asks.
#include <string>
#include <vector>

#include "problem.h"

namespace memokern {
const Table* table_avx2w16();
}

// A list of numbers that a run has written, to be compared with that of another.
typedef std::vector<double> Results;
static void take(Results& to, double* from, int64_t n) { to.insert(to.end(), from, from + n); }
template <class T>
static void take_array(Results& to, Array<T>& from) {
  for (int64_t i = 0; i < from.n; i++) to.push_back((double)from[i]);
}
struct Vectors {  // float or double, as the queries are
  Doubles wide;
  Array<float> narrow;
  bool f64;
  Vectors(int64_t n, bool f64) : wide(f64 ? n : 1), narrow(f64 ? 1 : n), f64(f64) {}
  void* data() { return f64 ? (void*)wide.data() : (void*)narrow.data(); }
  void take(Results& to) { f64 ? take_array(to, wide) : take_array(to, narrow); }
};

// One kernel on one problem: its status, and what it has written.
typedef int (*Kernel)(const Table&, Problem&, Watch*, int threads, Results&);

static int posterior(const Table& table, Problem& p, Watch* watch, int threads, Results& out) {
  Queries q = p.queries;
  q.watch = watch;
  const int64_t b = q.b;
  Vectors mean(b * p.c.d, q.f64), residual(b * p.c.d, q.f64);
  Doubles stats(4 * b);
  const Sums sums = {mean.data(), &stats[0], &stats[b], &stats[2 * b], &stats[3 * b], residual.data()};
  const int status = table.posterior(p.rows, q, sums, threads);
  mean.take(out);
  residual.take(out);
  take_array(out, stats);
  return status;
}

// Each query sees a segment of its own, but for every third, which shares its neighbour's.
static int segments(const Table& table, Problem& p, Watch* watch, int threads, Results& out) {
  Queries q = p.queries;
  q.watch = watch;
  q.conditions = {};
  q.leave_out = nullptr;
  const int64_t b = q.b, N = p.c.n;
  Array<int64_t> first(b), end(b);
  for (int64_t i = 0; i < b; i++) {
    const int64_t k = i % 3 == 2 ? i - 1 : i;
    first[i] = k % N;
    end[i] = k % 2 ? N : first[i] + 1;
  }
  const Segments of = {first.data(), end.data()};
  Vectors mean(b * p.c.d, q.f64), residual(b * p.c.d, q.f64);
  Doubles stats(4 * b);
  const Sums sums = {mean.data(), &stats[0], &stats[b], &stats[2 * b], &stats[3 * b], residual.data()};
  const int status = table.posterior_segments(p.rows, q, of, sums, threads);
  mean.take(out);
  residual.take(out);
  take_array(out, stats);
  return status;
}

static int state(const Table& table, Problem& p, Watch* watch, int threads, Results& out) {
  Queries q = p.queries;
  q.watch = watch;
  const int64_t b = q.b;
  Vectors acc(b * p.c.d, q.f64), residual(b * p.c.d, q.f64);
  Doubles numbers(6 * b), center(p.c.d);
  double* at = numbers.data();
  const States to = {at,         at + b,     at + 2 * b,      at + 3 * b,   at + 4 * b,
                     at + 5 * b, acc.data(), residual.data(), center.data()};
  const int status = table.posterior_state(p.rows, q, to, threads);
  take(out, at, b);  // keys: m, s and acc depend on where the sums began
  return status;
}

// Gradients, dense or over lists, from sums that a forward call has made or that are merely numbers.
static int gradients(const Table& table, Problem& p, Watch* watch, int threads, Results& out, bool listed) {
  Queries q = p.queries;
  q.watch = watch;
  const int64_t b = q.b, D = p.c.d;
  const int64_t k = listed ? 0 : p.c.conditions;
  Doubles mean(b * D), stats(4 * b), g(b * D), ones(b), numbers(3 * b), grad_bias(p.c.n), grad_c(b * k),
      grad_h(b);
  for (int64_t i = 0; i < b * D; i++) g[i] = std::sin((double)i);
  for (int64_t i = 0; i < b; i++) ones[i] = 1;
  const SumsIn given = {g.data(), ones.data(), ones.data(), ones.data(), ones.data()};
  Vectors x(b * D, q.f64);
  const Gradients to = {x.data(),
                        &numbers[0],
                        &numbers[b],
                        &numbers[2 * b],
                        p.c.bias ? grad_bias.data() : nullptr,
                        k ? grad_c.data() : nullptr,
                        k ? grad_h.data() : nullptr};
  int status;
  if (listed) {
    Array<int64_t> start(b + 1);
    std::vector<int64_t> list;
    for (int64_t i = 0; i <= b; i++) {
      start[i] = (int64_t)list.size();
      for (int64_t n = 0; i < b && n < p.c.n; n += 1 + i % 2) list.push_back(n);
    }
    Array<int64_t> index((int64_t)list.size());
    std::memcpy(index.data(), list.data(), list.size() * sizeof(int64_t));
    const RowLists lists = {start.data(), index.data(), index.n};
    Vectors narrow_mean(b * D, q.f64), residual(b * D, q.f64);
    const Sums sums = {narrow_mean.data(), &stats[0],     &stats[b],
                       &stats[2 * b],      &stats[3 * b], residual.data()};
    status = table.posterior_listed(p.rows, q, lists, sums, threads);
    narrow_mean.take(out);
    take_array(out, stats);
    if (!status) status = table.posterior_listed_backward(p.rows, q, lists, given, to, threads);
  } else {
    Problem wide(p.c);  // its sums in double; the queries are the same
    Vectors narrow_mean(b * D, q.f64), residual(b * D, q.f64);
    const Sums sums = {narrow_mean.data(), &stats[0],     &stats[b],
                       &stats[2 * b],      &stats[3 * b], residual.data()};
    status = table.posterior(p.rows, p.queries, sums, 1);
    for (int64_t i = 0; i < b * D; i++) mean[i] = q.f64 ? narrow_mean.wide[i] : narrow_mean.narrow[i];
    const SumsIn forward = {mean.data(), &stats[0], &stats[b], &stats[2 * b], &stats[3 * b]};
    if (!status) status = table.posterior_backward(p.rows, q, forward, given, to, threads);
  }
  x.take(out);
  take_array(out, numbers);
  if (p.c.bias) take_array(out, grad_bias);
  if (k) take_array(out, grad_c);
  if (k) take_array(out, grad_h);
  return status;
}
static int backward(const Table& table, Problem& p, Watch* watch, int threads, Results& out) {
  return gradients(table, p, watch, threads, out, false);
}
static int listed(const Table& table, Problem& p, Watch* watch, int threads, Results& out) {
  return gradients(table, p, watch, threads, out, true);
}

static int nearest(const Table& table, Problem& p, Watch* watch, int threads, Results& out) {
  Queries q = p.queries;
  q.watch = watch;
  Doubles dist(q.b * p.c.k);
  Array<int64_t> index(q.b * p.c.k);
  const int status = table.nearest(p.rows, q, {dist.data(), index.data(), p.c.k}, threads);
  take_array(out, dist);
  take_array(out, index);
  return status;
}

// Blocks of rows as they lie, and of panels, with the boxes that hold them: [2][numbers] of each.
static void fill_boxes(Array<float>& coarse, int64_t n, int64_t stride, int64_t single, int64_t k0,
                       int64_t rows, Array<float>& boxes) {
  const int64_t box = single + (k0 > single) + stride - 1 - k0;
  for (int64_t block = 0; block * rows < n; block++) {
    for (int64_t k = 0; k < box; k++) {
      double low = INFINITY, high = -INFINITY;
      for (int64_t i = block * rows; i < std::min(n, (block + 1) * rows); i++) {
        const float* y = coarse.data() + i * stride;
        double v = 0;
        if (k < single)
          v = y[k];
        else if (k0 > single && k == single)
          for (int64_t j = single; j < k0; j++) v = std::hypot(v, y[j]);
        else
          v = y[k0 + k - single - (k0 > single)];
        low = std::min(low, v);
        high = std::max(high, v);
      }
      float* at = boxes.data() + (block / kPanelBlocks * box + k) * 2 * kPanelBlocks + block % kPanelBlocks;
      at[0] = (float)(low - 1e-6 * std::fabs(low));
      at[kPanelBlocks] = (float)(high + 1e-6 * std::fabs(high));
    }
  }
}

// An index whose coordinates are the features themselves: levels, bands between them, and the rest.
static int scan(const Table& table, Problem& p, Watch* watch, int threads, Results& out) {
  const int64_t D = p.c.d, K[] = {D / 4, D / 2, D / 2 + D / 8}, first[] = {0, 1, 2},
                edge[] = {K[0], K[1], K[2], D};
  const int64_t bands = 3, stride = K[0] + bands + 1, fine = K[2] - K[0], b = p.c.b, n = p.c.n;
  const bool half = p.c.n % 2 == 0;
  Array<float> coarse(n * stride), fine32(half ? 1 : n * fine), z(b * K[2]), norms(b * (bands + 1));
  Array<uint16_t> fine16(half ? n * fine : 1);
  Doubles margin(b), sq(b), threshold(b);
  const auto norm = [](const double* v, int64_t from, int64_t to) {
    double sum = 0;
    for (int64_t i = from; i < to; i++) sum += v[i] * v[i];
    return std::sqrt(sum);
  };
  Doubles v(D);
  double longest = 0;
  for (int64_t i = 0; i < n; i++) {
    for (int64_t j = 0; j < D; j++) v[j] = p.y[i * D + j] - p.center[j];
    double lost = 0;
    for (int64_t j = 0; j < K[0]; j++) coarse[i * stride + j] = (float)v[j];
    for (int64_t e = 0; e < bands; e++)
      coarse[i * stride + K[0] + e] = (float)(norm(v.data(), edge[e], edge[e + 1]) * (1 + 1e-6));
    for (int64_t j = K[0]; j < K[2]; j++) {
      if (!half) {
        fine32[i * fine + j - K[0]] = (float)v[j];
        continue;
      }
      int e;  // rounded towards 0 to 11 bits
      const double m = std::frexp(std::fabs(v[j]), &e), kept = std::floor(m * 2048);
      const bool tiny = m == 0 || e < -13;
      fine16[i * fine + j - K[0]] =
          (uint16_t)((v[j] < 0 ? 1 << 15 : 0) | (tiny ? 0 : ((e + 14) << 10) + ((int)kept - 1024)));
      lost += std::pow(std::fabs(v[j]) - (tiny ? 0 : std::ldexp(kept, e - 11)), 2);
    }
    coarse[i * stride + K[0] + bands] = (float)(std::sqrt(lost) * (1 + 1e-6) + 1e-5);
    longest = std::max(longest, norm(v.data(), 0, D));
  }
  for (int64_t i = 0; i < b; i++) {
    for (int64_t j = 0; j < D; j++)
      v[j] = (p.c.f64 ? p.x64[i * D + j] : (double)p.x32[i * D + j]) - p.alpha[i] * p.center[j];
    for (int64_t j = 0; j < K[2]; j++) z[i * K[2] + j] = (float)v[j];
    for (int64_t e = 0; e < bands; e++)
      norms[i * (bands + 1) + e] = (float)(norm(v.data(), edge[e], edge[e + 1]) * (1 + 1e-6));
    const double size = norm(v.data(), 0, D);
    norms[i * (bands + 1) + bands] = (float)(size * (1 + 1e-6));
    margin[i] = size < 1e15 ? 1e-4 * size * longest : INFINITY;
    sq[i] = size * size;
  }
  Rows rows = p.rows;
  rows.center = p.center.data();
  rows.sq_norms = p.sq_norms.data();
  Queries q = p.queries;
  q.watch = watch;
  const int64_t blocks = (n + kBlockRows - 1) / kBlockRows,
                panels = (blocks + kPanelBlocks - 1) / kPanelBlocks,
                groups = (panels + kPanelBlocks - 1) / kPanelBlocks,
                single = std::min<int64_t>(K[0], kBoxCoordinates), box = single + (K[0] > single) + bands;
  Array<float> boxes(panels * box * 2 * kPanelBlocks), hulls(groups * box * 2 * kPanelBlocks), minus_half(n);
  for (int64_t i = 0; i < boxes.n; i++) boxes.data()[i] = INFINITY;
  for (int64_t i = 0; i < hulls.n; i++) hulls.data()[i] = INFINITY;
  Array<int32_t> order(n);
  double excess = 0;
  for (int64_t i = 0; i < n; i++) {
    double sum = 0;
    for (int64_t k = 0; k + 1 < stride; k++) sum += std::pow((double)coarse[i * stride + k], 2);
    excess = std::max(excess, sum - p.sq_norms[i]);
    order[i] = (int32_t)i;
    minus_half[i] = (float)(-0.5 * p.sq_norms[i]);
  }
  fill_boxes(coarse, n, stride, single, K[0], kBlockRows, boxes);
  fill_boxes(coarse, n, stride, single, K[0], kBlockRows * kPanelBlocks, hulls);
  const bool in_blocks = b % 3 != 0;
  const LogitBounds known = {coarse.data(),
                             half ? (const void*)fine16.data() : (const void*)fine32.data(),
                             half,
                             z.data(),
                             norms.data(),
                             margin.data(),
                             sq.data(),
                             K,
                             first,
                             3,
                             bands,
                             1e-6,
                             p.c.n > 1000 ? n / 8 : n,
                             2,
                             in_blocks ? order.data() : nullptr,
                             coarse.data(),
                             minus_half.data(),
                             boxes.data(),
                             hulls.data(),
                             excess};
  Array<int64_t> start(b + 1), level(b);
  ScanResult found = {start.data(), threshold.data(), level.data(), nullptr};
  const int status = table.bound_scan(rows, q, known, found, threads);
  for (int64_t i = 0; !status && i < b; i++) {
    if (level[i] == 0) continue;  // given up
    int64_t best = 0;
    double least = INFINITY, r2;
    for (int64_t j = 0; j < n; j++) {
      r2 = 0;
      for (int64_t d = 0; d < D; d++)
        r2 += std::pow((p.c.f64 ? p.x64[i * D + d] : (double)p.x32[i * D + d]) - p.alpha[i] * p.y[j * D + d],
                       2);
      r2 = r2 / (2 * p.sigma[i] * p.sigma[i]) - (p.c.bias ? p.bias[j] : 0);
      if (r2 < least) best = j;
      least = std::min(least, r2);
    }
    bool listed = false;
    for (int64_t j = start[i]; j < start[i + 1]; j++) listed |= found.index[j] == best;
    if (!listed) fail("the best row is not listed", p.c, table);
  }
  std::free(found.index);
  if (status) return status;
  // The same and the sums in one call; the lists may differ with the number of threads.
  Vectors mean(b * D, q.f64), residual(b * D, q.f64);
  Doubles stats(4 * b);
  const Sums sums = {mean.data(), &stats[0], &stats[b], &stats[2 * b], &stats[3 * b], residual.data()};
  const SplitCosts costs = {1, n / 4.0, n / 8.0};
  Array<int64_t> count(b);
  const Pruned to = {threshold.data(), level.data(), count.data()};
  const int done =
      table.posterior_pruned(rows, q, nullptr, known, b % 2 ? &costs : nullptr, sums, to, threads);
  for (int64_t i = 0; !done && i < b; i++)
    if (level[i] > 0 && !(stats[i] > -INFINITY)) fail("a pruned query has no sums", p.c, table);
  return done;
}

// Queries to the coordinates of a cosine transform of D features as images; D is a multiple of 4.
static int project(const Table& table, Problem& p, Watch* watch, int threads, Results& out) {
  const int64_t C = p.c.n % 2 ? 1 : 2, H = p.c.d / C / 2, W = 2, D = C * H * W, b = p.c.b, bands = 2;
  const auto cosines = [](int64_t n) {
    Array<float> m(n * n);
    for (int64_t f = 0; f < n; f++)
      for (int64_t i = 0; i < n; i++)
        m[f * n + i] = (float)(std::sqrt((f ? 2.0 : 1.0) / n) * std::cos(M_PI * (i + 0.5) * f / n));
    return m;
  };
  Array<float> turn = cosines(C), down = cosines(H), across = cosines(W), center(D), x(b * D);
  Array<int64_t> box(2 * C), edges(bands + 1);
  const int64_t high = std::max<int64_t>(1, H - 1), tall = (high + 15) / 16 * 16, size = C * high * W;
  Array<int32_t> place(size);
  int64_t k = 0;
  for (int64_t c = 0; c < C; c++) {
    box[2 * c] = high;
    box[2 * c + 1] = W;
    for (int64_t a = 0; a < W; a++)
      for (int64_t r = 0; r < high; r++) place[k++] = (int32_t)((c * W + a) * tall + r);
  }
  edges[0] = size / 2;
  edges[1] = size;
  edges[2] = D;
  for (int64_t j = 0; j < D; j++) center[j] = (float)p.center[j];
  for (int64_t i = 0; i < b; i++)
    for (int64_t j = 0; j < D; j++)
      x[i * D + j] = p.c.f64 ? (float)p.x64[i * p.c.d + j] : p.x32[i * p.c.d + j];
  Doubles weights(12), margin(b), sq(b);
  for (int i = 0; i < 12; i++) weights[i] = i < 2 ? 1 : 1e-6;
  const CosineTransform t = {C,
                             H,
                             W,
                             p.c.b % 2 == 0,
                             turn.data(),
                             down.data(),
                             across.data(),
                             box.data(),
                             C * W * tall,
                             place.data(),
                             size,
                             size / 2,
                             edges.data(),
                             bands,
                             center.data(),
                             weights.data(),
                             1e15};
  Array<float> z(b * t.kept), norms(b * (bands + 1));
  const int status = table.project(t, x.data(), p.alpha.data(), b,
                                   {z.data(), norms.data(), margin.data(), sq.data()}, watch, threads);
  take_array(out, z);
  take_array(out, norms);
  return status;
}

static bool alike(double a, double b) {
  if (a != a || b != b) return (a != a) == (b != b);
  return a == b || std::fabs(a - b) <= 1e-2 * (1 + std::fabs(a) + std::fabs(b)) || std::fabs(a) > 1e18;
}

static void check(const Table& table, const Case& c) {
  const struct {
    const char* name;
    Kernel run;
    bool takes;
  } kernels[] = {{"posterior", posterior, true},
                 {"posterior_segments", segments, true},
                 {"posterior_state", state, true},
                 {"posterior_backward", backward, true},
                 {"nearest", nearest, true},
                 {"posterior_listed", listed, c.weighting == kGaussian},
                 {"bound_scan", scan, c.weighting == kGaussian && c.d >= 16},
                 {"project", project, c.d % 4 == 0}};
  for (const auto& kernel : kernels) {
    if (!kernel.takes) continue;
    Problem p(c);
    Results one, three, stopped;
    Stopper never(1L << 60);
    if (kernel.run(table, p, &never, 1, one) || kernel.run(table, p, nullptr, 3, three))
      fail(kernel.name, c, table);
    for (size_t i = 0; i < one.size(); i++)
      if (!alike(one[i], three[i])) fail((std::string(kernel.name) + " on three threads").c_str(), c, table);
    for (long at = 1; at <= never.asked; at += 1 + never.asked / 3) {
      Stopper stopper(at);
      if (!(kernel.run(table, p, &stopper, 1, stopped) & kStopped))
        fail((std::string(kernel.name) + " does not stop").c_str(), c, table);
    }
    Stopper first(1);  // whether any of three threads asks depends on how they share the work
    if (kernel.run(table, p, &first, 3, stopped) & ~kStopped) fail(kernel.name, c, table);
  }
}

int main(int argc, char** argv) {
  const Table* table = MEMOKERN_TABLE();
  const int share = argc > 2 ? std::atoi(argv[1]) : 0, of = argc > 2 ? std::atoi(argv[2]) : 1;
  std::vector<Case> cases;
  int i = 0;
  for (int type : {kF32, kU8, kBF16, kF16, kF64})
    for (int64_t d : {1, 3, 5, 8, 17, 36, 64, 100, 300})
      for (int64_t b : {1, 5, 12, 37}) {
        i++;
        const int64_t n = (const int64_t[]){1, 2, 13, 50, 131, 300}[i % 6];
        const double sigma = (const double[]){0.3, 0, 1e-3, 2, 1e-30}[i % 5];
        cases.push_back({n, d, b, std::min<int64_t>(n, (const int64_t[]){1, 3, 40, 300}[i % 4]), type,
                         type == kF64 || i % 8 == 3, i % 3 == 0 && n > 6, i % 2 == 0,
                         i % 11 == 5 ? kLog : kGaussian, sigma, i % 4 == 1 ? 3 : 0,
                         i % 3 == 1 ? 1 + i % 4 : 0});
      }
  // Long enough for samples, further levels and full products of a scan, and for nearest to run out of room.
  for (int type : {kF32, kU8, kF16})
    for (int64_t b : {3, 40})
      cases.push_back({1300, 48, b, 9, type, false, b == 3, true, kGaussian, 0.2, 0, 0});
  cases.push_back({2500, 3, 60, 30, kF32, false, false, true, kGaussian, 0.5, 0, 0});
  // More than one block of queries, over rows of several tiles and of one.
  cases.push_back({300, 260, 270, 2, kF32, false, true, false, kGaussian, 1, 0, 2});
  cases.push_back({60, 20, 600, 2, kBF16, true, false, true, kGaussian, 1, 0, 2});
  // Rows of bytes in integers: a whole panel of queries and a half, features beyond whole vectors.
  cases.push_back({600, 261, 23, 3, kU8, false, false, true, kGaussian, 0.05, 0, 0});
  cases.push_back({600, 300, 40, 3, kU8, false, true, false, kGaussian, 2, 3, 0});
  int ran = 0;
  for (size_t j = share; j < cases.size(); j += of, ran++) check(*table, cases[j]);
  std::printf("%s: %d problems\n", table->name, ran);
  return 0;
}
