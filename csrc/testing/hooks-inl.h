// The hooks of one instruction set, included like cpu/isa/table-inl.h.
#pragma once
#include "cpu/core/exp-inl.h"
#include "testing/hooks.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

template <class R>
static void run_exp(const R* x, R* y, int64_t n, bool two) {
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
static void run_merge(State* a, const State* b, double* factors) { merge(*a, *b, factors[0], factors[1]); }

#define MK_STRING_OF(x) #x
#define MK_STRING(x) MK_STRING_OF(x)
static const Hooks kHooks = {MK_STRING(MEMOKERN_ISA_NS), run_exp<float>, run_exp<double>, run_merge};

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
