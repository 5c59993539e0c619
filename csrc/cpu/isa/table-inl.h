// The table of one instruction set. Each source file in this folder sets the namespace and the width, then
// includes this.
#pragma once
#include "cpu/listed/listed_backward-inl.h"
#include "cpu/nearest/nearest-inl.h"
#include "cpu/posterior/backward_call-inl.h"
#include "cpu/posterior/posterior-inl.h"
#include "cpu/posterior/segments-inl.h"
#include "cpu/pruned/pruned-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

#define MK_STRING_OF(x) #x
#define MK_STRING(x) MK_STRING_OF(x)
static const Table kTable = {kAbi,
                             MK_STRING(MEMOKERN_ISA_NS),
                             Vec<float>::W,
                             has_pairs,
                             has_vnni,
                             run_posterior,
                             run_posterior_segments,
                             run_posterior_state,
                             run_posterior_backward,
                             run_nearest,
                             run_bound_scan,
                             run_posterior_listed,
                             run_posterior_listed_backward,
                             run_project,
                             run_posterior_pruned};

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
