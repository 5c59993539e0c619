"""``nearest``, the k nearest rows, with its derivative."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memokern.backends.protocol import Call, choose
from memokern.calls import Rows
from memokern.ops.registration import below_autograd, define, differentiable, fake, vmap


def _nearest(
    x: Tensor, rows: Tensor, center: Tensor | None, sq_norms: Tensor | None, scale: float,
    shift: float, k: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    backend = choose("nearest", Call.of(x, rows, k))
    return backend.nearest(x, Rows(rows, scale, shift, center, sq_norms), k)


def _fake_nearest(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], args[-1])
    return x.new_empty(shape, dtype=torch.float64), x.new_empty(shape, dtype=torch.int64)


class _Nearest(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Any:
        return below_autograd("nearest", args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, rows, _, _, ctx.scale, ctx.shift, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, rows, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        x, rows, index = ctx.saved_tensors
        y = Rows(rows, ctx.scale, ctx.shift).values(index)
        pull = 2 * grad[..., None] * (x[:, None].to(torch.float64) - y)  # [B, k, D]
        grad_rows = None
        if ctx.needs_input_grad[1]:
            flat = -ctx.scale * pull.reshape(-1, x.shape[1]).to(rows.dtype)
            grad_rows = torch.zeros_like(rows).index_add(0, index.reshape(-1), flat)
        return (pull.sum(1).to(x.dtype), grad_rows, *(None,) * 5)


define(
    "nearest",
    "Tensor x, Tensor rows, Tensor? center, Tensor? sq_norms, float scale, float shift, SymInt k",
    "(Tensor, Tensor)",
    _nearest,
)
fake("nearest", _fake_nearest)
differentiable("nearest", _Nearest)
vmap("nearest", frozenset({0}))
