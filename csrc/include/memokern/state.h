// The state of one query after some of the rows, and the monoid that joins two states.
//
// Lanes, tiles, threads and shards each sweep their rows to a State; merge() joins two of them. The fields
// are those of `State` in memokern/calls/state.py, which defines them: with v = l / T, m is the largest v, s
// the sum of e^(v - m), s_v the sum of e^(v - m) (v - m), s_bias the sum of e^(v - m) bias and s_sq the sum
// of e^(2 (v - m)). Of two states with different keys only the one with the smaller key counts; the key is
// the squared distance at sigma = 0. The accumulators, the sums of e^(v - m) (y - center) and of
// e^(v - m) (alpha y - x), lie elsewhere: merge() says what to multiply them by.
//
// The functions are `static`, so that every source file keeps a copy for its own instruction set.
#pragma once

namespace memokern {

struct State {
  double key, m, s, s_v, s_bias, s_sq;
};

// The state of no rows, which changes nothing when it is merged.
__attribute__((always_inline)) static inline State empty_state() {
  const State none = {__builtin_inf(), -__builtin_inf(), 0, 0, 0, 0};
  return none;
}

// Makes the sums of a state relative to a larger m. Returns what its accumulator must be multiplied by.
__attribute__((always_inline)) static inline double rescale(State& a, double m) {
  if (a.s == 0) {
    a.m = m;
    return 0;
  }
  if (a.m == m) return 1;
  const double f = __builtin_exp(a.m - m), shift = a.m - m;
  a.s_v = f > 0 ? f * (a.s_v + a.s * shift) : 0;
  a.s *= f;
  a.s_bias *= f;
  a.s_sq *= f * f;
  a.m = m;
  return f;
}

// a becomes the state of the rows of both. fa and fb are what the two accumulators must be multiplied by
// before they are added; an accumulator whose factor is 0 must be left out, whatever it holds.
__attribute__((always_inline)) static inline void merge(State& a, State b, double& fa, double& fb) {
  if (b.s == 0 || a.key < b.key) {
    fa = 1;
    fb = 0;
    return;
  }
  if (a.s == 0 || b.key < a.key) {
    a = b;
    fa = 0;
    fb = 1;
    return;
  }
  const double m = a.m > b.m ? a.m : b.m;
  fa = rescale(a, m);
  fb = rescale(b, m);
  a.s += b.s;
  a.s_v += b.s_v;
  a.s_bias += b.s_bias;
  a.s_sq += b.s_sq;
}

}  // namespace memokern
