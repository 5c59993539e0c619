// The dense sweep, its gradients and the nearest rows.
#include <vector>

#include "bind/fields.h"

namespace memokern {
namespace {

void posterior(const py::tuple& rows, const py::tuple& queries, const py::tuple& sums, int threads) {
  const Rows r = rows_from(rows);
  Queries q = queries_from(queries);
  const Sums out = sums_from(sums);
  run(q, [&] { return kernels().posterior(r, q, out, threads); });
}

// first, end: [b] the segment of the rows that each query sees.
void posterior_segments(const py::tuple& rows, const py::tuple& queries, uintptr_t first, uintptr_t end,
                        const py::tuple& sums, int threads) {
  const Rows r = rows_from(rows);
  Queries q = queries_from(queries);
  const Segments of = {pointer<int64_t>(first), pointer<int64_t>(end)};
  const Sums out = sums_from(sums);
  run(q, [&] { return kernels().posterior_segments(r, q, of, out, threads); });
}

void posterior_state(const py::tuple& rows, const py::tuple& queries, const py::tuple& states, int threads) {
  const Rows r = rows_from(rows);
  Queries q = queries_from(queries);
  const States out = states_from(states);
  run(q, [&] { return kernels().posterior_state(r, q, out, threads); });
}

// columns: [7][b] to be written, the shared numbers for each query and its four sums of [b]. What nobody asks
// for is null: mean, residual, columns.
void small_posterior(const py::tuple& rows, uintptr_t x, bool f64, int64_t b, const py::tuple& numbers,
                     uintptr_t bias, uintptr_t mean, uintptr_t residual, uintptr_t columns, int threads) {
  const Rows r = rows_from(rows);
  Fields shared(numbers, "sigma, alpha, temperature", 3);
  std::vector<double> unasked(columns ? 0 : 7 * b);
  double* c = columns ? pointer<double>(columns) : unasked.data();
  for (int i = 0; i < 3; i++) {
    const double number = shared;
    for (int64_t j = 0; j < b; j++) c[i * b + j] = number;
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  Queries q = {pointer<void>(x),      f64,       b,  c,       c + b,  c + 2 * b,
               pointer<double>(bias), kGaussian, {}, nullptr, nullptr};
  const Sums out = {pointer<void>(mean), c + 3 * b, c + 4 * b, c + 5 * b, c + 6 * b, pointer<void>(residual)};
  run(q, [&] { return kernels().posterior(r, q, out, threads); });
}

void posterior_backward(const py::tuple& rows, const py::tuple& queries, const py::tuple& sums,
                        const py::tuple& grads, const py::tuple& out, int threads) {
  const Rows r = rows_from(rows);
  Queries q = queries_from(queries);
  const SumsIn s = sums_in_from(sums), g = sums_in_from(grads);
  const Gradients to = gradients_from(out);
  run(q, [&] { return kernels().posterior_backward(r, q, s, g, to, threads); });
}

void nearest(const py::tuple& rows, uintptr_t x, bool f64, int64_t b, int64_t k, uintptr_t sq_dist,
             uintptr_t index, int threads) {
  const Rows r = rows_from(rows);
  Queries q = {pointer<void>(x), f64, b, nullptr, nullptr, nullptr, nullptr, kGaussian, {}, nullptr, nullptr};
  const Neighbours out = {pointer<double>(sq_dist), pointer<int64_t>(index), k};
  run(q, [&] { return kernels().nearest(r, q, out, threads); });
}

}  // namespace

void bind_dense(py::module_& m) {
  using py::arg;
  m.def("posterior", &posterior, arg("rows"), arg("queries"), arg("sums"), arg("threads"));
  m.def("posterior_segments", &posterior_segments, arg("rows"), arg("queries"), arg("first"), arg("end"),
        arg("sums"), arg("threads"));
  m.def("posterior_state", &posterior_state, arg("rows"), arg("queries"), arg("states"), arg("threads"));
  m.def("small_posterior", &small_posterior, arg("rows"), arg("x"), arg("f64"), arg("b"), arg("numbers"),
        arg("bias"), arg("mean"), arg("residual"), arg("columns"), arg("threads"),
        "The sums of queries that share the numbers sigma, alpha and temperature.");
  m.def("posterior_backward", &posterior_backward, arg("rows"), arg("queries"), arg("sums"), arg("grads"),
        arg("out"), arg("threads"));
  m.def("nearest", &nearest, arg("rows"), arg("x"), arg("f64"), arg("b"), arg("k"), arg("sq_dist"),
        arg("index"), arg("threads"));
}

}  // namespace memokern
