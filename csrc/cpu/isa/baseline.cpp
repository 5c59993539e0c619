#define MEMOKERN_ISA_NS baseline
#define MEMOKERN_VBYTES 16
#include "cpu/isa/table-inl.h"

namespace memokern {
const Table* table_baseline() { return &baseline::kTable; }
}  // namespace memokern
