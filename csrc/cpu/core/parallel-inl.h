// Parts of a call on several threads.
#pragma once
#include "cpu/core/memory-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

// f(i, worker), which returns a Status, for i = 0 .. count - 1 on at most `threads` threads (run_parts in
// memokern/runtime.h). Returns the bits of all; what has not begun when one fails is left out. Which thread
// takes which i is chance: a part's results must not depend on it, so sums belong to parts, not to workers.
template <class F>
static int for_parts(int threads, int64_t count, const F& f) {
  int failed = 0;
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count && !failed; i++) failed |= f(i, 0);
    return failed;
  }
  struct Call {
    const F* f;
    int* failed;
  } call = {&f, &failed};
  const auto part = [](void* context, int64_t i, int worker) {
    const Call& c = *(const Call*)context;
    if (__atomic_load_n(c.failed, __ATOMIC_RELAXED)) return;
    const int status = (*c.f)(i, worker);
    if (status) __atomic_fetch_or(c.failed, status, __ATOMIC_RELAXED);
  };
  run_parts(threads, count, part, &call);
  return failed;
}

// Multiplications that are worth another thread, about: a tenth of a millisecond. To wake one up takes half
// of that.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum : int64_t { WORK_PER_THREAD = 1 };  // sanitizers watch small problems on several threads
#else
enum : int64_t { WORK_PER_THREAD = 1 << 22 };
#endif

static int threads_for(int threads, double work) {
  const double worth = 1 + work / WORK_PER_THREAD;
  return worth < threads ? (int)worth : threads;
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
