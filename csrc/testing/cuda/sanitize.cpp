// One variant of the sweep for wide rows, from queries to sums, on the emulator and without Python: what
// tools/sanitize_cuda.py runs under sanitizers. Arrays have exactly their size. Sums are compared with their
// definition, so that a kernel which does nothing is no success.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "emulator.h"
#include "sweep/finish.cu"
#include "sweep/queries.cu"
#include "sweep/sweep.cu"

using namespace memokern::cuda;

template <class P, void (*kKernel)(const P&)>
static void kernel(const void* params) {
  kKernel(*(const P*)params);
}
template <class T>
static std::vector<T> nothing(i64 n) {
  std::vector<T> v(n);
  if (n) memset((void*)v.data(), 0xff, n * sizeof(T));
  return v;
}

// Rows as they are stored, of exactly their size, and their values.
struct Data {
  std::vector<u8> stored;
  std::vector<double> value;
};
static Data rows_of(i64 n, i64 d, double scale, double shift, std::mt19937& random) {
  std::normal_distribution<float> normal;
  Data data;
  data.stored.resize(n * d * Numbers::kBytes);
  data.value.resize(n * d);
  for (i64 i = 0; i < n * d; i++) {
    const float v = normal(random);
    float kept = v;
    if (kType == (int)kF32) {
      memcpy(&data.stored[4 * i], &v, 4);
    } else if (kType == (int)kU8) {
      data.stored[i] = (u8)(random() & 255);
      kept = data.stored[i];
    } else {
      const u16 h = Numbers::kBrain ? emulator::to_brain(v) : emulator::to_half(v);
      memcpy(&data.stored[2 * i], &h, 2);
      kept = Numbers::kBrain ? as_float((u32)h << 16) : emulator::from_half(h);
    }
    data.value[i] = (float)(kept * (float)scale) + (float)shift;
  }
  return data;
}

struct Problem {
  i64 b, n, d;
  double sigma;
  int clusters;
  unsigned seed;
};

