"""Every instruction set that runs here gives the same; the variable that chooses it is honoured."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from memokern.backends import protocol

_C = pytest.importorskip("memokern._C")
cpu = protocol.get("cpu")
USABLE = [name for name, supported in _C.isas() if supported]
PRINT = "from memokern.backends import protocol; print(protocol.get('cpu').isa())"
HERE = os.path.dirname(__file__)
TESTS = [
    os.path.join(HERE, f"test_cpu_{name}.py")
    for name in ("kernels", "backward", "nearest", "support")
]


def child(isa: str, *command: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"MEMOKERN_ISA": isa, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], env=env, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("isa", [name for name in USABLE if name != cpu.isa()])
def test_every_isa_passes_the_kernel_tests(isa: str) -> None:
    """The kernels' tests again, in a process of their own (`avx2w16`: the width of AVX-512)."""
    done = child(
        isa,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *TESTS,
        "-k",
        "not far_offsets and not threads",
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("isa", USABLE)
def test_variable_chooses(isa: str) -> None:
    known = "import memokern._testing" if isa == "avx2w16" else "pass"
    done = child(isa, "-c", f"{known}\n{PRINT}")
    assert done.stdout.strip() == isa, done.stderr


def test_unknown_name_is_refused() -> None:
    done = child("sse9", "-c", PRINT)
    assert "MEMOKERN_ISA=sse9" in done.stderr and "baseline" in done.stderr
    assert done.returncode != 0


def test_unsupported_isa_is_refused() -> None:
    missing = [name for name, supported in _C.isas() if not supported]
    for name in missing:
        with pytest.raises(RuntimeError, match=name):
            _C.select_isa(name)
    assert _C.isa() == cpu.isa()
