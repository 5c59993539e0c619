// The width of AVX-512 with the instructions of AVX2: how its code paths are tested on a processor without
// it.
#define MEMOKERN_UNFUSED  // it is compiled with -O1, which fuses no products with sums
#define MEMOKERN_ISA_NS avx2w16
#define MEMOKERN_VBYTES 64
#include "cpu/isa/table-inl.h"
#include "testing/hooks-inl.h"

namespace memokern {
const Table* table_avx2w16() { return &avx2w16::kTable; }
const Hooks* hooks_avx2w16() { return &avx2w16::kHooks; }
}  // namespace memokern
