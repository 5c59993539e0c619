// The scan, the sums over lists, the nearest rows and the sweep of few features, on the emulator and without
// Python: what tools/sanitize_cuda.py runs under sanitizers. Arrays have exactly their size. Results are
// compared with their definition, so that a kernel which does nothing is no success.
#include <algorithm>

#include "emulator.h"
#include "listed/listed_finish.cu"
#include "listed/listed_pairs.cu"
#include "listed/listed_sum.cu"
#include "listed/listed_weights.cu"
#include "nearest/nearest_about.cu"
#include "nearest/nearest_bound.cu"
#include "nearest/nearest_exact.cu"
#include "plane/plane_finish.cu"
#include "plane/plane_sweep.cu"
#include "scan/scan_begin.cu"
#include "scan/scan_bounds.cu"
#include "scan/scan_end.cu"
#include "scan/scan_list.cu"
#include "scan/scan_refine.cu"
#include "scan/scan_settle.cu"
//
namespace memokern {
namespace cuda {
typedef Stored<MK_ROWS> Numbers;
enum { kType = MK_ROWS };
}  // namespace cuda
}  // namespace memokern
#include "sanitize_rows.h"

struct Problem {
  i64 b, n, d;
  double sigma;
  unsigned seed;
};
constexpr double kAlpha = 0.9, kTemperature = 1.2;

struct Given {
  Data data;
  std::vector<double> bias, sigma, alpha, temperature;
  std::vector<float> x;
  double scale, shift;
};
static Given given_of(const Problem& q) {
  std::mt19937 random(q.seed + 1);
  std::normal_distribution<double> normal;
  Given a;
  a.scale = kType == (int)kU8 ? 2.0 / 255 : 1;
  a.shift = kType == (int)kU8 ? -1 : 0;
  a.data = rows_of(q.n, q.d, a.scale, a.shift, random);
  for (i64 n = 0; n < q.n; n++) a.bias.push_back(n % 5 == 2 ? -INFINITY : 0.1 * normal(random));
  for (i64 i = 0; i < q.b * q.d; i++)
    a.x.push_back((float)(kAlpha * a.data.value[i % (q.n * q.d)] + q.sigma * normal(random)));
  a.sigma.assign(q.b, q.sigma);
  a.alpha.assign(q.b, kAlpha);
  a.temperature.assign(q.b, kTemperature);
  return a;
}
static double square(const Problem& q, const Given& a, i64 b, i64 n, double alpha) {
  double r2 = 0;
  for (i64 d = 0; d < q.d; d++) r2 += std::pow(a.x[b * q.d + d] - alpha * a.data.value[n * q.d + d], 2);
  return r2;
}
static double logit(const Problem& q, const Given& a, i64 b, i64 n) {
  return (a.bias[n] - 0.5 * square(q, a, b, n, kAlpha) / q.sigma / q.sigma) / kTemperature;
}

template <class P>
static P params_of(const Problem& q, const Given& a) {
  P p = {};
  p.rows = a.data.stored.data();
  p.x = a.x.data();
  p.scale = a.scale;
  p.shift = a.shift;
  p.b = q.b;
  p.n = q.n;
  p.d = p.stride = q.d;
  return p;
}
// And with what those are given that weigh rows.
template <class P>
static P weighed_params_of(const Problem& q, const Given& a) {
  P p = params_of<P>(q, a);
  p.bias = a.bias.data();
  p.sigma = a.sigma.data();
  p.alpha = a.alpha.data();
  p.temperature = a.temperature.data();
  return p;
}
// What a posterior has for each query, and where its kernels put it.
struct Outputs {
  std::vector<float> mean, residual;
  std::vector<double> log_z, mean_logit, mean_bias, weight_sq;

  explicit Outputs(const Problem& q)
      : mean(nothing<float>(q.b * q.d)),
        residual(mean),
        log_z(nothing<double>(q.b)),
        mean_logit(log_z),
        mean_bias(log_z),
        weight_sq(log_z) {}

