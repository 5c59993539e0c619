// One variant of the sweep for wide rows, from queries to sums, on the emulator and without Python: what
// tools/sanitize_cuda.py runs under sanitizers. Arrays have exactly their size. Sums are compared with their
// definition, so that a kernel which does nothing is no success.
#include "emulator.h"
#include "sweep/finish.cu"
#include "sweep/queries.cu"
#include "sweep/sweep.cu"
//
#include "sanitize.h"

static bool solve(const Problem& q) {
  const Given a = given_of(q);
  auto terms = nothing<u16>((i64)Numbers::kTerms * kQueries * kDP);
  auto table = nothing<double>(kTable * kQueries),
       states = nothing<double>((i64)q.clusters * kState * kQueries);
  auto acc = nothing<float>((i64)q.clusters * kQueries * kDP), near = acc;

  split_queries(q, a, terms, table);

  SweepParams sweep = sweep_params_of<SweepParams>(q, a);
  sweep.terms = terms.data();
  sweep.table = table.data();
  sweep.states = states.data();
  sweep.acc = acc.data();
  sweep.near = near.data();
  emulator::launch(emulator::body<SweepParams, memokern_sweep>, &sweep, q.clusters, 1, kCluster, kThreads,
                   shared_bytes(), q.seed);

  auto mean = nothing<float>(q.b * q.d), residual = mean, score = mean;
  auto log_z = nothing<double>(q.b), logit = log_z, mean_bias = log_z, weight_sq = log_z;
  FinishParams finish = params_of<FinishParams>(q, a);
  finish.states = states.data();
  finish.acc = acc.data();
  finish.near = near.data();
  finish.table = table.data();
  finish.temperature = a.temperature.data();
  finish.center = a.center.data();
  finish.zero = a.shift - Numbers::kOffset * a.scale;
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
  emulator::launch(emulator::body<FinishParams, memokern_finish_sums>, &finish, (int)q.b,
                   (int)((q.d + kFinishFeatures - 1) / kFinishFeatures), 1, kFinishThreads, 0, q.seed);

  for (i64 b = 0; b < q.b; b++) {
    const double want = a.log_z[b], first = a.mean[b * q.d];
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

int main() { return solve_all(solve); }
