// Work space without the C++ library's allocator.
#pragma once
#include "cpu/core/vec-inl.h"
#include "memokern/runtime.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)0)
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)0)
#endif

namespace memokern {
namespace MEMOKERN_ISA_NS {

// A few arrays of zeros in one aligned block, which are freed together. reserve() takes the sum of the
// bytes() of all arrays that take() will hand out, and says whether the memory was there. AddressSanitizer is
// told what lies between them.
class Arena {
 public:
  Arena() : base_(nullptr), size_(0), used_(0) {}
  ~Arena() {
    if (base_) ASAN_UNPOISON_MEMORY_REGION(base_, size_);
    give_back_memory(base_);
  }
  template <class T>
  static int64_t bytes(int64_t n) {
    return round_up(n * (int64_t)sizeof(T), 64) + 64;
  }
  bool reserve(int64_t size) {
    size_ = round_up(size, 64) + 64;
    base_ = borrow_memory(size_);
    if (base_) ASAN_POISON_MEMORY_REGION(base_, size_);
    return base_ != nullptr;
  }
  template <class T>
  T* take(int64_t n) {
    T* p = take_raw<T>(n);
    memset((void*)p, 0, n * sizeof(T));
    return p;
  }
  // The same with whatever numbers the memory holds: pages that are never written to cost nothing.
  template <class T>
  T* take_raw(int64_t n) {
    T* p = (T*)((char*)base_ + used_);
    used_ += bytes<T>(n);
    ASAN_UNPOISON_MEMORY_REGION(p, n * sizeof(T));
    return p;
  }

 private:
  Arena(const Arena&);
  void* base_;
  int64_t size_, used_;
};

// One T for each part of a call. T must be such that all zeros are a valid empty one.
template <class T>
struct WorkSpaces {
  T* items;
  int n;
  explicit WorkSpaces(int count) : items((T*)calloc(count, sizeof(T))), n(count) {}
  // Reserves the memory of each, as T::reserve says. False where there is not enough.
  template <class... Args>
  bool reserve(const Args&... args) {
    if (!items) return false;
    for (int i = 0; i < n; i++)
      if (!items[i].reserve(args...)) return false;
    return true;
  }
  ~WorkSpaces() {
    if (items)
      for (int i = 0; i < n; i++) items[i].~T();
    free(items);
  }

 private:
  WorkSpaces(const WorkSpaces&);
};

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
