#define MEMOKERN_ISA_NS avx512
#define MEMOKERN_VBYTES 64
#include "cpu/isa/table-inl.h"

namespace memokern {
const Table* table_avx512() { return &avx512::kTable; }
}  // namespace memokern
