#define MEMOKERN_ISA_NS baseline
#define MEMOKERN_VBYTES 16
#include "testing/hooks-inl.h"

namespace memokern {
const Hooks* hooks_baseline() { return &baseline::kHooks; }
}  // namespace memokern
