#define MEMOKERN_ISA_NS avx2
#define MEMOKERN_VBYTES 32
#include "testing/hooks-inl.h"

namespace memokern {
const Hooks* hooks_avx2() { return &avx2::kHooks; }
}  // namespace memokern
