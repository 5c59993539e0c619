// What kernels use of the machine: the only file with PTX. Under g++ the same names come from the emulator
// (csrc/testing/cuda/emulator.h), which runs each thread as a fibre.
//
// Shared memory is named by ordinary pointers; addresses of the shared window are made here.
#pragma once
#include "common/abi.h"

#ifdef __CUDACC__
#define MK_DEVICE __device__ __forceinline__
// blocks: how many share a multiprocessor, which bounds the registers.
#define MK_KERNEL(cluster, threads, blocks) \
  extern "C" __global__ void __cluster_dims__(cluster, 1, 1) __launch_bounds__(threads, blocks)
// Kernels that need no cluster, and may share a multiprocessor with others. Without the second bound the
// assembler rather spills a few bytes than pass its next step of occupancy.
#define MK_PLAIN_KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, 512 / (threads))
#define MK_PARAMS(type, name) const __grid_constant__ type name
#define MK_UNROLL _Pragma("unroll")

namespace memokern {
namespace cuda {

enum { kGap = 0 };  // bytes between the arrays of shared memory; the emulator watches them

// --- where a thread is ------------------------------------------------------------------------------------
MK_DEVICE int thread_index() { return threadIdx.x; }
MK_DEVICE int lane_index() { return threadIdx.x & 31; }
// The same in all lanes, which the compiler cannot know. All lanes come together: never where some are left
// out.
MK_DEVICE int warp_index() { return __shfl_sync(~0u, threadIdx.x >> 5, 0); }
MK_DEVICE int block_x() { return blockIdx.x; }
MK_DEVICE int block_y() { return blockIdx.y; }
MK_DEVICE u32 cluster_rank() {
  u32 r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
MK_DEVICE u32 cluster_index() {
  u32 r;
  asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(r));
  return r;
}
MK_DEVICE u32 cluster_count() {
  u32 r;
  asm volatile("mov.u32 %0, %%nclusterid.x;" : "=r"(r));
  return r;
}
MK_DEVICE u8* shared_memory() {
  extern __shared__ __align__(128) u8 memory[];
  return memory;
}
// The emulator makes what lies behind an array unusable.
MK_DEVICE void guard(const u8*, i64) {}

// --- threads of a block, of a warp ------------------------------------------------------------------------
MK_DEVICE void block_sync() { __syncthreads(); }
MK_DEVICE bool block_any(bool v) { return __syncthreads_or(v); }
MK_DEVICE void warp_sync() { __syncwarp(); }
MK_DEVICE u32 warp_ballot(bool v) { return __ballot_sync(~0u, v); }
MK_DEVICE float warp_xor(float v, int mask) { return __shfl_xor_sync(~0u, v, mask); }
MK_DEVICE double warp_xor(double v, int mask) { return __shfl_xor_sync(~0u, v, mask); }

// --- blocks of a cluster ----------------------------------------------------------------------------------
// What a thread wrote before it arrives, others see after they have waited.
// All lanes of a warp come together.
MK_DEVICE void cluster_arrive() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
MK_DEVICE void cluster_wait() {
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
MK_DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
// What a block of the cluster has where this one has *local; what follows is at the same distances.
struct Remote {
  u32 address;
};
MK_DEVICE Remote remote(const void* local, u32 rank) {
  Remote r;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r.address) : "r"(shared_address(local)), "r"(rank));
  return r;
}
MK_DEVICE float load_float(Remote r, int i) {
  float v;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(r.address + 4 * i) : "memory");
  return v;
}
MK_DEVICE void store_float(Remote r, int i, float v) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(r.address + 4 * i), "f"(v) : "memory");
}
MK_DEVICE void store_u16(Remote r, int i, u16 v) {
  asm volatile("st.shared::cluster.u16 [%0], %1;" ::"r"(r.address + 2 * i), "h"(v) : "memory");
}

// --- copies to shared memory that a barrier counts --------------------------------------------------------
MK_DEVICE void barrier_init(u64* b) {
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(b)) : "memory");
}
// Before other threads and copies use barriers that were made.
MK_DEVICE void barrier_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// The phase ends when so many bytes have come.
MK_DEVICE void barrier_expect(u64* b, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
}
MK_DEVICE void barrier_wait(u64* b, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(b)),
      "r"(parity)
      : "memory");
  __syncwarp();  // lanes may have left the loop one by one
}
// Addresses and bytes are multiples of 16.
MK_DEVICE void bulk_copy(void* to, const void* from, u32 bytes, u64* b) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(b))
      : "memory");
}

// --- products of tiles ------------------------------------------------------------------------------------
// c += A B for A [16][16], B [16][8], in the layout of mma.m16n8k16: with g = lane / 4 and t = lane % 4, c
// has rows g, g + 8 and columns 2 t, 2 t + 1; a has rows g, g + 8 and columns 2 t, 2 t + 1, + 8; b0 and b1
// have column g and rows 2 t, 2 t + 1, + 8.
template <bool kBrain>
MK_DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if (kBrain)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// A of mma from shared memory: lane l gives the address of row l % 16, column 8 (l / 16).
MK_DEVICE void load_a(u32 (&a)[4], const u16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(shared_address(row)));
}

// --- numbers ----------------------------------------------------------------------------------------------
// Two floats, rounded to nearest, the first in the lower half.
template <bool kBrain>
MK_DEVICE u32 pack(float low, float high) {
  u32 v;
  if (kBrain)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
MK_DEVICE float half_value(u16 h) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(h));
  return v;
}
// The place of the lowest bit that is set.
MK_DEVICE int first_bit(u32 v) { return __ffs(v) - 1; }
MK_DEVICE float as_float(u32 v) { return __uint_as_float(v); }
MK_DEVICE u32 as_bits(float v) { return __float_as_uint(v); }
// Byte i of the result is byte (order >> 4 i) & 7 of b:a.
MK_DEVICE u32 pick_bytes(u32 a, u32 b, u32 order) { return __byte_perm(a, b, order); }
// Two halves less two halves.
MK_DEVICE u32 half2_subtract(u32 a, u32 b) {
  u32 v;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
  return v;
}
// Each rounded by itself: never fused.
MK_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
MK_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
MK_DEVICE double multiply(double a, double b) { return __dmul_rn(a, b); }
MK_DEVICE double add(double a, double b) { return __dadd_rn(a, b); }
MK_DEVICE double infinity() { return __longlong_as_double(0x7ff0000000000000ll); }
MK_DEVICE double not_a_number() { return __longlong_as_double(0x7ff8000000000000ll); }

}  // namespace cuda
}  // namespace memokern

#else
#include "emulator.h"
#endif
