#define MEMOKERN_ISA_NS avx2w16
#define MEMOKERN_VBYTES 64
#include "cpu/isa/table-inl.h"

namespace memokern {
const Table* table_avx2w16() { return &avx2w16::kTable; }
}