  template <class P>
  void give(P& p) {
    p.mean = mean.data();
    p.residual = residual.data();
    p.log_z = log_z.data();
    p.mean_logit = mean_logit.data();
    p.mean_bias = mean_bias.data();
    p.weight_sq = weight_sq.data();
  }
};
template <class P, void (*kKernel)(const P&)>
static void go(const P& p, i64 blocks, int threads, i64 shared, unsigned seed) {
  emulator::launch(emulator::body<P, kKernel>, &p, (int)blocks, 1, 1, threads, shared, seed);
}

static bool nearest_is_right(const Problem& q, const Given& a) {
  const i64 k = std::min<i64>(q.n, 5), groups = (q.n + kNearRows - 1) / kNearRows, parts = 2;
  const i64 teams = (q.b + kTeam - 1) / kTeam;
  auto about = nothing<float>(q.b * q.n), least = nothing<float>(q.b * groups), most = nothing<float>(q.b);
  auto part_distance = nothing<double>(q.b * parts * k), distance = nothing<double>(q.b * k);
  auto part_index = nothing<i64>(q.b * parts * k), index = nothing<i64>(q.b * k);
  NearestParams p = params_of<NearestParams>(q, a);
  p.about = about.data();
  p.least = least.data();
  p.most = most.data();
  p.part_distance = part_distance.data();
  p.part_index = part_index.data();
  p.distance = distance.data();
  p.index = index.data();
  p.k = k;
  p.parts = parts;
  go<NearestParams, memokern_nearest_about>(p, groups * teams, kNearThreads, about_shared_bytes(), q.seed);
  go<NearestParams, memokern_nearest_bound>(p, q.b, kNearThreads, bound_shared_bytes(), q.seed);
  go<NearestParams, memokern_nearest_exact>(p, q.b * parts, kNearThreads, exact_shared_bytes(), q.seed);
  go<NearestParams, memokern_nearest_join>(p, q.b, kNearThreads, exact_shared_bytes(), q.seed);
  for (i64 b = 0; b < q.b; b++) {
    std::vector<std::pair<double, i64>> all;
    for (i64 n = 0; n < q.n; n++) all.push_back({square(q, a, b, n, 1), n});
    std::sort(all.begin(), all.end());
    for (i64 i = 0; i < k; i++)
      if (index[b * k + i] != all[i].second ||
          !(std::fabs(distance[b * k + i] - all[i].first) <= 1e-12 * all[i].first)) {
        printf("query %lld: neighbour %lld is %lld at %g\n", b, i, index[b * k + i], distance[b * k + i]);
        return false;
      }
  }
  return true;
}

