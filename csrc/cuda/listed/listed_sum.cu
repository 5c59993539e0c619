// Sums of listed rows times weights, or factors, in float64. One block owns a query, a part of its list and
// kListThreads features, one in each thread, and streams the part: rows without weight are not read.
#include "listed/lists.h"

namespace memokern {
namespace cuda {

enum { kRowsAhead = 4 };  // rows that are on the way together

MK_PLAIN_KERNEL(kListThreads) memokern_listed_sum(MK_PARAMS(ListedParams, p)) {
  const i64 slabs = (p.d + kListThreads - 1) / kListThreads, slab = block_x() % slabs;
  const i64 b = block_x() / slabs % p.b, part = block_x() / slabs / p.b;
  const List list = list_of(p, b);
  const i64 count = list.last - list.first, d = slab * kListThreads + thread_index();
  const i64 first = list.first + part * count / p.parts, last = list.first + (part + 1) * count / p.parts;
  const double* const weight = p.backward ? p.factor : p.weight;
  const float scale = (float)p.scale, shift = (float)p.shift;
  double sum = 0;
  for (i64 i = first; i < last; i += kRowsAhead) {
    double w[kRowsAhead], y[kRowsAhead];
    MK_UNROLL
    for (int u = 0; u < kRowsAhead; u++) {
      w[u] = i + u < last ? weight[i + u] : 0;
      const i64 n = w[u] != 0 ? p.index[i + u] : 0;
      const bool read = w[u] != 0 && d < p.d && exists(p, n);
      y[u] = read ? value_at<MK_ROWS>(p.rows, n * p.stride + d, scale, shift) : 0;
    }
    MK_UNROLL
    for (int u = 0; u < kRowsAhead; u++)
      if (w[u] != 0) sum += w[u] * y[u];
  }
  if (d < p.d) p.part[(part * p.b + b) * p.d + d] = sum;
}

}  // namespace cuda
}  // namespace memokern
