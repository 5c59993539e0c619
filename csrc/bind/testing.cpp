// The Python module memokern._testing, which only a development build has: parts of the kernels for their
// tests, and where the processor has no AVX-512 the kernels of avx2w16, which importing this module makes
// known to memokern._C.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "bind/fields.h"
#include "testing/hooks.h"

namespace py = pybind11;
namespace memokern {
namespace {

const Hooks& hooks_of(const std::string& isa) {
  const Hooks* all[] = {
#ifdef MEMOKERN_HAVE_X86
      hooks_avx512(), hooks_avx2(),
#endif
#ifdef MEMOKERN_HAVE_AVX2W16
      hooks_avx2w16(),
#endif
      hooks_baseline()};
  for (const Hooks* hooks : all)
    if (isa == hooks->name) return *hooks;
  throw std::invalid_argument("no hooks of '" + isa + "'");
}

void run_exp(const std::string& isa, bool f64, uintptr_t x, uintptr_t y, int64_t n, bool two) {
  const Hooks& hooks = hooks_of(isa);
  if (f64)
    hooks.exp_f64(reinterpret_cast<const double*>(x), reinterpret_cast<double*>(y), n, two);
  else
    hooks.exp_f32(reinterpret_cast<const float*>(x), reinterpret_cast<float*>(y), n, two);
}

void run_merge(const std::string& isa, uintptr_t a, uintptr_t b, uintptr_t factors) {
  hooks_of(isa).merge(reinterpret_cast<State*>(a), reinterpret_cast<const State*>(b),
                      reinterpret_cast<double*>(factors));
}

bool run_pairs(const std::string& isa, const py::tuple& rows, const py::tuple& queries, uintptr_t dots,
               uintptr_t refined, uintptr_t errors) {
  return hooks_of(isa).pairs(rows_from(rows), queries_from(queries), reinterpret_cast<double*>(dots),
                             reinterpret_cast<double*>(refined), reinterpret_cast<double*>(errors));
}

}  // namespace

PYBIND11_MODULE(_testing, m) {
  m.doc() = "Parts of memokern's kernels for their tests, and the AVX2 build of the AVX-512 width";
  m.def("exp", &run_exp, py::arg("isa"), py::arg("f64"), py::arg("x"), py::arg("y"), py::arg("n"),
        py::arg("two"), "y [n] = e^x, or 2^x where `two`, by the kernels' exponential.");
  m.def("merge", &run_merge, py::arg("isa"), py::arg("a"), py::arg("b"), py::arg("factors"),
        "Merge the state b into a, [6] float64 each; factors [2] of their accumulators.");
  m.def(
      "pairs", &run_pairs, py::arg("isa"), py::arg("rows"), py::arg("queries"), py::arg("dots"),
      py::arg("refined"), py::arg("errors"),
      "The first product of a sweep in integers: dots and refined [n][b], errors [b][4], all float64. False "
      "where there is none.");
#ifdef MEMOKERN_HAVE_AVX2W16
  const py::capsule table(table_avx2w16(), "memokern.Table");
  py::module_::import("memokern._C").attr("add_isa")(table, has_avx2());
#endif
}

}  // namespace memokern
