// What the programs that run under sanitizers share: problems, launches, and arrays of exactly their size. To
// be included after the kernels.
#pragma once
#include "sanitize_rows.h"

struct Problem {
  i64 b, n, d;
  double sigma;
  int clusters;
  unsigned seed;
};

// A problem, and the sums that it has by their definition, of which no kernel knows.
struct Given {
  Data data;
  std::vector<double> center, norms, bias, sigma, alpha, temperature;
  std::vector<float> x;
  // weight of each pair [b][n], its logit, and sums of the queries
  std::vector<double> weight, logit, log_z, mean_logit, mean_bias, weight_sq, mean;
  double scale, shift;
};
static Given given_of(const Problem& q) {
  std::mt19937 random(q.seed + 1);
  std::normal_distribution<double> normal;
  Given a;
  a.scale = kType == (int)kU8 ? 2.0 / 255 : 1;
  a.shift = kType == (int)kU8 ? -1 : 0;
  a.data = rows_of(q.n, q.d, a.scale, a.shift, random);
  a.center.assign(q.d, 0.1);
  a.norms.assign(q.n, 0);
  a.bias.assign(q.n, 0);
  for (i64 n = 0; n < q.n; n++) {
    a.bias[n] = n % 5 == 2 ? -INFINITY : 0.1 * normal(random);
    for (i64 d = 0; d < q.d; d++) a.norms[n] += std::pow(a.data.value[n * q.d + d] - 0.1, 2);
  }
  a.x.resize(q.b * q.d);
  for (i64 i = 0; i < q.b * q.d; i++)
    a.x[i] = (float)(0.9 * a.data.value[i % (q.n * q.d)] + q.sigma * normal(random));
  a.sigma.assign(q.b, q.sigma);
  a.alpha.assign(q.b, 0.9);
  a.temperature.assign(q.b, 1.2);
  a.weight.resize(q.b * q.n);
  a.logit.resize(q.b * q.n);
  a.mean.assign(q.b * q.d, 0);
  for (i64 b = 0; b < q.b; b++) {
    double *const w = &a.weight[b * q.n], *const l = &a.logit[b * q.n];
    double top = -INFINITY, sum = 0, of_logit = 0, of_bias = 0, of_sq = 0;
    for (i64 n = 0; n < q.n; n++) {
      double r2 = 0;
      for (i64 d = 0; d < q.d; d++) r2 += std::pow(a.x[b * q.d + d] - 0.9 * a.data.value[n * q.d + d], 2);
      l[n] = (kLogWeights ? -0.5 * q.d * std::log(r2 / q.d) : -0.5 * r2 / q.sigma / q.sigma) + a.bias[n];
      top = std::fmax(top, l[n] / 1.2);
    }
    for (i64 n = 0; n < q.n; n++) sum += w[n] = std::exp(l[n] / 1.2 - top);
    for (i64 n = 0; n < q.n; n++) {
      w[n] /= sum;
      of_sq += w[n] * w[n];
      if (w[n] > 0) of_logit += w[n] * l[n];
      if (w[n] > 0) of_bias += w[n] * a.bias[n];
      for (i64 d = 0; d < q.d; d++) a.mean[b * q.d + d] += w[n] * a.data.value[n * q.d + d];
    }
    a.log_z.push_back(1.2 * (top + std::log(sum)));
    a.mean_logit.push_back(of_logit);
    a.mean_bias.push_back(of_bias);
    a.weight_sq.push_back(of_sq);
  }
  return a;
}

// Parameters with what all kernels that own queries are given of the problem.
template <class P>
static P params_of(const Problem& q, const Given& a) {
  P p = {};
  p.x = a.x.data();
  p.sigma = a.sigma.data();
  p.alpha = a.alpha.data();
  p.scale = a.scale;
  p.b = q.b;
  p.d = q.d;
  return p;
}
// And with what those are given that sweep over rows.
template <class P>
static P sweep_params_of(const Problem& q, const Given& a) {
  P p = params_of<P>(q, a);
  p.rows = a.data.stored.data();
  p.sq_norms = a.norms.data();
  p.bias = a.bias.data();
  p.shift = a.shift;
  p.n = q.n;
  p.stride = q.d;
  return p;
}

// The first launch of a sweep.
static void split_queries(const Problem& q, const Given& a, std::vector<u16>& terms,
                          std::vector<double>& table) {
  QueriesParams queries = params_of<QueriesParams>(q, a);
  queries.temperature = a.temperature.data();
  queries.center = a.center.data();
  queries.terms = terms.data();
  queries.table = table.data();
  queries.shift = a.shift;
  queries.dp = kDP;
  queries.queries = kQueries;
  queries.depth = kFeatures;
  queries.log = kLogWeights;
  emulator::launch(emulator::body<QueriesParams, memokern_queries>, &queries, kQueries, 1, 1, kQueryThreads,
                   512, q.seed);
}

static int solve_all(bool (*solve)(const Problem&)) {
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
