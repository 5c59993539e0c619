// Parts of the kernels that the tests call by themselves. They are built into memokern._testing, which no
// wheel holds.
#pragma once
#include <stdint.h>

#include "memokern/abi.h"
#include "memokern/state.h"

namespace memokern {

struct Hooks {
  const char* name;                                                  // of the instruction set
  void (*exp_f32)(const float* x, float* y, int64_t n, bool two);    // y [n] = e^x, or 2^x where `two`
  void (*exp_f64)(const double* x, double* y, int64_t n, bool two);  // the same in double
  void (*merge)(State* a, const State* b, double* factors);          // factors [2] of the two accumulators
  // The first product of a sweep in integers (pair_dots-inl.h) of n rows with b queries, of which x, sigma,
  // alpha and temperature are read: dots [n][b], the same refined, and of each query i0, i1, r1 and a1 of its
  // error. False where there is no such product.
  bool (*pairs)(const Rows& rows, const Queries& queries, double* dots, double* refined, double* errors);
};

const Hooks* hooks_baseline();
const Hooks* hooks_avx2();
const Hooks* hooks_avx512();
const Hooks* hooks_avx2w16();
const Table* table_avx2w16();

}  // namespace memokern