// Every second row, and for the last query none but where it is the only one.
static bool lists_are_right(const Problem& q, const Given& a) {
  std::mt19937 random(q.seed + 7);
  std::normal_distribution<double> normal;
  std::vector<i64> start = {0}, index;
  for (i64 b = 0; b < q.b; b++) {
    for (i64 n = b % 2; n < q.n && (b + 1 < q.b || b == 0); n += 2) index.push_back(n);
    start.push_back((i64)index.size());
  }
  const i64 m = (i64)index.size(), parts = 3, slabs = (q.d + kListThreads - 1) / kListThreads;
  auto r2 = nothing<double>(m), weight = r2, gy = r2, xy = r2, factor = r2, pair_bias = r2;
  auto known = nothing<double>(kListed * q.b), part = nothing<double>(parts * q.b * q.d);
  Outputs out(q);
  auto grad_x = out.mean;
  auto grad_sigma = out.log_z, grad_alpha = grad_sigma, grad_temperature = grad_sigma;
  std::vector<double> grad_mean, zero(q.b, 0.0), grad_log_z(q.b, 0.7);
  for (i64 i = 0; i < q.b * q.d; i++) grad_mean.push_back(normal(random));
  ListedParams p = weighed_params_of<ListedParams>(q, a);
  p.start = start.data();
  p.index = index.data();
  p.r2 = r2.data();
  p.weight = weight.data();
  p.known = known.data();
  p.part = part.data();
  out.give(p);
  p.grad_mean = grad_mean.data();
  p.grad_log_z = grad_log_z.data();
  p.grad_mean_logit = p.grad_mean_bias = p.grad_weight_sq = zero.data();
  p.gy = gy.data();
  p.xy = xy.data();
  p.factor = factor.data();
  p.pair_bias = pair_bias.data();
  p.grad_x = grad_x.data();
  p.grad_sigma = grad_sigma.data();
  p.grad_alpha = grad_alpha.data();
  p.grad_temperature = grad_temperature.data();
  p.m = m;
  p.parts = parts;
  for (p.backward = 0; p.backward < 2; p.backward++) {
    go<ListedParams, memokern_listed_pairs>(p, parts, kListThreads, 0, q.seed);
    go<ListedParams, memokern_listed_weights>(p, q.b, kListThreads, listed_shared_bytes(), q.seed);
    if (p.backward)
      go<ListedParams, memokern_listed_factors>(p, q.b, kListThreads, listed_shared_bytes(), q.seed);
    go<ListedParams, memokern_listed_sum>(p, slabs * q.b * parts, kListThreads, 0, q.seed);
    go<ListedParams, memokern_listed_finish>(p, slabs * q.b, kListThreads, 0, q.seed);
  }
  for (i64 b = 0; b < q.b; b++) {
    double sum = 0, top = -INFINITY, of_h = 0, first = 0, pull = 0;
    std::vector<double> w, h;
    for (i64 i = start[b]; i < start[b + 1]; i++) top = std::fmax(top, logit(q, a, b, index[i]));
    for (i64 i = start[b]; i < start[b + 1]; i++) {
      w.push_back(std::exp(logit(q, a, b, index[i]) - top));
      sum += w.back();
    }
    if (!(sum > 0)) {
      if (!std::isnan(out.mean[b * q.d]) || out.log_z[b] != -INFINITY) return false;
      continue;
    }
    for (size_t i = 0; i < w.size(); i++) {
      const double* const y = &a.data.value[index[start[b] + i] * q.d];
      double of_row = 0;
      for (i64 d = 0; d < q.d; d++) of_row += grad_mean[b * q.d + d] * y[d];
      h.push_back(of_row);
      of_h += w[i] / sum * of_row;
      first += w[i] / sum * y[0];
    }
    for (size_t i = 0; i < w.size(); i++)
      pull += w[i] / sum * (0.7 + (h[i] - of_h) / kTemperature) / q.sigma / q.sigma *
              (kAlpha * a.data.value[index[start[b] + i] * q.d] - a.x[b * q.d]);
    const double want = kTemperature * (top + std::log(sum));
    if (!(std::fabs(out.mean[b * q.d] - first) <= 1e-6 * (1 + std::fabs(first))) ||
        !(std::fabs(out.log_z[b] - want) <= 1e-9 * (1 + std::fabs(want))) ||
        !(std::fabs(grad_x[b * q.d] - pull) <= 1e-6 * (1 + std::fabs(pull)))) {
      printf("list %lld: mean %g, not %g; log_z %g, not %g; gradient %g, not %g\n", b, out.mean[b * q.d],
             first, out.log_z[b], want, grad_x[b * q.d], pull);
      return false;
    }
  }
  return true;
}