static bool solve(const Problem& q) {
  std::mt19937 random(q.seed + 1);
  std::normal_distribution<double> normal;
  const double scale = kType == (int)kU8 ? 2.0 / 255 : 1, shift = kType == (int)kU8 ? -1 : 0;
  const Data data = rows_of(q.n, q.d, scale, shift, random);
  std::vector<double> center(q.d, 0.1), norms(q.n), bias(q.n);
  for (i64 n = 0; n < q.n; n++) {
    bias[n] = n % 5 == 2 ? -INFINITY : 0.1 * normal(random);
    for (i64 d = 0; d < q.d; d++) norms[n] += std::pow(data.value[n * q.d + d] - 0.1, 2);
  }
  std::vector<float> x(q.b * q.d);
  for (i64 i = 0; i < q.b * q.d; i++)
    x[i] = (float)(0.9 * data.value[i % (q.n * q.d)] + q.sigma * normal(random));
  const std::vector<double> sigma(q.b, q.sigma), alpha(q.b, 0.9), temperature(q.b, 1.2);
  auto terms = nothing<u16>((i64)Numbers::kTerms * kQueries * kDP);
  auto table = nothing<double>(kTable * kQueries),
       states = nothing<double>((i64)q.clusters * kState * kQueries);
  auto acc = nothing<float>((i64)q.clusters * kQueries * kDP), near = acc;

  QueriesParams queries = {};
  queries.x = x.data();
  queries.sigma = sigma.data();
  queries.alpha = alpha.data();
  queries.temperature = temperature.data();
  queries.center = center.data();
  queries.terms = terms.data();
  queries.table = table.data();
  queries.scale = scale;
  queries.shift = shift;
  queries.b = q.b;
  queries.d = q.d;
  queries.dp = kDP;
  queries.queries = kQueries;
  queries.depth = kFeatures;
  queries.log = kLogWeights;
  emulator::launch(kernel<QueriesParams, memokern_queries>, &queries, kQueries, 1, 1, kQueryThreads, 512,
                   q.seed);

  SweepParams sweep = {};
  sweep.rows = data.stored.data();
  sweep.sq_norms = norms.data();
  sweep.bias = bias.data();
  sweep.terms = terms.data();
  sweep.table = table.data();
  sweep.x = x.data();
  sweep.sigma = sigma.data();
  sweep.alpha = alpha.data();
  sweep.states = states.data();
  sweep.acc = acc.data();
  sweep.near = near.data();
  sweep.scale = scale;
  sweep.shift = shift;
  sweep.b = q.b;
  sweep.n = q.n;
  sweep.d = sweep.stride = q.d;
  emulator::launch(kernel<SweepParams, memokern_sweep>, &sweep, q.clusters, 1, kCluster, kThreads,
                   shared_bytes(), q.seed);

  auto mean = nothing<float>(q.b * q.d), residual = mean, score = mean;
  auto log_z = nothing<double>(q.b), logit = log_z, mean_bias = log_z, weight_sq = log_z;
  FinishParams finish = {};
  finish.states = states.data();
  finish.acc = acc.data();
  finish.near = near.data();
  finish.table = table.data();
  finish.x = x.data();
  finish.sigma = sigma.data();
  finish.alpha = alpha.data();
  finish.temperature = temperature.data();
  finish.center = center.data();
  finish.scale = scale;
  finish.zero = shift - Numbers::kOffset * scale;
  finish.b = q.b;
  finish.d = q.d;
  finish.dp = kDP;
  finish.parts = q.clusters;
  finish.queries = kQueries;
  finish.residual = residual.data();
  finish.mean = mean.data();
  finish.log_z = log_z.data();
  finish.mean_logit = logit.data();
  finish.mean_bias = mean_bias.data();
  finish.weight_sq = weight_sq.data();
  finish.score = score.data();
  finish.log_threshold = -INFINITY;
  emulator::launch(kernel<FinishParams, memokern_finish_sums>, &finish, (int)q.b,
                   (int)((q.d + kFinishFeatures - 1) / kFinishFeatures), 1, kFinishThreads, 0, q.seed);

  for (i64 b = 0; b < q.b; b++) {
    std::vector<double> v(q.n, -INFINITY);
    double top = -INFINITY, sum = 0;
    for (i64 n = 0; n < q.n; n++) {
      double r2 = 0;
      for (i64 d = 0; d < q.d; d++) r2 += std::pow(x[b * q.d + d] - 0.9 * data.value[n * q.d + d], 2);
      const double l = kLogWeights ? -0.5 * q.d * std::log(r2 / q.d) : -0.5 * r2 / q.sigma / q.sigma;
      v[n] = (l + bias[n]) / 1.2;
      top = std::fmax(top, v[n]);
    }
    for (double& one : v) sum += one = std::exp(one - top);
    const double want = 1.2 * (top + std::log(sum));
    double first = 0;
    for (i64 n = 0; n < q.n; n++) first += v[n] / sum * data.value[n * q.d];
    const bool right = std::fabs(log_z[b] - want) <= 1e-4 * (1 + std::fabs(want)) &&
                       std::fabs(mean[b * q.d] - first) <= 1e-4;
    if (!right) {
      printf("query %lld of %lld x %lld x %lld: log Z %g, not %g; mean %g, not %g\n", b, q.b, q.n, q.d,
             log_z[b], want, mean[b * q.d], first);
      return false;
    }
  }
  return true;
}

int main() {
  // With copies by the machine a row is a multiple of 16 bytes.
  const i64 step = kBulk ? 16 / Numbers::kBytes : 1, most = kDP;
  const Problem problems[] = {
      {1, 1, most, 1.0, 1, 0},
      {3, kRows + 3, most - step, 0.3, 1, 1},
      {kQueries, 4 * kRows + 1, most - 3 * step, 3.0, 2, 2},
      {5, 3 * kRows, most / 2 / step * step + step, 0.01, 3, 3},
  };
  int right = 0, all = 0;
  for (const Problem& q : problems) {
    right += solve(q);
    all++;
  }
  printf("%d of %d problems are right\n", right, all);
  return right == all ? 0 : 1;
}
