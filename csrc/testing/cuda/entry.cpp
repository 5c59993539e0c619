// One variant of one device source, for the emulator: a library of its own, with the runtime in it.
// MK_SOURCE is the source, and the other macros are those of the variant.
#include <cstring>

#include "emulator.h"
#include MK_SOURCE

using namespace memokern::cuda;

namespace {

struct Entry {
  const char* name;
  emulator::Body body;
  int cluster, threads;
  i64 shared_bytes;
};

#define MK_ENTRY(name, params, cluster, threads, bytes) \
  {#name, emulator::body<params, name>, cluster, threads, bytes}
const Entry entries[] = {
#if defined(MK_IS_SWEEP)
    MK_ENTRY(memokern_sweep, SweepParams, kCluster, kThreads, shared_bytes()),
#elif defined(MK_IS_QUERIES)
    MK_ENTRY(memokern_queries, QueriesParams, 1, kQueryThreads, 512),
#elif defined(MK_IS_NORMS)
    MK_ENTRY(memokern_sq_norms, NormsParams, 1, kNormThreads, 0),
#elif defined(MK_IS_FINISH)
    MK_ENTRY(memokern_finish_state, FinishParams, 1, kFinishThreads, 0),
    MK_ENTRY(memokern_finish_sums, FinishParams, 1, kFinishThreads, 0),
#elif defined(MK_IS_GRADIENT)
    MK_ENTRY(memokern_gradient, GradientParams, kCluster, kThreads, shared_bytes()),
#elif defined(MK_IS_TERMS)
    MK_ENTRY(memokern_gradient_terms, GradientParams, 1, kQueryThreads, 512),
#elif defined(MK_IS_TIES)
    MK_ENTRY(memokern_gradient_ties, GradientParams, 1, kTieThreads, 512),
#elif defined(MK_IS_BIAS)
    MK_ENTRY(memokern_gradient_bias, GradientParams, 1, kBiasThreads, 0),
#elif defined(MK_IS_FINISH_GRADIENT)
    MK_ENTRY(memokern_gradient_finish, GradientParams, 1, kGradientThreads, 512),
#elif defined(MK_IS_SCAN_BEGIN)
    MK_ENTRY(memokern_scan_begin, ScanParams, 1, kBeginThreads, 0),
#elif defined(MK_IS_SCAN_BOUNDS)
    MK_ENTRY(memokern_scan_bounds, ScanParams, 1, kScanThreads, bounds_shared_bytes()),
#elif defined(MK_IS_SCAN_SETTLE)
    MK_ENTRY(memokern_scan_settle_first, ScanParams, 1, kScanThreads, settle_shared_bytes()),
    MK_ENTRY(memokern_scan_settle_next, ScanParams, 1, kScanThreads, settle_shared_bytes()),
#elif defined(MK_IS_SCAN_LIST)
    MK_ENTRY(memokern_scan_count, ScanParams, 1, kScanThreads, list_shared_bytes()),
    MK_ENTRY(memokern_scan_list, ScanParams, 1, kScanThreads, list_shared_bytes()),
#elif defined(MK_IS_SCAN_REFINE)
    MK_ENTRY(memokern_scan_refine, ScanParams, 1, kScanThreads, 0),
#elif defined(MK_IS_SCAN_END)
    MK_ENTRY(memokern_scan_end, ScanParams, 1, kScanThreads, end_shared_bytes()),
    MK_ENTRY(memokern_scan_gather, ScanParams, 1, kScanThreads, end_shared_bytes()),
#elif defined(MK_IS_LISTED_PAIRS)
    MK_ENTRY(memokern_listed_pairs, ListedParams, 1, kListThreads, 0),
#elif defined(MK_IS_LISTED_WEIGHTS)
    MK_ENTRY(memokern_listed_weights, ListedParams, 1, kListThreads, listed_shared_bytes()),
    MK_ENTRY(memokern_listed_factors, ListedParams, 1, kListThreads, listed_shared_bytes()),
#elif defined(MK_IS_LISTED_SUM)
    MK_ENTRY(memokern_listed_sum, ListedParams, 1, kListThreads, 0),
#elif defined(MK_IS_LISTED_FINISH)
    MK_ENTRY(memokern_listed_finish, ListedParams, 1, kListThreads, 0),
#elif defined(MK_IS_NEAREST_ABOUT)
    MK_ENTRY(memokern_nearest_about, NearestParams, 1, kNearThreads, about_shared_bytes()),
#elif defined(MK_IS_NEAREST_BOUND)
    MK_ENTRY(memokern_nearest_bound, NearestParams, 1, kNearThreads, bound_shared_bytes()),
#elif defined(MK_IS_NEAREST_EXACT)
    MK_ENTRY(memokern_nearest_exact, NearestParams, 1, kNearThreads, exact_shared_bytes()),
    MK_ENTRY(memokern_nearest_join, NearestParams, 1, kNearThreads, exact_shared_bytes()),
#elif defined(MK_IS_PLANE_SWEEP)
    MK_ENTRY(memokern_plane_sweep, PlaneParams, 1, kPlaneThreads, plane_shared_bytes()),
#elif defined(MK_IS_PLANE_FINISH)
    MK_ENTRY(memokern_plane_state, PlaneParams, 1, kPlaneFinishThreads, 0),
    MK_ENTRY(memokern_plane_sums, PlaneParams, 1, kPlaneFinishThreads, 0),
#elif defined(MK_IS_FAULTS)
    MK_FAULT_ENTRIES
#endif
};

const Entry* find(const char* name) {
  for (const Entry& e : entries)
    if (!strcmp(e.name, name)) return &e;
  return nullptr;
}

}  // namespace

extern "C" {

// The dynamic shared memory of an entry, with the gaps that the emulator adds between arrays.
__attribute__((visibility("default"))) long long memokern_shared_bytes(const char* name) {
  const Entry* e = find(name);
  return e ? e->shared_bytes : -1;
}
// The gaps alone: so much less is what the device needs.
__attribute__((visibility("default"))) int memokern_gap() { return kGap; }

// Runs an entry. Returns 0, or 1 where there is none of this name. A fault ends the process.
__attribute__((visibility("default"))) int memokern_emulate(const char* name, const void* params,
                                                            long long grid_x, long long grid_y,
                                                            unsigned seed) {
  const Entry* e = find(name);
  if (!e || grid_x % e->cluster) return 1;
  emulator::launch(e->body, params, (int)(grid_x / e->cluster), (int)grid_y, e->cluster, e->threads,
                   e->shared_bytes, seed);
  return 0;
}
}
