"""The instruction set is chosen by a variable. That each of them gives the same is tested with the
operations: they run over all of them (`harness.ISAS`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from memokern.backends import protocol
from tests import harness

if "cpu" not in harness.INSTALLED:
    pytest.skip("the compiled module is missing", allow_module_level=True)

from memokern.backends.cpu import native
from memokern.util import env
from tests import compiled, isas


@pytest.fixture
def read_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """What a process that begins with this value of the variable chooses."""
    before = native.module().isa()

    def chosen(isa: str) -> str:
        monkeypatch.setenv(env.ISA, isa)
        return str(native.module.__wrapped__().isa())

    yield chosen
    native.module().select_isa(before)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_the_variable_chooses(isa: str, read_anew: Callable[[str], str]) -> None:
    if isa not in isas.usable():
        pytest.skip(f"{isa} does not run here")
    assert read_anew(isa) == isa == protocol.get("cpu").isa()


def test_an_unknown_name_is_refused(read_anew: Callable[[str], str]) -> None:
    with pytest.raises(RuntimeError, match=r"MEMOKERN_ISA=sse9.*baseline"):
        read_anew("sse9")


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
