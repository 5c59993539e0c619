"""The instruction set is chosen by a variable. That each of them gives the same is tested with the
operations: they run over all of them (`harness.ISAS`)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from memokern.backends import protocol
from tests import harness

if "cpu" not in harness.INSTALLED:
    pytest.skip("the compiled module is missing", allow_module_level=True)

from memokern.backends.cpu import native
from tests import compiled, isas


def _child(isa: str, code: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"MEMOKERN_ISA": isa, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300
    )


WHICH = "from memokern.backends import protocol; print(protocol.get('cpu').isa())"


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.one_of(3)
def test_the_variable_chooses(isa: str) -> None:
    if isa not in isas.usable():
        pytest.skip(f"{isa} does not run here")
    assert _child(isa, WHICH).stdout.strip() == isa


def test_an_unknown_name_is_refused() -> None:
    done = _child("sse9", WHICH)
    assert "MEMOKERN_ISA=sse9" in done.stderr and "baseline" in done.stderr
    assert done.returncode != 0


def test_one_that_does_not_run_here_is_refused() -> None:
    module = native.module()
    for name in (name for name, supported in module.isas() if not supported):
        with pytest.raises(RuntimeError, match=name):
            module.select_isa(name)
    assert module.isa() == protocol.get("cpu").isa()


def test_the_operations_run_over_all_of_them() -> None:
    """But for what this machine lacks; a build without the parts for tests lacks one as well."""
    names = {name.partition(":")[2] for name in harness.ISAS} | {native.module().isa()}
    assert names == set(isas.usable()) and "baseline" in names
    if not compiled.isas():
        pytest.skip("memokern._testing is missing: build with MEMOKERN_BUILD_TESTING=1")
    assert set(compiled.isas()) <= set(isas.usable())
