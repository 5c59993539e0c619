// A problem for the kernels, in memory of exactly its size, and what stops a call on its way.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "memokern/abi.h"

using namespace memokern;

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

// An array of exactly n numbers, which begin as NaN, or as -1.
template <class T>
struct Array {
  std::unique_ptr<T[]> held;
  int64_t n;
  explicit Array(int64_t n) : held(new T[n]), n(n) { std::memset((void*)held.get(), 0xff, n * sizeof(T)); }
  T* data() { return held.get(); }
  T& operator[](int64_t i) { return held[i]; }
};
typedef Array<double> Doubles;

struct Case {
  int64_t n, d, b, k;
  int type;
  bool f64, bias, known;
  int weighting;
  double sigma;
  int64_t gap;         // between rows
  int64_t conditions;  // numbers of a row's condition, 0: none; with some, rows are left out too
};

static void fail(const char* what, const Case& c, const Table& table) {
  std::printf("%s, %s: N=%d D=%d B=%d k=%d type=%d f64=%d bias=%d known=%d weighting=%d sigma=%g\n",
              table.name, what, (int)c.n, (int)c.d, (int)c.b, (int)c.k, c.type, c.f64, c.bias, c.known,
              c.weighting, c.sigma);
  std::exit(1);
}

// Stops a call the n-th time that it asks; counts how often it does.
struct Stopper : Watch {
  std::atomic<long> asked{0};
  const long at;
  explicit Stopper(long at) : Watch{&ask}, at(at) {}
  static bool ask(Watch* watch) {
    Stopper& me = *static_cast<Stopper*>(watch);
    return me.asked.fetch_add(1, std::memory_order_relaxed) + 1 >= me.at;
  }
};

struct Problem {
  Case c;
  Array<unsigned char> raw;
  Doubles center, sq_norms, x64, sigma, alpha, temperature, bias, y, conditions, condition, anchor, bandwidth;
  Array<int64_t> leave_out;
  Array<float> x32;
  Rows rows;
  Queries queries;

  static int64_t size_of(int type) { return type == kF64 ? 8 : type == kF32 ? 4 : type == kU8 ? 1 : 2; }
  explicit Problem(const Case& c)
      : c(c),
        raw(((c.n - 1) * (c.d + c.gap) + c.d) * size_of(c.type)),
        center(c.d),
        sq_norms(c.n),
        x64(c.f64 ? c.b * c.d : 1),
        sigma(c.b),
        alpha(c.b),
        temperature(c.b),
        bias(c.n),
        y(c.n * c.d),
        conditions(c.n * c.conditions),
        condition(c.b * c.conditions),
        anchor(c.b * c.conditions),
        bandwidth(c.b),
        leave_out(c.b),
        x32(c.f64 ? 1 : c.b * c.d) {
    const double scale = c.type == kU8 ? 2 / 255.0 : 1, shift = c.type == kU8 ? -1 : 0;
    for (int64_t i = 0; i < c.n; i++)
      for (int64_t j = 0; j < c.d; j++) {
        unsigned char* at = &raw[(i * (c.d + c.gap) + j) * size_of(c.type)];
        y[i * c.d + j] = put(at, i == c.n / 2 ? y[j] : 0.5 * normal(), i == c.n / 2) * scale + shift;
      }
    for (int64_t j = 0; j < c.d; j++) {
      center[j] = 0;
      for (int64_t i = 0; i < c.n; i++) center[j] += y[i * c.d + j] / c.n;
    }
    for (int64_t i = 0; i < c.n; i++) {
      sq_norms[i] = 0;
      for (int64_t j = 0; j < c.d; j++) sq_norms[i] += std::pow(y[i * c.d + j] - center[j], 2);
      bias[i] = i % 7 == 6 ? -INFINITY : normal();
    }
    for (int64_t b = 0; b < c.b; b++) {
      sigma[b] = c.sigma * (1 + b % 3);
      alpha[b] = b % 4 == 3 ? -0.5 : 1;
      temperature[b] = b % 5 == 4 ? 2 : 1;
      for (int64_t j = 0; j < c.d; j++) {
        const double v = y[b % c.n * c.d + j] + (b == 0 ? 0 : 0.1 + c.sigma) * normal();
        (c.f64 ? x64[b * c.d + j] = v : x32[b * c.d + j] = (float)v);
      }
    }
    for (int64_t i = 0; i < c.n * c.conditions; i++) conditions[i] = normal();
    for (int64_t b = 0; b < c.b; b++) {
      bandwidth[b] = b % 5 == 3 ? 0 : 0.5 + b % 3;
      leave_out[b] = b % 3 == 1 ? b % c.n : -1;
      for (int64_t j = 0; j < c.conditions; j++) {  // at bandwidth 0 that of a row
        anchor[b * c.conditions + j] = conditions[b % c.n * c.conditions + j];
        condition[b * c.conditions + j] =
            anchor[b * c.conditions + j] + (bandwidth[b] > 0 ? 1e-3 * normal() : 0);
      }
    }
    if (c.b > 6) (c.f64 ? x64[5 * c.d] = NAN : x32[5 * c.d] = NAN);
    if (c.b > 8) (c.f64 ? x64[7 * c.d] = 1e200 : x32[7 * c.d] = 1e30f);
    rows = {raw.data(),
            c.n,
            c.d,
            c.d + c.gap,
            c.type,
            scale,
            shift,
            c.known ? center.data() : nullptr,
            c.known ? sq_norms.data() : nullptr};
    queries = {c.f64 ? (void*)x64.data() : (void*)x32.data(),
               c.f64,
               c.b,
               sigma.data(),
               alpha.data(),
               temperature.data(),
               c.bias ? bias.data() : nullptr,
               c.weighting,
               {},
               c.conditions ? leave_out.data() : nullptr,
               nullptr};
    if (c.conditions)
      queries.conditions = {conditions.data(), condition.data(), bandwidth.data(), anchor.data(),
                            c.conditions};
  }
  // Stores v, or the raw number of row 0 again, and returns the raw number.
  double put(unsigned char* at, double v, bool again) {
    const int64_t size = size_of(c.type);
    if (again) {
      std::memcpy(at, raw.data() + (at - raw.data()) % ((c.d + c.gap) * size), size);
    } else if (c.type == kF64) {
      std::memcpy(at, &v, 8);
    } else if (c.type == kU8) {
      *at = (unsigned char)(256 * uniform());
    } else if (c.type == kF16) {  // 1.xxx * 2^-3 .. 2^0, of either sign
      const uint16_t bits = (uint16_t)(((int)(2 * uniform()) << 15) | ((int)(12 + 4 * uniform()) << 10) |
                                       (int)(1024 * uniform()));
      std::memcpy(at, &bits, 2);
    } else {
      const float f = (float)v;
      std::memcpy(at, (const char*)&f + (c.type == kBF16 ? 2 : 0), size);
    }
    if (c.type == kF64) {
      std::memcpy(&v, at, 8);
      return v;
    }
    if (c.type == kU8) return *at;
    if (c.type == kF16) {
      uint16_t h;
      std::memcpy(&h, at, 2);
      return (h >> 15 ? -1 : 1) * std::ldexp(1024 + (h & 1023), (h >> 10 & 31) - 25);
    }
    float f = 0;
    std::memcpy((char*)&f + (c.type == kBF16 ? 2 : 0), at, size);
    return f;
  }
};
