"""A test that uses `backend` runs through each backend that takes tensors on the CPU."""

from collections.abc import Iterator

import pytest

from tests import harness

# Triton's kernels may be interpreted here, which takes minutes; their own tests have these cases.
BACKENDS = [name for name in harness.INSTALLED if name != "triton"]


@pytest.fixture(params=BACKENDS, scope="module")
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """MEMOKERN_BACKEND names it."""
    with harness.named(request.param):
        yield request.param
