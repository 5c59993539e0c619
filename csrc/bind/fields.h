// From Python's arguments to the structs of memokern/abi.h.
//
// Python hands over each struct as a tuple of its fields, in their order: addresses as integers, 0 for null.
// A tuple is read faster than as many arguments of a call, or than an object is made, and small calls are
// counted in microseconds. memokern/backends/cpu/native.py makes the tuples, after the checks.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "bind/interrupt.h"
#include "bind/isa.h"

namespace memokern {
namespace py = pybind11;

class Fields {
 public:
  Fields(const py::tuple& values, const char* name, Py_ssize_t count) : values_(values.ptr()), at_(0) {
    const Py_ssize_t found = PyTuple_GET_SIZE(values_);
    if (found != count)
      throw std::invalid_argument("expected the " + std::to_string(count) + " fields of " + name + ", got " +
                                  std::to_string(found));
  }
  template <class T>
  operator T*() {
    return static_cast<T*>(PyLong_AsVoidPtr(next()));
  }
  operator int64_t() { return PyLong_AsLongLong(next()); }
  operator int() { return static_cast<int>(PyLong_AsLongLong(next())); }
  operator double() { return PyFloat_AsDouble(next()); }
  operator bool() { return PyObject_IsTrue(next()) == 1; }

 private:
  PyObject* next() { return PyTuple_GET_ITEM(values_, at_++); }
  PyObject* values_;
  Py_ssize_t at_;
};

// Raises what the reading of a field has found wrong.
template <class Struct>
Struct checked(const Struct& made) {
  if (PyErr_Occurred()) throw py::error_already_set();
  return made;
}

// The order of evaluation in braces is that of the fields.
inline Rows rows_from(const py::tuple& t) {
  Fields f(t, "Rows", 9);
  return checked(Rows{f, f, f, f, f, f, f, f, f});
}
inline Queries queries_from(const py::tuple& t) {
  Fields f(t, "Queries", 14);
  return checked(Queries{f, f, f, f, f, f, f, f, {f, f, f, f, f}, f, nullptr});
}
inline Sums sums_from(const py::tuple& t) {
  Fields f(t, "Sums", 6);
  return checked(Sums{f, f, f, f, f, f});
}
inline SumsIn sums_in_from(const py::tuple& t) {
  Fields f(t, "SumsIn", 5);
  return checked(SumsIn{f, f, f, f, f});
}
inline States states_from(const py::tuple& t) {
  Fields f(t, "States", 9);
  return checked(States{f, f, f, f, f, f, f, f, f});
}
inline Gradients gradients_from(const py::tuple& t) {
  Fields f(t, "Gradients", 7);
  return checked(Gradients{f, f, f, f, f, f, f});
}
inline RowLists lists_from(const py::tuple& t) {
  Fields f(t, "RowLists", 3);
  return checked(RowLists{f, f, f});
}
inline LogitBounds bounds_from(const py::tuple& t) {
  Fields f(t, "LogitBounds", 20);
  return checked(LogitBounds{f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f});
}
inline CosineTransform transform_from(const py::tuple& t) {
  Fields f(t, "CosineTransform", 17);
  return checked(CosineTransform{f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f});
}

// Runs a kernel without Python's lock, and raises for its status, or what a signal raised: `kernel` gives
// what it calls the watch.
template <class Kernel>
void run(Kernel kernel) {
  int status;
  {
    Interrupt interrupt;
    status = kernel(&interrupt);
  }
  if (status & kStopped) throw py::error_already_set();
  if (status == kNotLists)
    throw std::invalid_argument(
        "start must increase from 0 to the length of index, and index and segments must hold numbers of "
        "rows");
  if (status != kDone) throw std::bad_alloc();  // MemoryError
}
template <class Kernel>
void run(Queries& queries, Kernel kernel) {
  run([&](Watch* watch) {
    queries.watch = watch;
    return kernel();
  });
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_dense(py::module_& m);
void bind_listed(py::module_& m);

}  // namespace memokern
