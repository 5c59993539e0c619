// A query's list. Lists that are none are an error on the host, which is not asked while a CUDA graph is
// captured: even then nothing is read that is not there.
#pragma once
#include "common/arrays.h"
#include "common/block.h"
#include "common/rows.h"
#include "listed/abi.h"

namespace memokern {
namespace cuda {

enum { kListThreads = 256, kListWarps = kListThreads / 32 };

struct List {
  i64 first, last;
};
MK_DEVICE i64 within(i64 v, i64 most) { return v < 0 ? 0 : v > most ? most : v; }
MK_DEVICE List list_of(const ListedParams& p, i64 b) {
  return {within(p.start[b], p.m), within(p.start[b + 1], p.m)};
}
MK_DEVICE bool exists(const ListedParams& p, i64 n) { return n >= 0 && n < p.n; }
// The bias of a listed row; -inf where there is no such row.
MK_DEVICE double bias_at(const ListedParams& p, i64 i) {
  if (!p.bias) return 0;
  const i64 n = p.index[i];
  return exists(p, n) ? p.bias[n] : -infinity();
}

}  // namespace cuda
}  // namespace memokern
