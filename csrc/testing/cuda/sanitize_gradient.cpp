// One variant of the backward sweep, from queries to their gradients, as sanitize.cpp has the sweep.
#include "emulator.h"
#include "gradient/bias.cu"
#include "gradient/finish_gradient.cu"
#include "gradient/gradient.cu"
#include "gradient/terms.cu"
#include "gradient/ties.cu"
#include "sweep/queries.cu"
//
#include "sanitize.h"

template <void (*kKernel)(const GradientParams&)>
static void go(const GradientParams& p, i64 blocks, int threads, i64 shared, unsigned seed) {
  emulator::launch(emulator::body<GradientParams, kKernel>, &p, (int)blocks, 1, 1, threads, shared, seed);
}

static bool solve(const Problem& q) {
  const Given a = given_of(q);
  std::mt19937 random(q.seed + 7);
  std::normal_distribution<double> normal;
  auto terms = nothing<u16>((i64)Numbers::kTerms * kQueries * kDP), grad_terms = terms;
  auto table = nothing<double>(kTable * kQueries), grad_table = nothing<double>(kGradientTable * kQueries),
       sums = nothing<double>((i64)q.clusters * (kGradientSums + 1) * kQueries);
  auto acc = nothing<float>((i64)q.clusters * kQueries * kDP), near = acc;
  split_queries(q, a, terms, table);
  std::vector<float> mean(a.mean.begin(), a.mean.end()), grad_mean(q.b * q.d);
  for (float& g : grad_mean) g = (float)normal(random);
  const std::vector<double> zero(q.b, 0.0), g_log_z(q.b, 0.7);
  auto pairs = nothing<float>(q.b * q.n), grad_x = nothing<float>(q.b * q.d);
  auto grad_sigma = nothing<double>(q.b), grad_alpha = grad_sigma, grad_temperature = grad_sigma,
       grad_bias = nothing<double>(q.n);

  GradientParams p = sweep_params_of<GradientParams>(q, a);
  p.center = a.center.data();
  p.terms = terms.data();
  p.table = table.data();
  p.grad_terms = grad_terms.data();
  p.grad_table = grad_table.data();
  p.temperature = a.temperature.data();
  p.mean = mean.data();
  p.grad_mean = grad_mean.data();
  p.log_z = a.log_z.data();
  p.mean_logit = a.mean_logit.data();
  p.mean_bias = a.mean_bias.data();
  p.weight_sq = a.weight_sq.data();
  p.grad_log_z = g_log_z.data();
  p.grad_mean_logit = p.grad_mean_bias = p.grad_weight_sq = zero.data();
  p.sums = sums.data();
  p.acc = acc.data();
  p.near = near.data();
  p.pairs = pairs.data();
  p.grad_x = grad_x.data();
  p.grad_sigma = grad_sigma.data();
  p.grad_alpha = grad_alpha.data();
  p.grad_temperature = grad_temperature.data();
  p.grad_bias = grad_bias.data();
  p.zero = a.shift - Numbers::kOffset * a.scale;
  p.dp = kDP;
  p.parts = q.clusters;
  p.queries = kQueries;
  p.first = 1;
  go<memokern_gradient_terms>(p, kQueries, kQueryThreads, 512, q.seed);
  emulator::launch(emulator::body<GradientParams, memokern_gradient>, &p, q.clusters, 1, kCluster, kThreads,
                   shared_bytes(), q.seed);
  go<memokern_gradient_ties>(p, q.b, kTieThreads, 512, q.seed);
  go<memokern_gradient_bias>(p, (q.n + kBiasThreads - 1) / kBiasThreads, kBiasThreads, 0, q.seed);
  go<memokern_gradient_finish>(p, q.b, kGradientThreads, 512, q.seed);

  // The first feature's gradient of each query, and that of the first bias, by their definition.
  double first_bias = 0, largest_bias = 0;
  for (i64 b = 0; b < q.b; b++) {
    double want = 0, size = 1e-2;
    for (i64 n = 0; n < q.n; n++) {
      const double w = a.weight[b * q.n + n];
      if (w == 0) continue;
      double h = 0, r2 = 0;
      for (i64 d = 0; d < q.d; d++) {
        const double y = a.data.value[n * q.d + d];
        h += grad_mean[b * q.d + d] * (y - a.mean[b * q.d + d]);
        r2 += std::pow(a.x[b * q.d + d] - 0.9 * y, 2);
      }
      const double qn = w * (0.7 + h / 1.2), unit = kLogWeights ? q.d / r2 : 1 / q.sigma / q.sigma;
      want += qn * unit * (0.9 * a.data.value[n * q.d] - a.x[b * q.d]);
      size = std::fmax(size, std::fabs(qn * unit) * std::sqrt(r2));
      if (n == 0) first_bias += qn;
      largest_bias = std::fmax(largest_bias, std::fabs(qn));
    }
    if (!(std::fabs(grad_x[b * q.d] - want) <= 1e-4 * size)) {
      printf("query %lld of %lld x %lld x %lld: gradient %g, not %g\n", b, q.b, q.n, q.d, grad_x[b * q.d],
             want);
      return false;
    }
  }
  if (!(std::fabs(grad_bias[0] - first_bias) <= 1e-4 * (largest_bias + 1e-2) * (double)q.b)) {
    printf("%lld x %lld x %lld: the first bias has gradient %g, not %g\n", q.b, q.n, q.d, grad_bias[0],
           first_bias);
    return false;
  }
  return true;
}

int main() { return solve_all(solve); }
