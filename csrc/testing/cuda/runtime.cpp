// The emulated machine: threads as fibres, barriers, operations of a warp, late copies.
//
// A thread that cannot go on waits until a word differs from what it was. One warp goes as far as it can
// before the next one runs, which is the order most apart from lockstep. When no thread can go on, a copy
// that is under way is completed; when there is none, the kernel hangs.
#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <map>
#include <random>
#include <vector>

#include "fibers.h"
#include "numbers.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace memokern {
namespace cuda {
namespace emulator {

using emulator_fibers::Fiber;
using emulator_fibers::hb_acquire;
using emulator_fibers::hb_release;

struct Block;

// What a warp's lanes do together.
struct Meeting {
  int arrived = 0;
  u32 generation = 0;
  Together what = kSync;
  Place at{};
  alignas(16) u8 slots[2][32][64];  // in turn, so that a lane may be late to read
  char hb[2];
};

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  int index = 0;
  bool done = false, arrived = false;  // arrived: at the cluster's barrier, and has not waited yet
  const u32* word = nullptr;           // it waits while *word == last
  u32 last = 0, arrival = 0;
  const char* waits = "";
  Place at{};
};

// Threads that wait for all others. Those that have left do not count.
struct Gate {
  int arrived = 0;
  u32 generation = 0;
  bool any[2] = {false, false};
  Place at{};
  char hb[2];
};

struct Block {
  int rank = 0, live = 0;
  u8* memory = nullptr;
  std::vector<Thread> threads;
  std::vector<Meeting> warps;
  Gate gate;
};

// A barrier that counts bytes: one arrival, and as many bytes as are expected, end a phase.
struct Barrier {
  u32 phase = 0;
  bool arrived = false;
  i64 missing = 0;
  char hb[2];
};

struct Copy {
  u8* to;
  const u8* from;
  u32 bytes;
  u64* barrier;
};

static struct {
  std::vector<Block> blocks;
  std::map<const u64*, Barrier> barriers;
  std::vector<Copy> copies;
  Gate gate;  // of the cluster
  int live = 0, cluster = 0, clusters = 0, y = 0;
  i64 bytes = 0;
  Thread* now = nullptr;
  Body body = nullptr;
  const void* params = nullptr;
  char began, ended;  // for ThreadSanitizer
} it;

[[noreturn]] __attribute__((format(printf, 1, 2))) static void die(const char* format, ...) {
  va_list args;
  va_start(args, format);
  fprintf(stderr, "emulator: ");
  vfprintf(stderr, format, args);
  fprintf(stderr, " (cluster %d)\n", it.cluster);
  va_end(args);
  int said = 0;
  for (auto& b : it.blocks)
    for (auto& t : b.threads)
      if (!t.done && t.word && said++ < 8)
        fprintf(stderr, "  block %d thread %d waits in %s at %s:%d\n", b.rank, t.index, t.waits, t.at.file,
                t.at.line);
  abort();
}

// Lets others run until *word changes.
static void wait_for(const u32* word, const char* what, Place at) {
  Thread* t = it.now;
  t->word = word;
  t->last = *word;
  t->waits = what;
  t->at = at;
  emulator_fibers::switch_to_main(t->fiber);
  t->word = nullptr;
}

static void open_gate(Gate& g) {
  g.arrived = 0;
  g.generation++;
  g.any[g.generation & 1] = false;
}

static void run_thread() {
  emulator_fibers::entered();
  hb_acquire(&it.began);
  it.body(it.params);
  Thread* t = it.now;
  if (t->arrived)
    die("block %d thread %d left after it arrived at the cluster's barrier", t->block->rank, t->index);
  t->done = true;
  Block& b = *t->block;
  if (--b.live && b.gate.arrived == b.live) open_gate(b.gate);
  if (--it.live && it.gate.arrived == it.live) open_gate(it.gate);
  hb_release(&it.ended);
  emulator_fibers::switch_to_main(t->fiber, true);
  abort();
}

int thread_index() { return it.now->index; }
int block_x() { return it.cluster * (int)it.blocks.size() + it.now->block->rank; }
int block_y() { return it.y; }
int rank() { return it.now->block->rank; }
int cluster() { return it.cluster; }
int clusters() { return it.clusters; }
u8* shared_memory() { return it.now->block->memory; }

void guard(const u8* p, i64 bytes) {
  const u8* memory = it.now->block->memory;
  if (p < memory || p + bytes > memory + it.bytes) die("an array of shared memory lies outside of it");
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(p, bytes);
#endif
}

static u32 arrive(Gate& g, int live, bool v, Place at, const char* what) {
  if (!g.arrived)
    g.at = at;
  else if (g.at.line != at.line)
    die("threads meet at different barriers: %s at %s:%d and at %s:%d", what, g.at.file, g.at.line, at.file,
        at.line);
  const u32 generation = g.generation;
  g.any[generation & 1] |= v;
  hb_release(&g.hb[generation & 1]);
  if (++g.arrived == live) open_gate(g);
  return generation;
}

bool block_any(bool v, Place at) {
  Block& b = *it.now->block;
  const u32 generation = arrive(b.gate, b.live, v, at, "the block's");
  if (b.gate.generation == generation) wait_for(&b.gate.generation, "the block's barrier", at);
  hb_acquire(&b.gate.hb[generation & 1]);
  return b.gate.any[generation & 1];
}
void block_sync(Place at) { block_any(false, at); }

void cluster_arrive(Place at) {
  if (it.now->arrived) die("a thread arrives twice at the cluster's barrier, %s:%d", at.file, at.line);
  it.now->arrived = true;
  it.now->arrival = arrive(it.gate, it.live, false, at, "the cluster's");
}
void cluster_wait(Place at) {
  if (!it.now->arrived)
    die("a thread waits at the cluster's barrier before it arrives, %s:%d", at.file, at.line);
  it.now->arrived = false;
  if (it.gate.generation == it.now->arrival) wait_for(&it.gate.generation, "the cluster's barrier", at);
  hb_acquire(&it.gate.hb[it.now->arrival & 1]);
}

void* remote(const void* local, u32 rank, Place at) {
  const i64 offset = (const u8*)local - it.now->block->memory;
  if (offset < 0 || offset >= it.bytes) die("not in shared memory, %s:%d", at.file, at.line);
  if (rank >= it.blocks.size()) die("no block %u in the cluster, %s:%d", rank, at.file, at.line);
  Block& b = it.blocks[rank];
  if (b.live == 0) die("block %u has left, and its shared memory with it, %s:%d", rank, at.file, at.line);
  return b.memory + offset;
}

const u8* exchange(Together what, const void* v, int bytes, Place at) {
  Thread* t = it.now;
  Meeting& m = t->block->warps[t->index / 32];
  const int lane = t->index & 31, lanes = std::min<int>(32, (int)t->block->threads.size() - t->index + lane);
  const u32 generation = m.generation;
  if (!m.arrived) {
    m.what = what;
    m.at = at;
  } else if (m.what != what || m.at.line != at.line) {
    die("lanes of a warp are in different operations: %s:%d and %s:%d", m.at.file, m.at.line, at.file,
        at.line);
  }
  memcpy(m.slots[generation & 1][lane], v, bytes);
  hb_release(&m.hb[generation & 1]);
  if (++m.arrived == lanes) {
    m.arrived = 0;
    m.generation++;
  } else {
    wait_for(&m.generation, "an operation of the warp", at);
  }
  hb_acquire(&m.hb[generation & 1]);
  return m.slots[generation & 1][0];
}

struct TileArgs {
  float* c;
  u32 a[4], b[2];
};
// The last lane that comes does the work of all.
void multiply_tiles(float* c, const u32* a, u32 b0, u32 b1, bool brain, Place at) {
  TileArgs mine = {c, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  Thread* t = it.now;
  Meeting& m = t->block->warps[t->index / 32];
  const Together what = brain ? kMmaBrain : kMmaHalf;
  const u32 generation = m.generation;
  if (m.arrived != 31 || m.what != what || m.at.line != at.line) {
    exchange(what, &mine, sizeof mine, at);
    return;
  }
  memcpy(m.slots[generation & 1][t->index & 31], &mine, sizeof mine);
  float* to[32];
  u32 left[32][4], right[32][2];
  for (int i = 0; i < 32; i++) {
    TileArgs one;
    if (i == (t->index & 31))
      one = mine;
    else
      memcpy(&one, m.slots[generation & 1][i], sizeof one);
    to[i] = one.c;
    memcpy(left[i], one.a, sizeof one.a);
    memcpy(right[i], one.b, sizeof one.b);
  }
  multiply_warp(to, left, right, brain);
  exchange(what, &mine, sizeof mine, at);
}

void load_matrix(u32* a, const u16* row, Place at) {
  if ((uintptr_t)row & 15) die("a row of a matrix is not at a multiple of 16 bytes, %s:%d", at.file, at.line);
  const u8* all = exchange(kLoadA, &row, sizeof row, at);
  const int lane = it.now->index & 31;
  for (int k = 0; k < 4; k++) {
    const u16* from;
    memcpy(&from, all + 64 * (8 * k + (lane >> 2)), sizeof from);
    memcpy(&a[k], from + 2 * (lane & 3), sizeof a[k]);
  }
}

static Barrier& barrier_at(u64* b, Place at) {
  const auto found = it.barriers.find(b);
  if (found == it.barriers.end()) die("there is no barrier, %s:%d", at.file, at.line);
  return found->second;
}
static void end_phase(Barrier& b) {
  if (!b.arrived || b.missing != 0) return;
  b.arrived = false;
  b.phase++;
}
void barrier_init(u64* b) {
  *b = 0;
  it.barriers[b] = Barrier();
}
void barrier_expect(u64* at_memory, u32 bytes, Place at) {
  Barrier& b = barrier_at(at_memory, at);
  if (b.arrived) die("a barrier that expects bytes is told of more, %s:%d", at.file, at.line);
  b.arrived = true;
  b.missing += bytes;
  hb_release(&b.hb[b.phase & 1]);
  end_phase(b);
}
void barrier_wait(u64* at_memory, u32 parity, Place at) {
  Barrier& b = barrier_at(at_memory, at);
  if ((b.phase & 1) == parity) wait_for(&b.phase, "a barrier that counts bytes", at);
  hb_acquire(&b.hb[parity]);
}

void bulk_copy(void* to, const void* from, u32 bytes, u64* at_memory, Place at) {
  if (((uintptr_t)to | (uintptr_t)from | bytes) & 15)
    die("a bulk copy is not of multiples of 16 bytes, %s:%d", at.file, at.line);
  const u8* memory = it.now->block->memory;
  if ((u8*)to < memory || (u8*)to + bytes > memory + it.bytes)
    die("a bulk copy goes outside of shared memory, %s:%d", at.file, at.line);
  Barrier& b = barrier_at(at_memory, at);
  // From now on the destination belongs to the copy.
  memset(to, 0xff, bytes);
  hb_release(&b.hb[b.phase & 1]);
  it.copies.push_back({(u8*)to, (const u8*)from, bytes, at_memory});
}

static void complete(size_t i) {
  const Copy c = it.copies[i];
  it.copies[i] = it.copies.back();
  it.copies.pop_back();
  // Not by a function that ThreadSanitizer knows: the copy belongs to the thread that began it.
  for (u32 k = 0; k < c.bytes; k++) ((volatile u8*)c.to)[k] = c.from[k];
  Barrier& b = it.barriers[c.barrier];
  b.missing -= c.bytes;
  if (b.missing < 0) die("more bytes came than a barrier expects");
  end_phase(b);
}

static void run_cluster(std::mt19937& random, bool shuffled) {
  struct Warp {
    Block* block;
    int first;
  };
  std::vector<Warp> order;
  for (auto& b : it.blocks)
    for (size_t i = 0; i < b.threads.size(); i += 32) order.push_back({&b, (int)i});
  while (it.live) {
    if (shuffled) std::shuffle(order.begin(), order.end(), random);
    bool ran = false;
    for (const Warp& w : order)
      for (bool again = true; again;) {
        again = false;
        const int end = std::min<int>(w.first + 32, (int)w.block->threads.size());
        for (int i = w.first; i < end; i++) {
          Thread& t = w.block->threads[i];
          if (t.done || (t.word && *t.word == t.last)) continue;
          ran = again = true;
          it.now = &t;
          emulator_fibers::switch_to(t.fiber);
        }
      }
    if (ran) continue;
    if (it.copies.empty()) die("no thread can go on");
    complete(shuffled ? random() % it.copies.size() : it.copies.size() - 1);
  }
  if (!it.copies.empty()) die("the kernel ends before its copies are complete");
  for (auto& b : it.barriers)
    if (b.second.missing) die("a barrier still expects %lld bytes at the end", b.second.missing);
}

static void begin_block(Block& b, int rank, int threads) {
  b.rank = rank;
  b.live = threads;
  b.gate = Gate();
  b.warps.assign((threads + 31) / 32, Meeting());
  if (posix_memalign((void**)&b.memory, 128, std::max<i64>(it.bytes, 16))) die("no memory");
  memset(b.memory, 0xff, it.bytes);  // NaN
  b.threads.resize(threads);
  for (int i = 0; i < threads; i++) {
    Thread& t = b.threads[i];
    t.block = &b;
    t.index = i;
    t.done = t.arrived = false;
    t.word = nullptr;
    emulator_fibers::prepare(t.fiber, run_thread);
  }
}

void launch(Body body, const void* params, int clusters, int grid_y, int size, int threads, i64 shared_bytes,
            unsigned seed) {
  std::mt19937 random(seed);
  it.body = body;
  it.params = params;
  it.clusters = clusters;
  it.bytes = shared_bytes;
  it.blocks.resize(size);
  for (it.y = 0; it.y < grid_y; it.y++)
    for (it.cluster = 0; it.cluster < clusters; it.cluster++) {
      it.barriers.clear();
      it.copies.clear();
      it.copies.reserve(1 << 16);  // it does not grow within a thread
      it.gate = Gate();
      it.live = size * threads;
      for (int i = 0; i < size; i++) begin_block(it.blocks[i], i, threads);
      hb_release(&it.began);
      run_cluster(random, seed != 0);
      hb_acquire(&it.ended);
      for (auto& b : it.blocks) {
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(b.memory, it.bytes);
#endif
        free(b.memory);
      }
    }
}

}  // namespace emulator
}  // namespace cuda
}  // namespace memokern
