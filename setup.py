"""Build of memokern._C. Needs a C++17 compiler (GCC >= 12 or Clang >= 15), no torch, no GPU."""

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]  # every processor with AVX2 has F16C
AVX512 = [*AVX2, "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mprefer-vector-width=512"]
# One source for each instruction set, with the flags that only it may have.
ISA_FLAGS = {"csrc/cpu/isa/baseline.cpp": []}
if X86:
    ISA_FLAGS |= {
        "csrc/cpu/isa/avx2.cpp": AVX2,
        "csrc/testing/avx2w16.cpp": [*AVX2, "-O1"],  # for tests only: half the time to compile
        "csrc/cpu/isa/avx512.cpp": AVX512,
    }
# Apple's compiler has no OpenMP of its own; without it the kernels run on one thread.
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]
FLAGS = [
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
]
FLAGS += ["-Wno-psabi"]  # vectors never cross a call between instruction sets


class BuildExt(build_ext):
    """Per-source flags, and the sources compiled side by side."""

    def build_extensions(self):
        one, many = self.compiler._compile, self.compiler.compile

        def compile_one(obj, src, ext, cc_args, extra, pp_opts):
            one(
                obj,
                src,
                ext,
                cc_args,
                [*extra, *ISA_FLAGS.get(src.replace(os.sep, "/"), [])],
                pp_opts,
            )

        def compile_many(sources, **kwargs):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                done = pool.map(lambda s: many([s], **kwargs), sources)
                return [o for objects in done for o in objects]

        self.compiler._compile, self.compiler.compile = compile_one, compile_many
        super().build_extensions()


setup(
    ext_modules=[
        Pybind11Extension(
            "memokern._C",
            ["csrc/bind/module.cpp", *ISA_FLAGS],
            cxx_std=17,
            define_macros=[("MEMOKERN_HAVE_X86", "1")] if X86 else [],
            extra_compile_args=FLAGS + OPENMP,
            extra_link_args=OPENMP,
            include_dirs=["csrc/include", "csrc"],
            depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
        )
    ],
    cmdclass={"build_ext": BuildExt},
)
