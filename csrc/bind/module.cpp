// The Python module memokern._C: pointers and sizes in, the table of one instruction set behind.
// The only file that includes pybind11; memokern/backends/cpu.py checks every argument before it calls here.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "memokern/abi.h"

namespace py = pybind11;
namespace memokern {
namespace {

struct Isa {
  const char* name;
  const Table* (*table)();
  bool test_only;  // not chosen by itself
  bool supported;
};

std::vector<Isa> built() {
  std::vector<Isa> list;
#ifdef MEMOKERN_HAVE_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  list.push_back({"avx512", table_avx512, false, avx512});
  list.push_back({"avx2", table_avx2, false, avx2});
  list.push_back({"avx2w16", table_avx2w16, true, avx2});
#endif
  list.push_back({"baseline", table_baseline, false, true});
  return list;
}

const Table* current = nullptr;

std::string select_isa(const std::string& name) {
  std::string names = "auto", usable;
  for (const Isa& isa : built()) {
    names += std::string(", ") + isa.name;
    if (isa.supported) usable += std::string(usable.empty() ? "" : ", ") + isa.name;
    if (isa.supported && (name == isa.name || (name == "auto" && !isa.test_only))) {
      current = isa.table();
      return current->name;
    }
    if (name == isa.name)
      throw std::runtime_error("this processor lacks what '" + name + "' needs; use one of: auto, " + usable + ", baseline");
  }
  throw std::runtime_error("unknown instruction set '" + name + "'; known: " + names);
}

template <class T> T* ptr(uintptr_t address) { return reinterpret_cast<T*>(address); }

// The lists of a scan, until Python has room for them.
struct Found {
  int64_t* index = nullptr;
  int64_t count = 0;
  Found() = default;
  Found(Found&& other) : index(other.index), count(other.count) { other.index = nullptr; }
  ~Found() { free(index); }
};

void check(int failed) {
  if (failed == 2) throw std::invalid_argument("start must increase from 0 to the length of index, and index must hold numbers of rows");
  if (failed) throw std::bad_alloc();  // MemoryError
}

Rows make_rows(uintptr_t data, int64_t n, int64_t d, int64_t stride, int type, double scale, double shift, uintptr_t center, uintptr_t sq_norms) {
  return {ptr<void>(data), n, d, stride, type, scale, shift, ptr<double>(center), ptr<double>(sq_norms)};
}

Cosine make_cosine(int64_t channels, int64_t height, int64_t width, bool channels_last, uintptr_t turn, uintptr_t down, uintptr_t across, uintptr_t box,
                   int64_t boxes, uintptr_t place, int64_t size, int64_t kept, uintptr_t edges, int64_t bands, uintptr_t center, uintptr_t worth, double largest) {
  return {channels, height, width, channels * height * width, channels_last, ptr<float>(turn), ptr<float>(down), ptr<float>(across), ptr<int64_t>(box), boxes,
          ptr<int32_t>(place), size, kept, ptr<int64_t>(edges), bands, ptr<float>(center), ptr<double>(worth), largest};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "memokern's compiled kernels; called by memokern.backends.cpu.dense";
  select_isa("auto");
  py::class_<Rows>(m, "Rows").def(py::init(&make_rows));
  m.def("select_isa", &select_isa, "Use the kernels of one instruction set ('auto': the widest that runs here); returns its name.");
  m.def("isa", [] { return std::string(current->name); });
  m.def("width", [] { return current->width; }, "Floats of one vector.");
  m.def("isas", [] {
    py::list out;
    for (const Isa& isa : built()) out.append(py::make_tuple(isa.name, isa.supported));
    return out;
  }, "What was built, and whether it runs here: [(name, supported)].");
#ifdef _OPENMP
  m.attr("openmp") = true;
#else
  m.attr("openmp") = false;
#endif
  m.def("posterior", [](const Rows& rows, bool f64, uintptr_t x, int64_t b, uintptr_t sigma, uintptr_t alpha, uintptr_t temperature, uintptr_t bias, int kernel,
                        int threads, uintptr_t mean, uintptr_t log_z, uintptr_t mean_logit, uintptr_t mean_bias, uintptr_t weight_sq) {
    const Queries q = {ptr<void>(x), b, ptr<double>(sigma), ptr<double>(alpha), ptr<double>(temperature), ptr<double>(bias), kernel};
    const Posterior out = {ptr<void>(mean), ptr<double>(log_z), ptr<double>(mean_logit), ptr<double>(mean_bias), ptr<double>(weight_sq)};
    int failed;
    {
      py::gil_scoped_release release;
      failed = current->posterior(rows, q, out, f64, threads);
    }
    check(failed);
  });
  m.def("mean", [](const Rows& rows, bool f64, uintptr_t x, int64_t b, double sigma, double alpha, double temperature, uintptr_t bias, int threads, uintptr_t mean) {
    std::vector<double> columns(7 * b);  // the numbers of each query, and room for its four sums
    double* c = columns.data();
    const double numbers[3] = {sigma, alpha, temperature};
    for (int i = 0; i < 3; i++)
      for (int64_t j = 0; j < b; j++) c[i * b + j] = numbers[i];
    const Queries q = {ptr<void>(x), b, c, c + b, c + 2 * b, ptr<double>(bias), kGaussian};
    const Posterior out = {ptr<void>(mean), c + 3 * b, c + 4 * b, c + 5 * b, c + 6 * b};
    int failed;
    {
      py::gil_scoped_release release;
      failed = current->posterior(rows, q, out, f64, threads);
    }
    check(failed);
  }, "The posterior's mean alone, of queries that share their numbers.");
  m.def("backward", [](const Rows& rows, bool f64, uintptr_t x, int64_t b, uintptr_t sigma, uintptr_t alpha, uintptr_t temperature, uintptr_t bias, int kernel,
                       int threads, uintptr_t mean, uintptr_t stats, uintptr_t g_mean, uintptr_t g_stats, uintptr_t grad_x, uintptr_t grad_sigma,
                       uintptr_t grad_alpha, uintptr_t grad_temperature, uintptr_t grad_bias) {
    const Queries q = {ptr<void>(x), b, ptr<double>(sigma), ptr<double>(alpha), ptr<double>(temperature), ptr<double>(bias), kernel};
    const double *s = ptr<double>(stats), *g = ptr<double>(g_stats);
    const Gradients io = {ptr<double>(mean), s, s + b, s + 2 * b, s + 3 * b, ptr<double>(g_mean), g, g + b, g + 2 * b, g + 3 * b,
                          ptr<void>(grad_x), ptr<double>(grad_sigma), ptr<double>(grad_alpha), ptr<double>(grad_temperature), ptr<double>(grad_bias)};
    int failed;
    {
      py::gil_scoped_release release;
      failed = current->backward(rows, q, io, f64, threads);
    }
    check(failed);
  }, "stats, g_stats: [4, b] log_z, mean_logit, mean_bias, weight_sq, and their gradients");
  m.def("nearest", [](const Rows& rows, bool f64, uintptr_t x, int64_t b, int64_t k, int threads, uintptr_t sq_dist, uintptr_t index) {
    const Queries q = {ptr<void>(x), b, nullptr, nullptr, nullptr, nullptr, kGaussian};
    const Nearest out = {k, ptr<double>(sq_dist), ptr<int64_t>(index)};
    int failed;
    {
      py::gil_scoped_release release;
      failed = current->nearest(rows, q, out, f64, threads);
    }
    check(failed);
  });
  py::class_<Found>(m, "Found")
      .def_readonly("count", &Found::count)
      .def("copy", [](const Found& found, uintptr_t to) { memcpy(ptr<void>(to), found.index, found.count * sizeof(int64_t)); });
  m.def("bound_scan", [](const Rows& rows, bool f64, uintptr_t x, int64_t b, uintptr_t sigma, uintptr_t alpha, uintptr_t temperature, uintptr_t bias, uintptr_t coarse,
                         uintptr_t fine, bool half, uintptr_t z, uintptr_t norms, uintptr_t margin, uintptr_t sq, uintptr_t dims, uintptr_t first_band, int64_t levels,
                         int64_t bands, double eps, int64_t cap, int threads, uintptr_t start, uintptr_t threshold, uintptr_t level) {
    const Queries q = {ptr<void>(x), b, ptr<double>(sigma), ptr<double>(alpha), ptr<double>(temperature), ptr<double>(bias), kGaussian};
    const Bounds bounds = {ptr<float>(coarse), ptr<void>(fine), ptr<float>(z), ptr<float>(norms), ptr<double>(margin), ptr<double>(sq), ptr<int64_t>(dims),
                           ptr<int64_t>(first_band), levels, bands, half, eps, cap};
    Lists out = {ptr<int64_t>(start), ptr<double>(threshold), ptr<int64_t>(level), nullptr};
    Found found;
    int failed;
    {
      py::gil_scoped_release release;
      failed = current->bound_scan(rows, q, bounds, out, f64, threads);
    }
    found.index = out.index;
    check(failed);
    found.count = out.start[b];
    return found;
  });
  m.def("support", [](const Rows& rows, bool f64, uintptr_t x, int64_t b, uintptr_t sigma, uintptr_t alpha, uintptr_t temperature, uintptr_t bias, uintptr_t start,
                      uintptr_t index, int64_t count, int threads, uintptr_t mean, uintptr_t log_z, uintptr_t mean_logit, uintptr_t mean_bias, uintptr_t weight_sq) {
    const Queries q = {ptr<void>(x), b, ptr<double>(sigma), ptr<double>(alpha), ptr<double>(temperature), ptr<double>(bias), kGaussian};
    const Posterior out = {ptr<void>(mean), ptr<double>(log_z), ptr<double>(mean_logit), ptr<double>(mean_bias), ptr<double>(weight_sq)};
    int failed;
    {
      py::gil_scoped_release release;
      failed = current->support(rows, q, {ptr<int64_t>(start), ptr<int64_t>(index), count}, out, f64, threads);
    }
    check(failed);
  });
  m.def("support_backward", [](const Rows& rows, bool f64, uintptr_t x, int64_t b, uintptr_t sigma, uintptr_t alpha, uintptr_t temperature, uintptr_t bias,
                               uintptr_t start, uintptr_t index, int64_t count, int threads, uintptr_t g_mean, uintptr_t g_stats, uintptr_t grad_x, uintptr_t grad_sigma,
                               uintptr_t grad_alpha, uintptr_t grad_temperature, uintptr_t grad_bias) {
    const Queries q = {ptr<void>(x), b, ptr<double>(sigma), ptr<double>(alpha), ptr<double>(temperature), ptr<double>(bias), kGaussian};
    const double* g = ptr<double>(g_stats);
    const Gradients io = {nullptr, nullptr, nullptr, nullptr, nullptr, ptr<double>(g_mean), g, g + b, g + 2 * b, g + 3 * b,
                          ptr<void>(grad_x), ptr<double>(grad_sigma), ptr<double>(grad_alpha), ptr<double>(grad_temperature), ptr<double>(grad_bias)};
    int failed;
    {
      py::gil_scoped_release release;
      failed = current->support_backward(rows, q, {ptr<int64_t>(start), ptr<int64_t>(index), count}, io, f64, threads);
    }
    check(failed);
  }, "The weights are taken anew: of the forward results none is needed.");
  py::class_<Cosine>(m, "Cosine").def(py::init(&make_cosine));
  m.def("project", [](const Cosine& basis, uintptr_t x, uintptr_t alpha, int64_t b, int threads, uintptr_t z, uintptr_t norms, uintptr_t margin, uintptr_t sq) {
    int failed;
    {
      py::gil_scoped_release release;
      failed = current->project(basis, ptr<float>(x), ptr<double>(alpha), b, ptr<float>(z), ptr<float>(norms), ptr<double>(margin), ptr<double>(sq), threads);
    }
    check(failed);
  });
  m.def("exp", [](bool f64, uintptr_t x, uintptr_t y, int64_t n, bool two) {
    if (f64) current->exp_f64(ptr<double>(x), ptr<double>(y), n, two);
    else current->exp_f32(ptr<float>(x), ptr<float>(y), n, two);
  }, "The kernels' exponential, for its test.");
  m.def("merge", [](uintptr_t a, uintptr_t b, uintptr_t factors) { current->merge(ptr<double>(a), ptr<double>(b), ptr<double>(factors)); },
        "The kernels' merge of two states, for its test.");
}

}  // namespace memokern
