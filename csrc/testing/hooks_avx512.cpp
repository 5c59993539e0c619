#define MEMOKERN_ISA_NS avx512
#define MEMOKERN_VBYTES 64
#include "testing/hooks-inl.h"

namespace memokern {
const Hooks* hooks_avx512() { return &avx512::kHooks; }
}  // namespace memokern
