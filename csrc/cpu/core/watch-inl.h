// How a call that takes long is ended early, by Ctrl-C for instance.
//
// Each thread of a kernel counts what it does, and asks the call's watch (abi.h) now and then: often enough
// to end within a few tens of milliseconds, and seldom enough to cost nothing. What a stopped call has
// written is worth nothing.
#pragma once
#include "cpu/core/parallel-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

enum : int64_t { WORK_PER_LOOK = 1 << 21 };  // multiplications, about: a tenth of a millisecond or two

// All zeros are a valid one, without a watch.
struct Pace {
  Watch* watch;
  int64_t work;  // since it asked last
  bool ask() {
    work = 0;
    return watch && watch->stopped(watch);
  }
  // Says that so many multiplications come next. Returns whether the call has been stopped.
  bool stopped(int64_t more) {
    work += more;
    return work >= WORK_PER_LOOK && ask();
  }
};

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