// An index of the coordinates themselves: four at once, four more, and the norms of these and of the rest.
static bool scan_is_right(const Problem& q, const Given& a) {
  const i64 k0 = 4, fine_width = 4, bands = 2, kept = k0 + fine_width;
  const double eps = 1e-6, up = 1 + 1e-5;
  std::vector<float> coarse, z, norms;
  std::vector<u8> fine;
  std::vector<double> sq_norms, margin, sq, largest = {0, 0, 1};
  auto norm = [](const double* v, i64 from, i64 to) {
    double s = 0;
    for (i64 d = from; d < to; d++) s += v[d] * v[d];
    return std::sqrt(s);
  };
  auto store = [&](double v) {
    const float f = (float)v;
    const u16 h = emulator::to_half(f);
    const u8* const from = MK_FINE == (int)kF32 ? (const u8*)&f : (const u8*)&h;
    fine.insert(fine.end(), from, from + Stored<MK_FINE>::kBytes);
    return MK_FINE == (int)kF32 ? v - f : v - emulator::from_half(h);
  };
  for (i64 n = 0; n < q.n; n++) {
    const double* const y = &a.data.value[n * q.d];
    for (i64 d = 0; d < k0; d++) coarse.push_back((float)y[d]);
    coarse.push_back((float)(norm(y, k0, kept) * up));
    coarse.push_back((float)(norm(y, kept, q.d) * up));
    double pad = 0;
    for (i64 d = k0; d < kept; d++) pad += std::pow(store(y[d]), 2);
    coarse.push_back((float)(std::sqrt(pad) * up + 1e-6));
    sq_norms.push_back(std::pow(norm(y, 0, q.d), 2));
    largest[0] = std::fmax(largest[0], sq_norms.back());
  }
  for (i64 b = 0; b < q.b; b++) {
    std::vector<double> x(a.x.begin() + b * q.d, a.x.begin() + (b + 1) * q.d);
    z.insert(z.end(), x.begin(), x.begin() + kept);
    norms.push_back((float)(norm(x.data(), k0, kept) * up));
    norms.push_back((float)(norm(x.data(), kept, q.d) * up));
    norms.push_back((float)(norm(x.data(), 0, q.d) * up));
    margin.push_back(1e-5 * norm(x.data(), 0, q.d) * std::sqrt(largest[0]));
    sq.push_back(std::pow(norm(x.data(), 0, q.d), 2) * (1 - 1e-12));
  }
  const i64 tiles = (q.n + kTileRows - 1) / kTileRows, chunks = (q.n + kChunkRows - 1) / kChunkRows;
  auto scaled = nothing<float>(q.b * (kept + bands + 1)), least = nothing<float>(q.b);
  auto reach = nothing<double>(q.b), best = reach, threshold = reach;
  auto bound = nothing<float>(q.b * q.n), left = bound, guess = nothing<float>(q.b * tiles * 2);
  auto place = nothing<u32>(q.b * tiles * 2), chunk = nothing<u32>(q.b * chunks);
  auto index = nothing<u32>(q.b * q.n);
  auto count = nothing<i64>(q.b), level = count, start = nothing<i64>(q.b + 1);
  ScanParams p = weighed_params_of<ScanParams>(q, a);
  p.sq_norms = sq_norms.data();
  p.coarse = coarse.data();
  p.fine = fine.data();
  p.z = z.data();
  p.norms = norms.data();
  p.margin = margin.data();
  p.sq = sq.data();
  p.largest = largest.data();
  p.scaled = scaled.data();
  p.reach = reach.data();
  p.best = best.data();
  p.least = least.data();
  p.bound = bound.data();
  p.guess = guess.data();
  p.place = place.data();
  p.chunk = chunk.data();
  p.index = index.data();
  p.left = left.data();
  p.count = count.data();
  p.level = level.data();
  p.threshold = threshold.data();
  p.start = start.data();
  p.span = std::log(q.n / eps);
  p.k0 = k0;
  p.bands = bands;
  p.fine_width = fine_width;
  p.most_listed = q.n;
  p.parts = 2;
  p.k2 = fine_width;
  p.b2 = 1;
  p.first = 1;
  const i64 teams = (q.b + kTileQueries - 1) / kTileQueries;
  go<ScanParams, memokern_scan_begin>(p, q.b, kBeginThreads, 0, q.seed);
  go<ScanParams, memokern_scan_bounds>(p, tiles * teams, kScanThreads, bounds_shared_bytes(), q.seed);
  go<ScanParams, memokern_scan_settle_first>(p, q.b, kScanThreads, settle_shared_bytes(), q.seed);
  go<ScanParams, memokern_scan_count>(p, q.b * chunks, kScanThreads, list_shared_bytes(), q.seed);
  go<ScanParams, memokern_scan_list>(p, q.b * chunks, kScanThreads, list_shared_bytes(), q.seed);
  go<ScanParams, memokern_scan_refine>(p, q.b * p.parts, kScanThreads, 0, q.seed);
  go<ScanParams, memokern_scan_settle_next>(p, q.b, kScanThreads, settle_shared_bytes(), q.seed);
  go<ScanParams, memokern_scan_end>(p, 1, kScanThreads, end_shared_bytes(), q.seed);
  auto out = nothing<i64>(start[q.b]);
  p.out = out.data();
  go<ScanParams, memokern_scan_gather>(p, q.b * p.parts, kScanThreads, end_shared_bytes(), q.seed);
  for (i64 b = 0; b < q.b; b++) {
    i64 at = start[b];
    for (i64 n = 0; n < q.n; n++) {
      const bool listed = at < start[b + 1] && out[at] == n;
      at += listed;
      if (!listed && logit(q, a, b, n) > threshold[b]) {
        printf("query %lld: row %lld is not listed\n", b, n);
        return false;
      }
    }
    // Lists ascend, and at little noise they are short where no band is left.
    if (at != start[b + 1] || at == start[b] || (q.sigma < 0.1 && q.d == kept && at - start[b] > q.n / 9)) {
      printf("query %lld lists %lld of %lld rows\n", b, start[b + 1] - start[b], q.n);
      return false;
    }
  }
  return true;
}

