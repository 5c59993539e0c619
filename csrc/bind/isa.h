// Which instruction set's kernels are used. It is chosen once, when the module is loaded, and may be chosen again.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "memokern/abi.h"

namespace memokern {

// The kernels in use.
const Table& kernels();

// Uses the kernels of one instruction set, or with "auto" the widest that this processor runs. Returns its name. Throws
// std::runtime_error for a name that is not known or not supported.
std::string select_isa(const std::string& name);

// What there is, the widest first, and whether it runs here.
std::vector<std::pair<std::string, bool>> isas();

// Makes one more known, which is never chosen by "auto".
void add_isa(const Table* table, bool supported);

#ifdef MEMOKERN_HAVE_X86
inline bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
inline bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}
#endif

}  // namespace memokern
