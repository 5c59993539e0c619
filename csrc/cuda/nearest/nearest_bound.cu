// How far a row may be that can be one of the k nearest. One block owns a query. The groups' smallest
// distances are those of k rows and more, so none of the k nearest is farther than the k-th smallest of them,
// which is found bit by bit: floats that are not negative are in the order of their bits.
#include "nearest/neighbours.h"

namespace memokern {
namespace cuda {

enum { kHeld = 16 };  // numbers that a thread keeps; it reads what is more again for every bit

MK_DEVICE constexpr i64 bound_shared_bytes() { return array_bytes(8 * kNearWarps); }

MK_PLAIN_KERNEL(kNearThreads) memokern_nearest_bound(MK_PARAMS(NearestParams, p)) {
  u8* next = shared_memory();
  double* const shared = next_array<double>(next, kNearWarps);
  const i64 b = block_x(), groups = (p.n + kNearRows - 1) / kNearRows;
  const float* const least = p.least + b * groups;
  u32 held[kHeld];
  MK_UNROLL
  for (int i = 0; i < kHeld; i++) {
    const i64 at = thread_index() + i * kNearThreads;
    held[i] = at < groups ? as_bits(least[at]) : 0xffffffffu;
  }
  u32 kth = 0;  // the bits so far
  for (int bit = 30; bit >= 0; bit--) {
    const u32 trial = kth | 1u << bit;
    double below = 0;
    MK_UNROLL
    for (int i = 0; i < kHeld; i++) below += held[i] < trial;
    for (i64 at = thread_index() + kHeld * kNearThreads; at < groups; at += kNearThreads)
      below += as_bits(least[at]) < trial;
    if (block_sum(below, shared, kNearWarps) < (double)p.k) kth = trial;
  }
  if (thread_index() != 0) return;
  // As many rows as k are no farther than that, in float32; the share by which it errs counts twice.
  const double bound = groups < p.k ? infinity() : (double)as_float(kth);
  p.most[b] = rounded_up(most_about(most_about(bound, p.d), p.d));
}

}  // namespace cuda
}  // namespace memokern
