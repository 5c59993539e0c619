// Rows and arrays of exactly their size, for the programs that run under sanitizers. To be included after the
// kernels, which say what kType and Numbers are.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "emulator.h"

using namespace memokern::cuda;

template <class T>
static std::vector<T> nothing(i64 n) {
  std::vector<T> v(n);
  if (n) memset((void*)v.data(), 0xff, n * sizeof(T));
  return v;
}

// Rows as they are stored, of exactly their size, and their values.
struct Data {
  std::vector<u8> stored;
  std::vector<double> value;
};
static Data rows_of(i64 n, i64 d, double scale, double shift, std::mt19937& random) {
  std::normal_distribution<float> normal;
  Data data;
  data.stored.resize(n * d * Numbers::kBytes);
  data.value.resize(n * d);
  for (i64 i = 0; i < n * d; i++) {
    const float v = normal(random);
    float kept = v;
    if (kType == (int)kF32) {
      memcpy(&data.stored[4 * i], &v, 4);
    } else if (kType == (int)kU8) {
      data.stored[i] = (u8)(random() & 255);
      kept = data.stored[i];
    } else {
      const u16 h = Numbers::kBrain ? emulator::to_brain(v) : emulator::to_half(v);
      memcpy(&data.stored[2 * i], &h, 2);
      kept = Numbers::kBrain ? as_float((u32)h << 16) : emulator::from_half(h);
    }
    data.value[i] = (float)(kept * (float)scale) + (float)shift;
  }
  return data;
}
