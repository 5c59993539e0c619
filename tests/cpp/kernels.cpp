// The portable kernels against plain double loops, without Python: for processors that we have to emulate
// (`make neon`). Prints a line per operation and exits with 1 if any result is off by more than its bound.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "memokern/abi.h"
#include "memokern/state.h"

using namespace memokern;
typedef std::vector<double> Doubles;

static uint64_t seed = 1;
static double uniform() {  // splitmix64
  uint64_t z = (seed += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return (double)((z ^ (z >> 31)) >> 11) * 0x1p-53;
}
static double normal() {
  return std::sqrt(-2 * std::log(1 - uniform())) * std::cos(6.283185307179586 * uniform());
}

struct Case {
  int64_t n, d, b;
  int type;
  bool f64, bias;
  double sigma;
};

struct Data {  // rows as stored, and the same as double
  std::vector<unsigned char> raw;
  Doubles y;
  Rows rows;
  Data(const Case& c) {
    const int size = c.type == kF64 ? 8 : c.type == kF32 ? 4 : c.type == kU8 ? 1 : 2;
    const double scale = c.type == kU8 ? 2 / 255.0 : 1, shift = c.type == kU8 ? -1 : 0;
    raw.resize(c.n * c.d * size);
    for (int64_t i = 0; i < c.n * c.d; i++) {
      double v = 0.5 * normal() + 0.25;
      if (i >= 3 * c.d && i < 4 * c.d) v = y[i - 3 * c.d];  // row 3 is row 0 again
      if (c.type == kF64) {
        std::memcpy(&raw[i * 8], &v, 8);
      } else if (c.type == kU8) {
        raw[i] = i >= 3 * c.d && i < 4 * c.d ? raw[i - 3 * c.d] : (unsigned char)(256 * uniform());
        volatile float product = raw[i] * (float)scale;  // rounded by itself, as a value's is
        v = product + (float)shift;
      } else {
        float f = (float)v;
        uint32_t bits;
        std::memcpy(&bits, &f, 4);
        if (c.type == kBF16) bits &= 0xffff0000u;
        std::memcpy(&f, &bits, 4);
        const uint16_t half = (uint16_t)(bits >> 16);
        if (c.type == kBF16)
          std::memcpy(&raw[i * 2], &half, 2);
        else
          std::memcpy(&raw[i * 4], &f, 4);
        v = f;
      }
      y.push_back(v);
    }
    rows = {raw.data(), c.n, c.d, c.d, c.type, scale, shift, nullptr, nullptr};
  }
};

struct Truth {  // of one query
  Doubles mean, grad, w, r2;
  double log_z;
  Truth(const Case& c, const Doubles& y, const double* x, double alpha, const Doubles& bias, const Doubles& g)
      : mean(c.d), grad(c.d), w(c.n), r2(c.n) {
    double top = -std::numeric_limits<double>::infinity(), z = 0;
    for (int64_t n = 0; n < c.n; n++) {
      for (int64_t d = 0; d < c.d; d++)
        r2[n] += (x[d] - alpha * y[n * c.d + d]) * (x[d] - alpha * y[n * c.d + d]);
      w[n] = -r2[n] / (2 * c.sigma * c.sigma) + (bias.empty() ? 0 : bias[n]);
      top = std::max(top, w[n]);
    }
    for (double& v : w) z += v = std::exp(v - top);
    for (double& v : w) v /= z;
    log_z = top + std::log(z);
    double gm = 0;
    for (int64_t n = 0; n < c.n; n++)
      for (int64_t d = 0; d < c.d; d++) mean[d] += w[n] * y[n * c.d + d];
    for (int64_t d = 0; d < c.d; d++) gm += g[d] * mean[d];
    for (int64_t n = 0; n < c.n; n++) {
      double gy = -gm;
      for (int64_t d = 0; d < c.d; d++) gy += g[d] * y[n * c.d + d];
      for (int64_t d = 0; d < c.d; d++)
        grad[d] += alpha / (c.sigma * c.sigma) * w[n] * gy * (y[n * c.d + d] - mean[d]);
    }
  }
};

static double worst[6];  // error over its bound: mean, log_z, grad_x, nearest, listed, joined states
static void note(int what, double error, double bound, const Case& c) {
  const double ratio = error / bound;
  if (!(ratio <= worst[what])) worst[what] = ratio;
  if (!(ratio <= 1))
    std::printf("operation %d: error %g, bound %g: N=%d D=%d B=%d type=%d f64=%d sigma=%g\n", what, error,
                bound, (int)c.n, (int)c.d, (int)c.b, c.type, c.f64, c.sigma);
}

struct Numbers {  // float or double, as a kernel computes
  Doubles wide;
  std::vector<float> narrow;
  bool f64;
  Numbers(int64_t n, bool f64) : wide(f64 ? n : 0), narrow(f64 ? 0 : n), f64(f64) {}
  void* data() { return f64 ? (void*)wide.data() : (void*)narrow.data(); }
  double at(int64_t i) const { return f64 ? wide[i] : narrow[i]; }
  Doubles values() const { return f64 ? wide : Doubles(narrow.begin(), narrow.end()); }
};
static Sums sums_of(Numbers& mean, Doubles& stats, int64_t b, Numbers& residual) {
  return {mean.data(), &stats[0], &stats[b], &stats[2 * b], &stats[3 * b], residual.data()};
}

struct Joined {  // the states of two parts of the rows, merged and normalised
  Doubles mean, log_z;
  int failed;
  Joined(const Table& table, const Rows& rows, const Queries& in) : log_z(in.b), failed(0) {
    const int64_t D = rows.d, cut = rows.n / 3;
    Doubles columns[2], center[2];
    Numbers acc[2] = {Numbers(in.b * D, in.f64), Numbers(in.b * D, in.f64)};
    Numbers residual(in.b * D, in.f64);
    for (int i = 0; i < 2; i++) {
      Rows part = rows;
      Queries q = in;
      part.n = i ? rows.n - cut : cut;
      if (part.n == 0) part.n = rows.n;  // of a single row both parts are the whole
      const int64_t first = i ? rows.n - part.n : 0, bytes[] = {8, 4, 2, 2, 1};
      part.data = (const char*)rows.data + first * rows.stride * bytes[rows.type];
      if (in.bias) q.bias = in.bias + first;
      columns[i].resize(6 * in.b);
      center[i].resize(D);
      double* at = columns[i].data();
      const States to = {at,
                         at + in.b,
                         at + 2 * in.b,
                         at + 3 * in.b,
                         at + 4 * in.b,
                         at + 5 * in.b,
                         acc[i].data(),
                         residual.data(),
                         center[i].data()};
      failed |= table.posterior_state(part, q, to, 2);
    }
    for (int64_t b = 0; b < in.b; b++) {
      State s[2];
      for (int i = 0; i < 2; i++) {
        const double* at = columns[i].data() + b;
        s[i] = {at[0], at[in.b], at[2 * in.b], at[3 * in.b], at[4 * in.b], at[5 * in.b]};
      }
      const double weight[2] = {s[0].s, s[1].s};
      double f[2];
      merge(s[0], s[1], f[0], f[1]);
      log_z[b] = s[0].m + std::log(s[0].s) - (cut == 0 ? std::log(2) : 0);
      for (int64_t d = 0; d < D; d++) {
        double sum = 0;
        for (int i = 0; i < 2; i++)
          if (f[i] != 0) sum += f[i] * (acc[i].at(b * D + d) + weight[i] * center[i][d]);
        mean.push_back(sum / s[0].s);
      }
    }
  }
};

static void check(const Table& table, const Case& c) {
  Data data(c);
  Doubles bias, x(c.b * c.d), sigma(c.b, c.sigma), alpha(c.b), one(c.b, 1.0), g(c.b * c.d), zero(c.b);
  std::vector<float> xf(c.b * c.d);
  if (c.bias)
    for (int64_t n = 0; n < c.n; n++)
      bias.push_back(n % 5 == 4 ? -std::numeric_limits<double>::infinity() : normal());
  for (int64_t b = 0; b < c.b; b++) {
    alpha[b] = 1 - 0.5 * (b % 3);
    for (int64_t d = 0; d < c.d; d++) {
      xf[b * c.d + d] = (float)(alpha[b] * data.y[(b % c.n) * c.d + d] + c.sigma * normal());
      x[b * c.d + d] = xf[b * c.d + d];
      g[b * c.d + d] = normal();
    }
  }
  const void* query = c.f64 ? (const void*)x.data() : (const void*)xf.data();
  const double* row_bias = c.bias ? bias.data() : nullptr;
  const Queries in = {query, c.f64, c.b, sigma.data(), alpha.data(), one.data(), row_bias, kGaussian};
  Numbers mean(c.b * c.d, c.f64), listed_mean(c.b * c.d, c.f64), grad_x(c.b * c.d, c.f64),
      residual(c.b * c.d, c.f64);
  Doubles stats(4 * c.b), listed_stats(4 * c.b), grads(3 * c.b), grad_bias(c.n);
  int failed = table.posterior(data.rows, in, sums_of(mean, stats, c.b, residual), 2);
  const Doubles mean64 = mean.values();
  const SumsIn forward = {mean64.data(), &stats[0], &stats[c.b], &stats[2 * c.b], &stats[3 * c.b]};
  const SumsIn given = {g.data(), zero.data(), zero.data(), zero.data(), zero.data()};
  const Gradients out = {grad_x.data(), &grads[0], &grads[c.b], &grads[2 * c.b],
                         c.bias ? grad_bias.data() : nullptr};
  failed |= table.posterior_backward(data.rows, in, forward, given, out, 2);
  const int64_t k = std::min<int64_t>(2, c.n);
  Doubles dist(c.b * k);
  std::vector<int64_t> index(c.b * k), start(c.b + 1), list;
  failed |= table.nearest(data.rows, in, {dist.data(), index.data(), k}, 2);
  for (int64_t b = 0; b < c.b; b++) {
    for (int64_t n = 0; n < c.n; n++) list.push_back(n);
    start[b + 1] = (int64_t)list.size();
  }
  const RowLists lists = {start.data(), list.data(), (int64_t)list.size()};
  failed |=
      table.posterior_listed(data.rows, in, lists, sums_of(listed_mean, listed_stats, c.b, residual), 2);
  const Joined joined(table, data.rows, in);
  failed |= joined.failed;
  if (failed) std::exit(2);
  const double u = c.f64 ? 1e-12 : 1e-5;  // weights to 1e-4 and means to 1e-5 in float
  for (int64_t b = 0; b < c.b; b++) {
    const Doubles gq(g.begin() + b * c.d, g.begin() + (b + 1) * c.d);
    const Truth t(c, data.y, &x[b * c.d], alpha[b], bias, gq), near(c, data.y, &x[b * c.d], 1, bias, gq);
    double size = 0, off = 0, off2 = 0, off3 = 0, gs = 0, goff = 0, spread = 0, gn = 0;
    for (double v : data.y) size = std::max(size, std::fabs(v));
    for (int64_t d = 0; d < c.d; d++) {
      off = std::max(off, std::fabs(mean.at(b * c.d + d) - t.mean[d]));
      off3 = std::max(off3, std::fabs(joined.mean[b * c.d + d] - t.mean[d]));
      off2 = std::max(off2, std::fabs(listed_mean.at(b * c.d + d) - t.mean[d]));
      gs += t.grad[d] * t.grad[d];
      goff += (grad_x.at(b * c.d + d) - t.grad[d]) * (grad_x.at(b * c.d + d) - t.grad[d]);
      gn += gq[d] * gq[d];
    }
    for (int64_t n = 0; n < c.n; n++)
      for (int64_t d = 0; d < c.d; d++)
        spread += t.w[n] * (data.y[n * c.d + d] - t.mean[d]) * (data.y[n * c.d + d] - t.mean[d]);
    note(0, off, u * size, c);
    note(1, std::fabs(stats[b] - t.log_z), (c.f64 ? 1e-12 : 1e-6) * (10 + std::fabs(t.log_z)), c);
    // Weights right to 10 u move grad_x by at most that share of (|alpha| / sigma^2) |g| E|y - mean|^2, a few
    // times over. Where one row has all the weight, what is left: the mean's rounding in <g, y - mean>, of
    // which the sweep takes all but its own, times terms that cancel: as large as the rows and the query.
    const double e = c.f64 ? 4.4e-16 : 2.4e-7, is2 = 1 / (c.sigma * c.sigma),
                 r = std::sqrt(*std::max_element(t.r2.begin(), t.r2.end()));
    note(2, std::sqrt(goff),
         40 * u * (std::sqrt(gs) + std::fabs(alpha[b]) * is2 * std::sqrt(gn) * spread) +
             e * e * is2 * std::sqrt(gn * c.d) * (size + std::fabs(data.rows.shift)) *
                 (r + size + std::fabs(data.rows.shift)),
         c);
    double first = std::numeric_limits<double>::infinity();
    for (double v : near.r2) first = std::min(first, v);
    note(3, std::fabs(dist[b * k] - first), 1e-13 * (1 + first), c);
    note(4, off2, (c.f64 ? 1e-12 : 2e-7) * size, c);
    note(5, off3, u * size, c);
    note(5, std::fabs(joined.log_z[b] - t.log_z), (c.f64 ? 1e-12 : 1e-6) * (10 + std::fabs(t.log_z)), c);
  }
}

int main() {
  const Table& table = *table_baseline();
  int cases = 0;
  for (int64_t n : {1, 2, 50, 300})
    for (int64_t d : {1, 2, 5, 16, 33, 130})
      for (int64_t b : {1, 4, 9, 40})
        for (int type : {kF64, kF32, kBF16, kU8})
          for (double sigma : {1e-2, 0.3, 5.0}) {
            check(table, {n, d, b, type, type == kF64, cases % 3 == 0 && n > 4, sigma});
            cases++;
          }
  const char* names[] = {"posterior mean", "posterior log_z", "gradient for x",
                         "nearest",        "sums over lists", "joined states"};
  bool good = true;
  for (int i = 0; i < 6; i++) {
    std::printf("%-16s largest error %.3f of its bound\n", names[i], worst[i]);
    good &= worst[i] <= 1;
  }
  std::printf("%d cases on %s, %d floats a vector: %s\n", cases, table.name, table.width,
              good ? "right" : "WRONG");
  return good ? 0 : 1;
}
