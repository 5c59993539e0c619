"""The instruction sets that the compiled kernels were built for and that run on this machine."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator

from memokern.backends.cpu import native


def usable() -> list[str]:
    """Their names; raises ImportError without the compiled module."""
    with contextlib.suppress(ImportError):  # it may add avx2w16: AVX2 in the width of AVX-512
        importlib.import_module("memokern._testing")
    return [name for name, supported in native.module().isas() if supported]


def others() -> list[str]:
    """All but the one in use."""
    return [name for name in usable() if name != native.module().isa()]


@contextlib.contextmanager
def selected(name: str) -> Iterator[None]:
    """Kernels of this instruction set run; "": of the one in use."""
    if not name:
        yield
        return
    module = native.module()
    before = module.isa()
    module.select_isa(name)
    try:
        yield
    finally:
        module.select_isa(before)
