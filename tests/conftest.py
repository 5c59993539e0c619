"""Two threads are what the tests need, and what makes their sums reproducible.

Triton's kernels are interpreted where there is no GPU; it must be told so before it is imported.
"""

import contextlib
import importlib.util

import pytest
import torch

from tests import triton_interpreter

with contextlib.suppress(ImportError):  # it may make the kernels of avx2w16 known
    import memokern._testing  # noqa: F401

torch.set_num_threads(min(2, torch.get_num_threads()))
triton_interpreter.choose()
if triton_interpreter.DEVICE.type == "cpu" and importlib.util.find_spec("triton"):
    triton_interpreter.install()

from tests import harness, selection  # noqa: E402  # harness asks which backends are there


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is long
def pytest_collection_modifyitems(items):
    on_a_gpu = triton_interpreter.DEVICE.type == "cuda"
    selection.select(items, harness.ISAS, interpreted=[] if on_a_gpu else ["triton"])
    if on_a_gpu:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="there is no GPU"))


@pytest.fixture
def one_thread():
    """For tests of what stands above the kernels: they call many small operations, which threads of
    several test processes on few cores would only slow down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
