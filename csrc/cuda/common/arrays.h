// Arrays of shared memory, one after the other.
#pragma once
#include "common/device.h"

namespace memokern {
namespace cuda {

MK_DEVICE constexpr i64 array_bytes(i64 bytes) { return (bytes + 127) / 128 * 128 + kGap; }

// The next `count` elements, behind which the emulator watches.
template <class T>
MK_DEVICE T* next_array(u8*& next, i64 count) {
  T* const p = (T*)next;
  const i64 bytes = count * (i64)sizeof(T);
  next += array_bytes(bytes);
  guard((u8*)p + bytes, array_bytes(bytes) - bytes);
  return p;
}

}  // namespace cuda
}  // namespace memokern
