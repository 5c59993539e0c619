// run_parts: the threads that kernels share.
//
// Why not OpenMP: at the end of each of its regions every thread is waited for, also one that had nothing to
// do and that the system has not run yet, and those that wait keep a processor busy for milliseconds. Beside
// another process each region then costs a time slice. Here the caller does all that nobody else has begun,
// and a wait becomes a sleep after kSpin.
#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#include "memokern/runtime.h"

namespace memokern {
namespace {

typedef std::chrono::steady_clock Clock;
// How long a thread asks again and again before it sleeps: about what it takes to wake it up.
constexpr std::chrono::microseconds kSpin{40};
constexpr int kMostThreads = 1024;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}
// Whether `done` came true within kSpin.
template <class Done>
bool soon(const Done& done) {
  const Clock::time_point end = Clock::now() + kSpin;
  do {
    for (int i = 0; i < 16; i++) {
      if (done()) return true;
      pause();
    }
  } while (Clock::now() < end);
  return false;
}

// One call of run_parts. It lies on the caller's stack, and is in the pool's list while others may join.
struct Job {
  void (*body)(void*, int64_t, int);
  void* context;
  int64_t count;
  int places;  // for other threads that may still join; the pool's mutex protects this and `joined`
  int joined;
  Job* next_job;
  std::atomic<int64_t> next;
  std::atomic<int> inside;  // other threads that work on it
  void work(int worker) {
    // Relaxed: what orders the threads are the mutex, when they join, and `inside`, when they leave.
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(context, i, worker);
  }
};

class Pool {
 public:
  void run(int threads, Job& job) {
    int sleepers;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job.next_job = jobs_;
      jobs_ = &job;
      posted_.fetch_add(1, std::memory_order_release);
      while (threads_ < threads - 1 && start()) threads_++;
      sleepers = asleep_ < job.places ? asleep_ : job.places;
    }
    for (int i = 0; i < sleepers; i++) posted_to_.notify_one();
    job.work(0);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      Job** at = &jobs_;
      while (*at != &job) at = &(*at)->next_job;
      *at = job.next_job;
    }
    const auto left = [&] { return job.inside.load() == 0; };
    if (left() || soon(left)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    waiting_++;
    left_.wait(lock, left);
    waiting_--;
  }

 private:
  bool start() {
    sigset_t all, before;  // signals are for the threads of the program
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool started = true;
    try {
      std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      started = false;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return started;
  }
  void serve() {
    for (;;) {
      int worker = 0;
      Job& job = join(worker);
      job.work(worker);
      // The job may be gone after this.
      if (job.inside.fetch_sub(1) > 1 || waiting_.load() == 0) continue;
      { std::lock_guard<std::mutex> lock(mutex_); }
      left_.notify_all();
    }
  }
  Job& join(int& worker) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      for (Job* job = jobs_; job; job = job->next_job) {
        if (job->places == 0 || job->next.load(std::memory_order_relaxed) >= job->count) continue;
        job->places--;
        worker = ++job->joined;
        job->inside.fetch_add(1);
        return *job;
      }
      const uint64_t seen = posted_.load(std::memory_order_relaxed);
      const auto more = [&] { return posted_.load(std::memory_order_acquire) != seen; };
      lock.unlock();
      const bool found = soon(more);
      lock.lock();
      if (found || more()) continue;
      asleep_++;
      posted_to_.wait(lock, more);
      asleep_--;
    }
  }

  std::mutex mutex_;
  std::condition_variable posted_to_, left_;
  Job* jobs_ = nullptr;
  int threads_ = 0, asleep_ = 0;
  std::atomic<uint64_t> posted_{0};
  std::atomic<int> waiting_{0};  // callers that sleep
};

// It is never destroyed: its threads wait in it until the process ends. A process that was forked has none of
// them, and begins anew; what it leaves is the size of a mutex.
std::atomic<Pool*> pool{nullptr};
void forget_pool() { pool.store(nullptr); }

Pool& the_pool() {
  Pool* found = pool.load(std::memory_order_acquire);
  if (found) return *found;
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, forget_pool); });
  Pool* made = new Pool;
  if (pool.compare_exchange_strong(found, made)) return *made;
  delete made;
  return *found;
}

}  // namespace

void run_parts(int threads, int64_t count, void (*body)(void* context, int64_t i, int worker),
               void* context) {
  if (threads > kMostThreads) threads = kMostThreads;
  if (threads > count) threads = (int)count;
  if (threads <= 1) {
    for (int64_t i = 0; i < count; i++) body(context, i, 0);
    return;
  }
  Job job = {body, context, count, threads - 1, 0, nullptr, {0}, {0}};
  the_pool().run(threads, job);
}

}  // namespace memokern
