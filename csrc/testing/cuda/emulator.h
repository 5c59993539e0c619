// The names of csrc/cuda/common/device.h on a CPU, for tests: each thread of a block is a fibre, and the
// blocks of a cluster run together. What it checks, and stops at with file and line:
//
// - threads of a block at different barriers, or none left that could go on;
// - lanes of a warp in different operations of the warp;
// - copies whose bytes or alignment are wrong, and barriers that expect other bytes than came;
// - shared memory of a block that has left its kernel.
//
// Shared memory begins as NaN, and so is the destination of a copy until it is complete, which is as late as
// can be, in an order that the seed shuffles. AddressSanitizer sees the gaps between arrays of shared memory;
// ThreadSanitizer sees each thread as a thread, and so a barrier that is missing. Not covered: the order of
// memory between proxies, what mma rounds beyond truncating each sum, and all timing.
#pragma once
#include <math.h>
#include <string.h>

#include "common/abi.h"

#define MK_DEVICE static inline
#define MK_KERNEL(cluster, threads, blocks) static void
#define MK_PLAIN_KERNEL(threads) static void
#define MK_PARAMS(type, name) const type& name
#define MK_UNROLL

namespace memokern {
namespace cuda {

namespace emulator {

// Where in the kernels a call stands.
struct Place {
  const char* file;
  int line;
};
#define MK_HERE {file, line}
#define MK_AT const char *file = __builtin_FILE(), int line = __builtin_LINE()

// What lanes do together. Those of a warp must agree.
enum Together { kSync, kIndex, kBallot, kXor4, kXor8, kMmaHalf, kMmaBrain, kLoadA };

// The runtime is compiled without ThreadSanitizer, which must see kernels only.
int thread_index();
int block_x();
int block_y();
int rank();
int cluster();
int clusters();
u8* shared_memory();
void guard(const u8* p, i64 bytes);
void block_sync(Place at);
bool block_any(bool v, Place at);
// Every lane gives `bytes` bytes; all lanes' come back, 64 apart.
const u8* exchange(Together what, const void* v, int bytes, Place at);
void multiply_tiles(float* c, const u32* a, u32 b0, u32 b1, bool brain, Place at);
void load_matrix(u32* a, const u16* row, Place at);
void cluster_arrive(Place at);
void cluster_wait(Place at);
void* remote(const void* local, u32 rank, Place at);
void barrier_init(u64* b);
void barrier_expect(u64* b, u32 bytes, Place at);
void barrier_wait(u64* b, u32 parity, Place at);
void bulk_copy(void* to, const void* from, u32 bytes, u64* b, Place at);

u16 to_half(float v);
float from_half(u16 h);
u16 to_brain(float v);
u32 half2_subtract(u32 a, u32 b);

typedef void (*Body)(const void* params);
// The body that a kernel is.
template <class P, void (*kKernel)(const P&)>
void body(const void* params) {
  kKernel(*(const P*)params);
}
// Runs a kernel of `clusters` clusters of `size` blocks; grid_y of these where there are several. seed 0:
// warps run in order; else in a random one.
void launch(Body body, const void* params, int clusters, int grid_y, int size, int threads, i64 shared_bytes,
            unsigned seed);

}  // namespace emulator

enum { kGap = 128 };

inline int thread_index() { return emulator::thread_index(); }
inline int lane_index() { return emulator::thread_index() & 31; }
inline int block_x() { return emulator::block_x(); }
inline int block_y() { return emulator::block_y(); }
inline u32 cluster_rank() { return emulator::rank(); }
inline u32 cluster_index() { return emulator::cluster(); }
inline u32 cluster_count() { return emulator::clusters(); }
inline u8* shared_memory() { return emulator::shared_memory(); }
inline void guard(const u8* p, i64 bytes) { emulator::guard(p, bytes); }

inline int warp_index(MK_AT) {
  emulator::exchange(emulator::kIndex, "", 1, MK_HERE);
  return emulator::thread_index() >> 5;
}
inline void block_sync(MK_AT) { emulator::block_sync(MK_HERE); }
inline bool block_any(bool v, MK_AT) { return emulator::block_any(v, MK_HERE); }
inline void warp_sync(MK_AT) { emulator::exchange(emulator::kSync, "", 1, MK_HERE); }
inline u32 warp_ballot(bool v, MK_AT) {
  const u8* all = emulator::exchange(emulator::kBallot, &v, sizeof v, MK_HERE);
  u32 bits = 0;
  for (int i = 0; i < 32; i++) bits |= (u32)(all[64 * i] != 0) << i;
  return bits;
}
inline float warp_xor(float v, int mask, MK_AT) {
  const u8* all = emulator::exchange(emulator::kXor4, &v, sizeof v, MK_HERE);
  memcpy(&v, all + 64 * (lane_index() ^ mask), sizeof v);
  return v;
}
inline double warp_xor(double v, int mask, MK_AT) {
  const u8* all = emulator::exchange(emulator::kXor8, &v, sizeof v, MK_HERE);
  memcpy(&v, all + 64 * (lane_index() ^ mask), sizeof v);
  return v;
}

inline void cluster_arrive(MK_AT) { emulator::cluster_arrive(MK_HERE); }
inline void cluster_wait(MK_AT) { emulator::cluster_wait(MK_HERE); }
struct Remote {
  void* address;
};
inline Remote remote(const void* local, u32 rank, MK_AT) { return {emulator::remote(local, rank, MK_HERE)}; }
inline float load_float(Remote r, int i) { return ((const float*)r.address)[i]; }
inline void store_float(Remote r, int i, float v) { ((float*)r.address)[i] = v; }
inline void store_u16(Remote r, int i, u16 v) { ((u16*)r.address)[i] = v; }

inline void barrier_init(u64* b) { emulator::barrier_init(b); }
inline void barrier_fence() {}
inline void barrier_expect(u64* b, u32 bytes, MK_AT) { emulator::barrier_expect(b, bytes, MK_HERE); }
inline void barrier_wait(u64* b, u32 parity, MK_AT) { emulator::barrier_wait(b, parity, MK_HERE); }
inline void bulk_copy(void* to, const void* from, u32 bytes, u64* b, MK_AT) {
  emulator::bulk_copy(to, from, bytes, b, MK_HERE);
}

template <bool kBrain>
inline void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, MK_AT) {
  emulator::multiply_tiles(c, a, b0, b1, kBrain, MK_HERE);
}
inline void load_a(u32 (&a)[4], const u16* row, MK_AT) { emulator::load_matrix(a, row, MK_HERE); }

template <bool kBrain>
inline u32 pack(float low, float high) {
  if (kBrain) return emulator::to_brain(low) | (u32)emulator::to_brain(high) << 16;
  return emulator::to_half(low) | (u32)emulator::to_half(high) << 16;
}
inline int first_bit(u32 v) { return __builtin_ctz(v); }
inline float half_value(u16 h) { return emulator::from_half(h); }
inline float as_float(u32 v) {
  float f;
  memcpy(&f, &v, sizeof f);
  return f;
}
inline u32 as_bits(float f) {
  u32 v;
  memcpy(&v, &f, sizeof v);
  return v;
}
inline u32 pick_bytes(u32 a, u32 b, u32 order) {
  const u64 all = (u64)b << 32 | a;
  u32 v = 0;
  for (int i = 0; i < 4; i++) v |= (u32)(all >> 8 * (order >> 4 * i & 7) & 255) << 8 * i;
  return v;
}
inline u32 half2_subtract(u32 a, u32 b) { return emulator::half2_subtract(a, b); }
// Tests compile with -ffp-contract=off, so that nothing is fused.
inline float multiply(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline double multiply(double a, double b) { return a * b; }
inline double add(double a, double b) { return a + b; }
inline double infinity() { return __builtin_inf(); }
inline double not_a_number() { return __builtin_nan(""); }

}  // namespace cuda
}  // namespace memokern
