#define MEMOKERN_ISA_NS avx2
#define MEMOKERN_VBYTES 32
#include "cpu/isa/table-inl.h"

namespace memokern {
const Table* table_avx2() { return &avx2::kTable; }
}  // namespace memokern
