// borrow_memory: a few blocks are kept for each thread.
#include <stdlib.h>

#include "memokern/runtime.h"

namespace memokern {
namespace {

constexpr int64_t kHeader = 64, kLargest = 8 << 20, kMost = 24 << 20;  // bytes; of all that a thread keeps
constexpr int kBlocks = 12;

int64_t& size_of_block(void* block) { return *static_cast<int64_t*>(block); }

struct Kept {
  void* block[kBlocks];
  int count = 0;
  int64_t size = 0;
  void* out(int i) {
    void* found = block[i];
    size -= size_of_block(found);
    count--;
    for (; i < count; i++) block[i] = block[i + 1];  // the oldest stays first
    return found;
  }
  ~Kept() {
    while (count > 0) free(out(0));
    closed = true;
  }
  bool closed = false;
};
thread_local Kept kept;

void* fresh(int64_t size) {
  void* block = nullptr;
  if (posix_memalign(&block, 64, size + kHeader) != 0) return nullptr;
  size_of_block(block) = size;
  return block;
}

}  // namespace

void* borrow_memory(int64_t size) {
  void* block = nullptr;
  // With a sanitizer, every block comes from the system, so that it is known when one is not given back.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  int best = -1;
  for (int i = 0; i < kept.count; i++) {
    const int64_t has = size_of_block(kept.block[i]);
    if (has < size || has > 8 * size + (64 << 10)) continue;
    if (best < 0 || has < size_of_block(kept.block[best])) best = i;
  }
  if (best >= 0) block = kept.out(best);
#endif
  if (!block) block = fresh(size);
  return block ? static_cast<char*>(block) + kHeader : nullptr;
}

void give_back_memory(void* memory) {
  if (!memory) return;
  void* block = static_cast<char*>(memory) - kHeader;
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  const int64_t size = size_of_block(block);
  if (size <= kLargest && !kept.closed) {
    while (kept.count == kBlocks || kept.size + size > kMost) free(kept.out(0));
    kept.block[kept.count++] = block;
    kept.size += size;
    return;
  }
#endif
  free(block);
}

}  // namespace memokern
