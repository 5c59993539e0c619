"""NVRTC makes machine code without a GPU: for each architecture, and with its own words where it
cannot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from memokern.backends.cuda.core import compiler, machine, sources
from memokern.backends.cuda.core.variant import Variant

needs_nvrtc = pytest.mark.skipif(
    compiler.missing() is not None, reason=compiler.missing() or "it is here"
)
SCALE = Variant("test/scale.cu", ("scale",), (("MK_FACTOR", 3),))
SOURCE = """
#include "common/factor.h"
struct Params { float* out; long long n; };
extern "C" __global__ void scale(const Params p) {
  long long i = blockIdx.x * 256 + threadIdx.x;
  if (i < p.n) p.out[i] *= factor();
}
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch) -> Path:
    (tmp_path / "test").mkdir()
    (tmp_path / "common").mkdir()
    (tmp_path / "test" / "scale.cu").write_text(SOURCE)
    (tmp_path / "common" / "factor.h").write_text(
        "__device__ inline float factor() { return MK_FACTOR; }"
    )
    monkeypatch.setattr(sources, "folder", lambda: tmp_path)
    return tmp_path


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
def test_machine_code(root: Path, arch: str) -> None:
    found = compiler.compile_variant(SCALE, arch)
    assert found.code.startswith(b"\x7fELF") and b"scale" in found.code
    assert "0 bytes spill stores" in found.log and f"'{arch}'" in found.log
    (root / "test" / "scale.cu").write_text(SOURCE.replace("factor()", "3.0f"))
    (root / "common" / "factor.h").write_text("")
    assert compiler.compile_variant(SCALE._replace(macros=()), arch).code.startswith(b"\x7fELF")
    if arch == "sm_90a":
        (root / "test" / "scale.cu").write_text(SOURCE.replace("factor()", "MK_FACTOR"))
        other = compiler.compile_variant(SCALE._replace(macros=(("MK_FACTOR", 4),)), arch)
        assert other.code != found.code


@needs_nvrtc
def test_what_does_not_compile_says_why(root: Path) -> None:
    (root / "common" / "factor.h").write_text("#error no factor today")
    with pytest.raises(RuntimeError, match=r"(?s)scale factor=3 for sm_90a.*no factor today.*"
                       "MEMOKERN_BACKEND=triton"):  # fmt: skip
        compiler.compile_variant(SCALE, "sm_90a")


@needs_nvrtc
def test_versions() -> None:
    major, minor = compiler.version().split(".")
    assert int(major) >= 12 and int(minor) >= 0
    known = {int(arch.strip("sm_a")) for arch, _ in machine.KNOWN.values()}
    assert known <= compiler.architectures()


def test_what_is_missing_is_said(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    compiler.missing.cache_clear()
    assert compiler.missing() == "cuda-core is not installed: pip install 'memokern[cuda]'"
    monkeypatch.undo()
    compiler.missing.cache_clear()


@needs_nvrtc
def test_a_library_that_cannot_be_loaded_is_one_line(monkeypatch) -> None:
    def version() -> str:
        raise OSError("no such library\nand more")

    monkeypatch.setattr(compiler, "version", version)
    compiler.missing.cache_clear()
    said = compiler.missing()
    assert said == "NVRTC cannot be loaded (no such library): pip install 'memokern[cuda]'"
    monkeypatch.undo()
    compiler.missing.cache_clear()


THREADS = """
import concurrent.futures
from memokern.backends.cuda.core import compiler
from memokern.backends.cuda.posterior.variants import finish_variant

def work(arch):
    return len(compiler.compile_variant(finish_variant(), arch).code)

with concurrent.futures.ThreadPoolExecutor(2) as pool:
    print(all(pool.map(work, ["sm_90a", "sm_100a"])))
"""


@needs_nvrtc
@pytest.mark.long
def test_threads_may_compile_the_first_kernels_together() -> None:
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
