// What is known of a query before the rows are read. One block owns a query: its scaled coordinates, and
// `reach`, which allows for all that rounding can do. The slack is that of the compiled kernels, term by
// term.
#include "scan/query.h"

namespace memokern {
namespace cuda {

enum { kBeginThreads = 128 };

// Infinite where float32 could overflow, or lose sigma^2 b.
MK_DEVICE double reach_of(const ScanParams& p, i64 b) {
  const double unit_roundoff = 6e-8;  // a little above 2^-24: all of the slack is rounded up
  const double sigma = p.sigma[b], temperature = p.temperature[b], a = fabs(p.alpha[b]), sq = p.sq[b];
  const double y_max = sqrt(p.largest[0]), c = sqrt(p.largest[1]), s2 = sigma * sigma;
  const double size = sqrt(sq), span = s2 * temperature * p.span, product = a * size * y_max;
  const double rest = 0.5 * a * a * y_max * y_max + s2 * p.largest[2];
  const double width = (double)(p.k0 + p.bands + 1);
  const double slack = a * p.margin[b] + 64 * unit_roundoff * product + (width + 64) * unit_roundoff * rest +
                       1e-12 * sq + 1e-15 * a * (c + y_max) * (size + a * y_max) + 1e-35;
  // Comparisons with NaN are false.
  const bool usual = sigma > 1e-15 && sigma < 1e15 && temperature > 1e-15 && temperature < 1e15 && a < 1e15 &&
                     sq < 1e30 && p.margin[b] >= 0;
  const bool fits = slack < 1e30 && span < 1e30 && product + rest < 1e30;
  return usual && fits ? 0.5 * sq - span - slack : infinity();
}

MK_PLAIN_KERNEL(kBeginThreads) memokern_scan_begin(MK_PARAMS(ScanParams, p)) {
  const i64 b = block_x(), kept = p.k0 + p.fine_width, width = scaled_width(p);
  const double reach = reach_of(p, b), alpha = p.alpha[b];
  const bool active = reach < infinity();
  for (i64 i = thread_index(); i < width; i += kBeginThreads) {
    const double v =
        i < kept ? alpha * p.z[b * kept + i] : fabs(alpha) * p.norms[b * (p.bands + 1) + i - kept];
    p.scaled[b * width + i] = active ? (float)v : 0;
  }
  if (thread_index() == 0) p.reach[b] = reach;
}

}  // namespace cuda
}  // namespace memokern
