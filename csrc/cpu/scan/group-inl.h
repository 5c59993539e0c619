// Which queries of a scan go together, and which are not worth scanning.
#pragma once
#include "cpu/scan/bounds-inl.h"

namespace memokern {
namespace MEMOKERN_ISA_NS {

struct Noise {
  double noise;
  int64_t b;
};
static int noisier(const void* a, const void* b) {
  const Noise &x = *(const Noise*)a, &y = *(const Noise*)b;
  return x.noise > y.noise ? -1 : x.noise < y.noise ? 1 : x.b < y.b ? -1 : 1;
}

// Forms blocks of queries, at most `most` each, of similar noise: what its noisiest query needs, the whole
// block gets. All blocks but the last have NR queries or more.
static void form_blocks(ScanCall& s, const Noise* all, int64_t count, int64_t most) {
  enum { NR = 2 * Vec<float>::W };
  s.count = s.blocks = 0;
  for (int64_t i = 0; i < count; i++) {
    if (s.lists && s.lists[all[i].b].given_up) continue;
    const int64_t first = s.blocks ? s.begin[s.blocks - 1] : 0, held = s.count - first;
    if (s.blocks == 0 || held == most || (held % NR == 0 && all[i].noise < all[first].noise / 4))
      s.begin[s.blocks++] = s.count;
    s.order[s.count++] = all[i].b;
  }
  s.begin[s.blocks] = s.count;
}

// Gives up the queries whose lists would cost more than `most_listed` rows, if what that saves is worth
// reading the rows for a sweep. Since the rows are read then anyway, it also gives up those for which a list
// would save little: those above half of it, or, where two thirds are above half, those above an eighth,
// which may be an error of the sample. Only time depends on it.
static void give_up(ScanCall& s) {
  const double most_listed = (double)s.bound->most_listed;
  double saved = 0;
  int64_t long_ones = 0;
  for (int64_t b = 0; b < s.in->b; b++) {
    saved += dmax(0, s.expected[b] / most_listed - 1);
    long_ones += s.expected[b] > most_listed / 2;
  }
  if (saved < s.bound->reading) return;
  const double longest = 3 * long_ones > 2 * s.count ? most_listed / 8 : most_listed / 2;
  for (int64_t b = 0; b < s.in->b; b++)
    for (int64_t i = 0; i < s.parts && s.expected[b] > longest; i++) s.lists[i * s.in->b + b].given_up = true;
}

// Whether the queries of a block are scanned by blocks of rows: where these are worth it for most of them.
static bool by_blocks(const ScanCall& s, int64_t block) {
  double left = 0;
  for (int64_t i = s.begin[block]; s.in_blocks && i < s.begin[block + 1]; i++) left += s.left[s.order[i]];
  return s.in_blocks && left < kBlocksWorth * (double)(s.begin[block + 1] - s.begin[block]);
}

}  // namespace MEMOKERN_ISA_NS
}  // namespace memokern