// More queries than a block has threads, and rows in two parts.
static bool plane_is_right(double sigma) {
  const Problem q = {kPlaneThreads + 3, 2 * kTile + 5, kF - (kF > 2), sigma, 5};
  const Given a = given_of(q);
  const i64 parts = 2;
  auto part = nothing<double>(parts * (kPlaneSums + 2 * kF) * q.b);
  Outputs out(q);
  std::vector<double> center(q.d, 0.0), largest = {0, 0, 0};
  for (i64 n = 0; n < q.n; n++) {
    double sq = 0;
    for (i64 d = 0; d < q.d; d++) sq += std::pow(a.data.value[n * q.d + d], 2);
    largest[0] = std::fmax(largest[0], sq);
    if (a.bias[n] > -INFINITY) largest[2] = std::fmax(largest[2], std::fabs(a.bias[n]));
  }
  PlaneParams p = weighed_params_of<PlaneParams>(q, a);
  p.center = center.data();
  p.largest = largest.data();
  p.part = part.data();
  out.give(p);
  p.parts = parts;
  p.features = kF;
  go<PlaneParams, memokern_plane_sweep>(p, 2 * parts, kPlaneThreads, plane_shared_bytes(), q.seed);
  go<PlaneParams, memokern_plane_sums>(p, (q.b + kPlaneFinishThreads - 1) / kPlaneFinishThreads,
                                       kPlaneFinishThreads, 0, q.seed);
  for (i64 b = 0; b < q.b; b++) {
    double sum = 0, top = -INFINITY, first = 0;
    for (i64 n = 0; n < q.n; n++) top = std::fmax(top, logit(q, a, b, n));
    for (i64 n = 0; n < q.n; n++) {
      const double w = std::exp(logit(q, a, b, n) - top);
      sum += w;
      first += w * a.data.value[n * q.d];
    }
    const double want = kTemperature * (top + std::log(sum));
    if (!(std::fabs(out.mean[b * q.d] - first / sum) <= 1e-5 * std::sqrt(largest[0])) ||
        !(std::fabs(out.log_z[b] - want) <= 1e-4 * (1 + std::fabs(want)))) {
      printf("plane, query %lld: mean %g, not %g; log_z %g, not %g\n", b, out.mean[b * q.d], first / sum,
             out.log_z[b], want);
      return false;
    }
  }
  return true;
}

int main() {
  const Problem problems[] = {
      {1, 1, 9, 1.0, 0}, {3, 150, 24, 0.05, 1}, {33, 40, 300, 1.0, 2}, {2, 2 * kChunkRows + 3, 8, 0.05, 3}};
  int right = 0, all = 0;
  for (const Problem& q : problems) {
    const Given a = given_of(q);
    right += nearest_is_right(q, a) + lists_are_right(q, a) + scan_is_right(q, a);
    all += 3;
  }
  // Differences, values, and in float64 where few rows are near.
  for (double sigma : {0.3, 3.0, 1e-3}) {
    right += plane_is_right(sigma);
    all++;
  }
  printf("%d of %d problems are right\n", right, all);
  return right == all ? 0 : 1;
}
