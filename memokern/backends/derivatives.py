"""Derivatives of the reference's formulas, taken by PyTorch itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Autograd on, also inside an operation that the dispatcher called below autograd."""
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(key, False), torch.enable_grad():
        yield


def vjp(
    values: tuple[Tensor, ...], inputs: list[Tensor], grads: list[Tensor], again: bool = False
) -> list[Tensor]:
    """sum <grads, d values / d inputs>; an output or an input that plays no part gives zeros."""
    live = [(v, g) for v, g in zip(values, grads, strict=True) if v.requires_grad]
    got = torch.autograd.grad(
        [v for v, _ in live], inputs, [g for _, g in live], create_graph=again, allow_unused=True
    )
    return [torch.zeros_like(v) if g is None else g for g, v in zip(got, inputs, strict=True)]
