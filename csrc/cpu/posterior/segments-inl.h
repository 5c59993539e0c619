// The posterior of queries that each see a segment of the rows: sweeps over many small sets in one call.
#pragma once
#include "cpu/posterior/posterior-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

// Queries b0 .. b1 - 1 see rows n0 .. n1 - 1.
struct SharedRows {
  int64_t b0, b1, n0, n1;
};

// Neighbouring queries of the same segment together, and how many such there are; -1 where a segment has no
// rows, or rows that do not exist. Without `found` it only counts them.
static int64_t share_rows(const Segments& of, int64_t B, int64_t N, SharedRows* found) {
  int64_t k = 0;
  for (int64_t b = 0; b < B; b++) {
    if (of.first[b] < 0 || of.first[b] >= of.end[b] || of.end[b] > N) return -1;
    if (b > 0 && of.first[b] == of.first[b - 1] && of.end[b] == of.end[b - 1]) {
      if (found) found[k - 1].b1 = b + 1;
      continue;
    }
    if (found) found[k] = {b, b + 1, of.first[b], of.end[b]};
    k++;
  }
  return k;
}

// The sweep of some queries over the rows that they share.
static int posterior_shared(const Rows& rows, const Queries& in, const SharedRows& part, const Sums& out,
                            int threads) {
  const int64_t b0 = part.b0, of_x = b0 * rows.d * (in.f64 ? 8 : 4);
  Rows some = rows;
  some.data = (const char*)rows.data + part.n0 * rows.stride * size_of(rows.type);
  some.n = part.n1 - part.n0;
  if (rows.sq_norms) some.sq_norms += part.n0;
  Queries q = in;
  q.x = (const char*)in.x + of_x;
  q.b = part.b1 - b0;
  q.sigma += b0;
  q.alpha += b0;
  q.temperature += b0;
  if (in.bias) q.bias += part.n0;
  Sums to = out;
  if (out.mean) to.mean = (char*)out.mean + of_x;
  if (out.residual) to.residual = (char*)out.residual + of_x;
  to.log_z += b0;
  to.mean_logit += b0;
  to.mean_bias += b0;
  to.weight_sq += b0;
  return run_posterior(some, q, to, threads);
}

static int run_posterior_segments(const Rows& rows, const Queries& in, const Segments& of, const Sums& out,
                                  int threads) {
  const int64_t count = share_rows(of, in.b, rows.n, nullptr);
  if (count < 0) return kNotLists;
  Arena arena;
  if (!arena.reserve(Arena::bytes<SharedRows>(count))) return kNoMemory;
  SharedRows* parts = arena.take<SharedRows>(count);
  share_rows(of, in.b, rows.n, parts);
  // Many sweeps go to the threads whole; of a few, each is shared by all threads.
  const bool whole = count >= 4 * threads;
  return for_parts(whole ? threads : 1, count, [&](int64_t i, int) {
    return posterior_shared(rows, in, parts[i], out, whole ? 1 : threads);
  });
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
