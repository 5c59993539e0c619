// A stand-in for GCC's OpenMP where ThreadSanitizer watches: what the compiler calls for `#pragma omp`, by
// threads that are started and joined for each parallel region.
//
// ThreadSanitizer does not see the futexes by which libgomp synchronises, so that it takes each region's
// results for races; an exception for libgomp would hide real ones too. Here it sees all: starts and joins,
// and the barriers, are those of the C++ library, and nothing else orders the threads. The counter that hands
// out iterations is relaxed, so that it cannot stand in for a barrier that is missing.
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Team {
  static constexpr int kLoops = 64;  // that a region may contain
  explicit Team(int threads) : threads(threads) {
    for (auto& n : handed_out) n.store(0, std::memory_order_relaxed);
  }
  const int threads;
  std::atomic<long> handed_out[kLoops];
  std::mutex mutex;
  std::condition_variable changed;
  int waiting = 0;
  long generation = 0;

  void barrier() {
    std::unique_lock<std::mutex> lock(mutex);
    const long mine = generation;
    if (++waiting == threads) {
      waiting = 0;
      generation++;
      changed.notify_all();
    } else {
      changed.wait(lock, [&] { return generation != mine; });
    }
  }
};

struct Member {  // a thread of a team, and the loop it is in
  Team* team = nullptr;
  int number = 0, loop = -1;
  long start = 0, end = 0, step = 1, chunk = 1;
};
thread_local Member me;

bool next(long* from, long* to) {
  const long done = me.team->handed_out[me.loop].fetch_add(me.chunk, std::memory_order_relaxed);
  const long count = (me.end - me.start + me.step - 1) / me.step;
  if (done >= count) return false;
  *from = me.start + done * me.step;
  *to = me.start + (done + me.chunk < count ? done + me.chunk : count) * me.step;
  return true;
}

void begin_loop(long start, long end, long step, long chunk) {
  me.loop++;
  me.start = start;
  me.end = end;
  me.step = step;
  me.chunk = chunk;
}

template <class Begin>
void parallel(void (*run)(void*), void* data, unsigned threads, const Begin& begin) {
  Team team(threads > 1 ? (int)threads : 1);
  const auto member = [&](int number) {
    const Member before = me;
    me = Member();
    me.team = &team;
    me.number = number;
    begin();
    run(data);
    me = before;
  };
  std::vector<std::thread> others;
  for (int i = 1; i < team.threads; i++) others.emplace_back(member, i);
  member(0);
  for (std::thread& other : others) other.join();
}

}  // namespace

extern "C" {

int omp_get_thread_num() { return me.number; }
int omp_get_num_threads() { return me.team ? me.team->threads : 1; }

void GOMP_parallel(void (*run)(void*), void* data, unsigned threads, unsigned) {
  parallel(run, data, threads, [] {});
}
void GOMP_parallel_loop_nonmonotonic_dynamic(void (*run)(void*), void* data, unsigned threads, long start,
                                             long end, long step, long chunk, unsigned) {
  parallel(run, data, threads, [=] { begin_loop(start, end, step, chunk); });
}
bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long* from, long* to) {
  begin_loop(start, end, step, chunk);
  return next(from, to);
}
bool GOMP_loop_nonmonotonic_dynamic_next(long* from, long* to) { return next(from, to); }
void GOMP_loop_end() {
  if (me.team) me.team->barrier();
}
void GOMP_loop_end_nowait() {}
void GOMP_barrier() {
  if (me.team) me.team->barrier();
}

}  // extern "C"
