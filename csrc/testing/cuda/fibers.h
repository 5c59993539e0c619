// Fibres: stacks of their own that one thread of the machine switches between. AddressSanitizer and
// ThreadSanitizer are told of each switch.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(MK_TSAN)
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace emulator_fibers {

enum : size_t { kStack = 256 << 10 };

struct Fiber {
  char* stack = nullptr;
  void* sp = nullptr;
  void* fake_stack = nullptr;
  void* tsan = nullptr;
#if !defined(__x86_64__)
  ucontext_t context;
#endif
};

#if defined(__x86_64__)
extern "C" void memokern_emulator_swap(void** from, void* to);
asm(R"(.text
.globl memokern_emulator_swap
.type memokern_emulator_swap,@function
memokern_emulator_swap:
 pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
 movq %rsp,(%rdi); movq %rsi,%rsp
 popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
 ret
.size memokern_emulator_swap,.-memokern_emulator_swap
)");
#endif

static Fiber main_fiber;
static const void* main_stack = nullptr;
static size_t main_stack_size = 0;

// hb: happens-before, for ThreadSanitizer alone.
static inline void hb_release(void* at) {
#if defined(MK_TSAN)
  __tsan_release(at);
#else
  (void)at;
#endif
}
static inline void hb_acquire(void* at) {
#if defined(MK_TSAN)
  __tsan_acquire(at);
#else
  (void)at;
#endif
}

// From the scheduler to a fibre.
static inline void switch_to(Fiber& f) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&main_fiber.fake_stack, f.stack, kStack);
#endif
#if defined(MK_TSAN)
  __tsan_switch_to_fiber(f.tsan, 1);  // 1: no synchronisation between the two
#endif
#if defined(__x86_64__)
  memokern_emulator_swap(&main_fiber.sp, f.sp);
#else
  swapcontext(&main_fiber.context, &f.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(main_fiber.fake_stack, nullptr, nullptr);
#endif
}

// From a fibre to the scheduler; last: it will not run again.
static inline void switch_to_main(Fiber& f, bool last = false) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &f.fake_stack, main_stack, main_stack_size);
#endif
#if defined(MK_TSAN)
  __tsan_switch_to_fiber(main_fiber.tsan, 1);
#endif
#if defined(__x86_64__)
  memokern_emulator_swap(&f.sp, main_fiber.sp);
#else
  swapcontext(&f.context, &main_fiber.context);
#endif
  (void)last;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f.fake_stack, &main_stack, &main_stack_size);
#endif
}

// The first thing that a fibre does.
static inline void entered() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_size);
#endif
}

// Makes the fibre begin at entry(), which must not return.
static inline void prepare(Fiber& f, void (*entry)()) {
  if (!f.stack) {
    void* p =
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
      fprintf(stderr, "emulator: no memory for a stack\n");
      abort();
    }
    f.stack = (char*)p;
  }
  f.fake_stack = nullptr;
#if defined(MK_TSAN)
  if (!main_fiber.tsan) main_fiber.tsan = __tsan_get_current_fiber();
  if (f.tsan) __tsan_destroy_fiber(f.tsan);
  f.tsan = __tsan_create_fiber(0);
#endif
#if defined(__x86_64__)
  void** sp = (void**)((uintptr_t)(f.stack + kStack) & ~(uintptr_t)15);
  *--sp = nullptr;
  *--sp = (void*)entry;
  for (int i = 0; i < 6; i++) *--sp = nullptr;
  f.sp = sp;
#else
  getcontext(&f.context);
  f.context.uc_stack = {f.stack, 0, kStack};
  f.context.uc_link = nullptr;
  makecontext(&f.context, entry, 0);
#endif
}

}  // namespace emulator_fibers
