// How Ctrl-C ends a kernel. Python only notes a signal, and runs its handler when the main thread comes back
// to the interpreter, which a long call would put off until its end.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <chrono>

#include "memokern/abi.h"

namespace memokern {

// The watch of one call. It releases Python's lock while it exists. Threads ask it at any time; the one that
// made it lets Python handle signals, twenty times a second, where it is Python's main thread. If a handler
// raises, as that of Ctrl-C does, the kernel is stopped and Python's error is set.
class Interrupt : public Watch {
 public:
  Interrupt() : Watch{&ask}, caller_(PyThread_get_thread_ident()), python_(PyEval_SaveThread()) {}
  ~Interrupt() { PyEval_RestoreThread(python_); }
  Interrupt(const Interrupt&) = delete;

 private:
  typedef std::chrono::steady_clock Clock;

  static bool ask(Watch* watch) { return static_cast<Interrupt*>(watch)->look(); }
  bool look() {
    if (stop_.load(std::memory_order_relaxed)) return true;
    if (PyThread_get_thread_ident() != caller_ || never_) return false;
    const Clock::time_point now = Clock::now();
    if (next_ == Clock::time_point()) next_ = now + kEvery;  // most calls end before that
    if (now < next_) return false;
    PyEval_RestoreThread(python_);
    const Clock::duration waited = Clock::now() - now;  // for other threads of Python
    if (handle_signals()) stop_.store(true, std::memory_order_relaxed);
    python_ = PyEval_SaveThread();
    next_ = Clock::now() + std::clamp<Clock::duration>(20 * waited, kEvery, kSeldom);
    return stop_.load(std::memory_order_relaxed);
  }
  // Returns whether a handler has raised an error, which is set then.
  bool handle_signals() {
    namespace py = pybind11;
    if (PyErr_CheckSignals() != 0) return true;
    if (known_) return false;
    try {  // this runs code of Python, and so may run a handler too
      const py::object main = py::module_::import("threading").attr("main_thread")();
      never_ = main.attr("ident").cast<unsigned long>() != caller_;
      known_ = true;
      return false;
    } catch (py::error_already_set& error) {
      error.restore();
      return true;
    }
  }

  static constexpr std::chrono::milliseconds kEvery{50}, kSeldom{400};
  const unsigned long caller_;
  PyThreadState* python_;
  Clock::time_point next_;
  std::atomic<bool> stop_{false};
  bool known_ = false, never_ = false;  // only the caller's
};

}  // namespace memokern
