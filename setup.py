"""Build of memokern._C, the compiled kernels. It needs a C++17 compiler, no torch and no GPU; the
CUDA kernels are copied.

MEMOKERN_BUILD_KERNELS=0 leaves them out: the Makefile builds them in place beside what pip does.
With MEMOKERN_BUILD_TESTING=1 it also builds memokern._testing, which some of the tests need.
MEMOKERN_BUILD_OPTIMIZE=-O0 builds kernels that are slow but there in a tenth of the time, to check
that they build.
"""

import os
import platform
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

NO_COMPILER = """
memokern compiles its CPU kernels, which needs a C++17 compiler: GCC 12, Clang 15 or newer.
  Debian, Ubuntu:  apt-get install g++        Fedora:  dnf install gcc-c++
  macOS:           xcode-select --install     conda:   conda install -c conda-forge cxx-compiler
CXX=... chooses one. What the compiler said stands above.
"""

# What setuptools calls the platform where it is not this machine's, as in a build for another.
TARGET = os.environ.get("_PYTHON_HOST_PLATFORM", "").rpartition("-")[2] or platform.machine()
X86 = TARGET.lower() in ("x86_64", "amd64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]  # every processor with AVX2 has F16C
AVX512 = [*AVX2, "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mprefer-vector-width=512"]
# Only these sources may have instructions that not every processor of the platform knows.
ISA_FLAGS = {
    "csrc/cpu/isa/avx512.cpp": AVX512,
    "csrc/cpu/isa/avx2.cpp": AVX2,
    "csrc/testing/avx2w16.cpp": [*AVX2, "-O1"],  # it is never timed, and takes half the time
    "csrc/testing/hooks_avx2.cpp": AVX2,
    "csrc/testing/hooks_avx512.cpp": AVX512,
}
RUNTIME = ["csrc/cpu/runtime/threads.cpp", "csrc/cpu/runtime/memory.cpp"]
KERNELS = ["csrc/cpu/isa/baseline.cpp"]
TESTING = ["csrc/testing/hooks_baseline.cpp"]
if X86:  # what takes longest to compile first
    KERNELS = [*(source for source in ISA_FLAGS if "cpu/isa" in source), *KERNELS]
    TESTING = [*(source for source in ISA_FLAGS if "testing" in source), *TESTING]
MACROS = [("MEMOKERN_HAVE_X86", "1")] if X86 else []


def has_avx512():
    """Whether this processor is known to have AVX-512."""
    try:
        return "avx512dq" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


# AVX2 in the width of AVX-512 is for the tests of processors that have no AVX-512.
if X86 and has_avx512():
    TESTING.remove("csrc/testing/avx2w16.cpp")
elif X86:
    MACROS.append(("MEMOKERN_HAVE_AVX2W16", "1"))

FLAGS = [
    os.environ.get("MEMOKERN_BUILD_OPTIMIZE", "-O3"),
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-Wno-psabi",  # vectors never cross a call between instruction sets
]


CUDA, CUDA_SUFFIXES = Path("csrc", "cuda"), (".h", ".cuh", ".cu")


class BuildPy(build_py):
    """The CUDA kernels travel as sources, which memokern compiles where they run. An installation
    in place finds them in csrc."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        to = Path(self.build_lib, "memokern", "backends", "cuda", "sources")
        shutil.rmtree(to, ignore_errors=True)  # what an earlier build left
        for path in CUDA.rglob("*"):
            if path.suffix in CUDA_SUFFIXES:
                copy = to / path.relative_to(CUDA)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


class BuildExt(build_ext):
    """Flags for each source, all sources compiled side by side, and a hint where that fails."""

    def build_extensions(self):
        compile_one, compile_many = self.compiler._compile, self.compiler.compile

        def with_flags(obj, source, ext, cc_args, extra, pp_opts):
            flags = ISA_FLAGS.get(source.replace(os.sep, "/"), [])
            compile_one(obj, source, ext, cc_args, [*extra, *flags], pp_opts)

        def side_by_side(sources, **kwargs):
            done = list(pool.map(lambda source: compile_many([source], **kwargs), sources))
            return [obj for objects in done for obj in objects]

        self.compiler._compile, self.compiler.compile = with_flags, side_by_side
        self.parallel = True  # the modules, whose sources share the pool
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                super().build_extensions()
        except CompileError as error:
            raise SystemExit(f"{error}\n{NO_COMPILER}") from error


def extension(name, sources):
    return Pybind11Extension(
        name,
        sources,
        cxx_std=17,
        include_dirs=["csrc/include", "csrc"],
        define_macros=MACROS,
        extra_compile_args=[*FLAGS, "-pthread"],
        extra_link_args=["-pthread"],
        depends=sorted(str(h) for h in Path("csrc").rglob("*.h") if "cuda" not in h.parts)
        + sorted(str(included) for included in Path("csrc/bind").glob("*.cpp")),
    )


if __name__ == "__main__":
    EXTENSIONS = [extension("memokern._C", [*KERNELS, "csrc/bind/all.cpp", *RUNTIME])]
    if os.environ.get("MEMOKERN_BUILD_TESTING") == "1":
        EXTENSIONS.append(
            extension("memokern._testing", [*TESTING, "csrc/bind/testing.cpp", *RUNTIME])
        )
    if os.environ.get("MEMOKERN_BUILD_KERNELS") == "0":
        EXTENSIONS = []
    setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildExt, "build_py": BuildPy})
