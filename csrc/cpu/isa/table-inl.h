// The table of one instruction set. Included last, by each isa_*.cpp.
#pragma once
#include "cpu/posterior/backward-inl.h"
#include "cpu/nearest/nearest-inl.h"
#include "cpu/project/project-inl.h"
#include "cpu/scan/scan-inl.h"
#include "cpu/posterior/small-inl.h"
#include "cpu/listed/listed-inl.h"

namespace memokern { namespace MEMOKERN_ISA_NS {

static int run_posterior(const Rows& r, const Queries& q, const Posterior& o, bool f64, int threads) {
  return f64 ? posterior_typed<double>(r, q, o, threads) : posterior_typed<float>(r, q, o, threads);
}
static int run_backward(const Rows& r, const Queries& q, const Gradients& o, bool f64, int threads) {
  return f64 ? backward_typed<double>(r, q, o, threads) : backward_typed<float>(r, q, o, threads);
}
static int run_nearest(const Rows& r, const Queries& q, const Nearest& o, bool f64, int threads) {
  return f64 ? nearest_typed<double>(r, q, o, threads) : nearest_typed<float>(r, q, o, threads);
}
template <class R> static void run_exp(const R* x, R* y, int64_t n, bool two) {
  enum { W = Vec<R>::W };
  R t[W];
  for (int64_t i = 0; i < n; i += W) {
    const int64_t m = imin(W, n - i);
    memset((void*)t, 0, sizeof t);
    memcpy(t, x + i, m * sizeof(R));
    store(t, two ? vexp2(load(t)) : vexp(load(t)));
    memcpy(y + i, t, m * sizeof(R));
  }
}
static void run_merge(double* a, const double* b, double* factors) {
  State s, t;
  memcpy((void*)&s, a, sizeof s);
  memcpy((void*)&t, b, sizeof t);
  merge(s, t, factors[0], factors[1]);
  memcpy(a, &s, sizeof s);
}
#define MK_STR(x) #x
#define MK_NAME(x) MK_STR(x)
static const Table kTable = {MK_NAME(MEMOKERN_ISA_NS), Vec<float>::W, run_posterior, run_backward, run_nearest,
                             run_bound_scan, run_support, run_support_backward, run_project, run_exp<float>, run_exp<double>, run_merge};

} }  // namespace
