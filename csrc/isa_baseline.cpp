#define MEMOKERN_ISA_NS baseline
#define MEMOKERN_VBYTES 16
#include "isa-inl.h"

namespace memokern {
const Table* table_baseline() { return &baseline::kTable; }
}
