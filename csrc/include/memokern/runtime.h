// What the kernels need of the system beside their arguments: other threads, and memory. It is compiled once,
// for every processor of the platform (csrc/cpu/runtime), and may use the C++ library.
#pragma once
#include <stdint.h>

namespace memokern {

// Calls body(context, i, worker) for i = 0 .. count - 1, each once, on at most `threads` threads, of which
// the caller is one. Whoever is free takes the next i. `worker` is 0 .. threads - 1, and no two threads have
// the same at a time. Returns when all calls have; what they wrote can be seen then. A thread that the system
// does not run meanwhile is not waited for, unless it has begun an i.
void run_parts(int threads, int64_t count, void (*body)(void* context, int64_t i, int worker), void* context);

// Memory at a multiple of 64 bytes, or null. Some of what is given back is kept for this thread's next call,
// which then need not ask the system for pages, and fill them with zeros.
void* borrow_memory(int64_t size);
void give_back_memory(void* memory);

}  // namespace memokern
