"""Two threads are what the tests need, and what makes their sums reproducible.

Triton's kernels are interpreted where there is no GPU; it must be told so before it is imported.
"""

import contextlib
import importlib.util
import zlib

import pytest
import torch

from tests import triton_interpreter

with contextlib.suppress(ImportError):  # it makes the kernels of avx2w16 known
    import memokern._testing  # noqa: F401

torch.set_num_threads(min(2, torch.get_num_threads()))
triton_interpreter.choose()
if triton_interpreter.DEVICE.type == "cpu" and importlib.util.find_spec("triton"):
    triton_interpreter.install()

from tests import harness  # noqa: E402  # it asks which backends are there


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is long
def pytest_collection_modifyitems(items):
    one_other_instruction_set(items)
    if triton_interpreter.DEVICE.type == "cuda":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="there is no GPU"))


def one_other_instruction_set(items):
    """The same source is compiled for each instruction set: every case runs on the one in use and
    on one of the others, another from case to case. `make test-all` runs it on all."""
    for item in items:
        backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")
        if backend in harness.ISAS:
            case = item.nodeid.replace(backend, "")
            chosen = harness.ISAS[zlib.crc32(case.encode()) % len(harness.ISAS)]
            if backend != chosen:
                item.add_marker(pytest.mark.long)


@pytest.fixture
def one_thread():
    """For tests of what stands above the kernels: they call many small operations, which threads of
    several test processes on few cores would only slow down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
