// Which rows can matter, sums over lists of rows, and queries in the coordinates of an index.
#include <cstdlib>
#include <cstring>

#include "bind/fields.h"

namespace memokern {
namespace {

// The lists that a scan found, until Python has a tensor of the right length for them.
struct FoundRows {
  int64_t* index = nullptr;
  int64_t count = 0;
  FoundRows() = default;
  FoundRows(FoundRows&& other) : index(other.index), count(other.count) { other.index = nullptr; }
  ~FoundRows() { free(index); }
  void copy(uintptr_t to) const { memcpy(pointer<void>(to), index, count * sizeof(int64_t)); }
};

FoundRows bound_scan(const py::tuple& rows, const py::tuple& queries, const py::tuple& bounds,
                     uintptr_t start, uintptr_t threshold, uintptr_t level, int threads) {
  const Rows r = rows_from(rows);
  Queries q = queries_from(queries);
  const LogitBounds known = bounds_from(bounds);
  ScanResult out = {pointer<int64_t>(start), pointer<double>(threshold), pointer<int64_t>(level), nullptr};
  FoundRows found;
  run(q, [&] {
    const int status = kernels().bound_scan(r, q, known, out, threads);
    found.index = out.index;
    return status;
  });
  found.count = out.start[q.b];
  return found;
}

void posterior_listed(const py::tuple& rows, const py::tuple& queries, const py::tuple& lists,
                      const py::tuple& sums, int threads) {
  const Rows r = rows_from(rows);
  Queries q = queries_from(queries);
  const RowLists list = lists_from(lists);
  const Sums out = sums_from(sums);
  run(q, [&] { return kernels().posterior_listed(r, q, list, out, threads); });
}

void posterior_listed_backward(const py::tuple& rows, const py::tuple& queries, const py::tuple& lists,
                               const py::tuple& grads, const py::tuple& out, int threads) {
  const Rows r = rows_from(rows);
  Queries q = queries_from(queries);
  const RowLists list = lists_from(lists);
  const SumsIn g = sums_in_from(grads);
  const Gradients to = gradients_from(out);
  run(q, [&] { return kernels().posterior_listed_backward(r, q, list, g, to, threads); });
}

void project(const py::tuple& transform, uintptr_t x, uintptr_t alpha, int64_t b, const py::tuple& out,
             int threads) {
  const CosineTransform t = transform_from(transform);
  Fields f(out, "Projected", 4);
  const Projected to = checked(Projected{f, f, f, f});
  run([&](Watch* watch) {
    return kernels().project(t, pointer<float>(x), pointer<double>(alpha), b, to, watch, threads);
  });
}

// transform: a tuple, or None where the bounds have the projected queries. costs: the fields of SplitCosts,
// or None where no query is given up. Returns how many queries are left to a dense sweep.
int64_t posterior_pruned(const py::tuple& rows, const py::tuple& queries, const py::object& transform,
                         const py::tuple& bounds, const py::object& costs, const py::tuple& sums,
                         const py::tuple& found, int threads) {
  const Rows r = rows_from(rows);
  Queries q = queries_from(queries);
  const LogitBounds known = bounds_from(bounds);
  const bool projects = !transform.is_none(), splits = !costs.is_none();
  CosineTransform t = {};
  if (projects) t = transform_from(py::reinterpret_borrow<py::tuple>(transform));
  SplitCosts c = {};
  if (splits) {
    Fields f(py::reinterpret_borrow<py::tuple>(costs), "SplitCosts", 3);
    c = checked(SplitCosts{f, f, f});
  }
  const Sums out = sums_from(sums);
  Fields f(found, "Pruned", 3);
  const Pruned to = checked(Pruned{f, f, f});
  run(q, [&] {
    return kernels().posterior_pruned(r, q, projects ? &t : nullptr, known, splits ? &c : nullptr, out, to,
                                      threads);
  });
  int64_t left = 0;
  for (int64_t b = 0; b < q.b; b++) left += to.level[b] == 0;
  return left;
}

}  // namespace

void bind_listed(py::module_& m) {
  using py::arg;
  py::class_<FoundRows>(m, "FoundRows")
      .def_readonly("count", &FoundRows::count)
      .def("copy", &FoundRows::copy, arg("to"));
  m.def("bound_scan", &bound_scan, arg("rows"), arg("queries"), arg("bounds"), arg("start"), arg("threshold"),
        arg("level"), arg("threads"));
  m.def("posterior_listed", &posterior_listed, arg("rows"), arg("queries"), arg("lists"), arg("sums"),
        arg("threads"));
  m.def("posterior_listed_backward", &posterior_listed_backward, arg("rows"), arg("queries"), arg("lists"),
        arg("grads"), arg("out"), arg("threads"));
  m.def("posterior_pruned", &posterior_pruned, arg("rows"), arg("queries"), arg("transform"), arg("bounds"),
        arg("costs"), arg("sums"), arg("found"), arg("threads"));
  m.def("project", &project, arg("transform"), arg("x"), arg("alpha"), arg("b"), arg("out"), arg("threads"));
}

}  // namespace memokern
