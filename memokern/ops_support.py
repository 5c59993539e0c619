"""The operations of certified pruning, registered: ``torch.ops.memokern.*``, as in :mod:`.ops`.

``bound_scan(x, rows, sigma, alpha, temperature, bias, center, sq_norms, scale, shift, coarse, fine,
z, norms, margin, sq, dims, first_band, eps, cap) -> start, index, threshold, level``
    Which rows can matter to each query, gaussian kernel. coarse to first_band are those of
    :class:`memokern.index.Index` and what it says of the queries: z [B, K] and norms [B, nb + 1]
    float32, margin and sq <= |x - alpha center|^2 [B] float64. Query b's rows are
    index[start[b] : start[b + 1]], ascending (int64); start [B + 1]. With t = l / T, every row that
    is not listed has t <= threshold[b], which is proven, and N exp(threshold - logsumexp t) <= eps.
    level [B] int64: how many levels of the ladder were climbed; 0 where the query was given up
    (sigma = 0; numbers that are not finite; more rows left, or to come as a sample shows, than are
    worth listing: cap is what listing may cost, in rows listed, beside one query more in a sweep,
    and backends may allow a few times as many where no sweep would be saved), whose list is empty.
    No derivative: the result is discrete.

``posterior_on_support(x, rows, sigma, alpha, temperature, bias, start, index, scale, shift)``
    The five results of ``posterior``, each query's sums running over its listed rows only; logits
    by direct differences in float64. A query without rows: mean NaN, log_z -inf. Differentiable
    twice in x, sigma, alpha, temperature and bias; not in the rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memokern.backends import reference
from memokern.ops import _FIVE, _GRADS, _LIB, _OPS, _QUERY, _SAVED, _autograd, _refuse, _run, _vmap

_INDEX = "Tensor coarse, Tensor fine, Tensor z, Tensor norms, Tensor margin, Tensor sq"
_LISTS = "Tensor start, Tensor index"
_HOW = "float scale, float shift"

_LIB.define(
    f"bound_scan({_QUERY}, Tensor center, Tensor sq_norms, {_HOW}, {_INDEX}, int[] dims,"
    " int[] first_band, float eps, int cap) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIB.define(f"posterior_on_support({_QUERY}, {_LISTS}, {_HOW}) -> {_FIVE}")
_LIB.define(
    f"posterior_on_support_backward({_QUERY}, {_LISTS}, {_SAVED}, {_GRADS}, {_HOW}) -> {_FIVE}"
)
_LIB.define(
    f"posterior_on_support_double_backward({_QUERY}, {_LISTS}, Tensor[] grads, Tensor[] grad_grads,"
    f" {_HOW}) -> Tensor[]"
)

for _name in ("bound_scan", "posterior_on_support", "posterior_on_support_backward"):
    _LIB.impl(_name, _run(_name), "CompositeExplicitAutograd")
_LIB.impl(
    "posterior_on_support_double_backward",
    reference.posterior_on_support_double_backward,
    "CompositeExplicitAutograd",
)


# --- fake ---------------------------------------------------------------------------------------


def _fake_scan(x: Tensor, rows: Tensor, sigma: Tensor, *_: Any) -> tuple[Tensor, ...]:
    b = x.shape[0]
    found = torch.library.get_ctx().new_dynamic_size()
    return (
        x.new_empty(b + 1, dtype=torch.int64),
        x.new_empty(found, dtype=torch.int64),
        sigma.new_empty(b),
        x.new_empty(b, dtype=torch.int64),
    )


def _fake_sums(x: Tensor, rows: Tensor, sigma: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return (x.new_empty(x.shape), *(sigma.new_empty(sigma.shape) for _ in range(4)))


def _fake_backward(
    x: Tensor, rows: Tensor, sigma: Tensor, alpha: Tensor, temperature: Tensor,
    bias: Tensor | None, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    grad_bias = sigma.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return (x.new_empty(x.shape), *(sigma.new_empty(sigma.shape) for _ in range(3)), grad_bias)


def _fake_double_backward(*args: Any) -> list[Tensor]:
    grads: list[Tensor] = args[8]
    return [*_fake_backward(*args), *(g.new_empty(g.shape) for g in grads)]


for _name, _fake in (
    ("bound_scan", _fake_scan),
    ("posterior_on_support", _fake_sums),
    ("posterior_on_support_backward", _fake_backward),
    ("posterior_on_support_double_backward", _fake_double_backward),
):
    torch.library.register_fake(f"memokern::{_name}", _fake, lib=_LIB)


# --- autograd -----------------------------------------------------------------------------------


def _scan_without_derivative(*args: Any) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return _OPS.bound_scan(*args)


def _no_rows(ctx: Any) -> None:
    if ctx.needs_input_grad[1]:
        raise RuntimeError(
            "posterior_on_support has no gradient for the rows: use the dense sweep"
            " (torch.ops.memokern.posterior, or method='dense'), or detach the rows"
        )


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.posterior_on_support(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.scale, ctx.shift = inputs
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _no_rows(ctx)
        inputs, saved = ctx.saved_tensors[:8], [v.detach() for v in ctx.saved_tensors[8:]]
        out = _OPS.posterior_on_support_backward(*inputs, *saved, *grads, ctx.scale, ctx.shift)
        grad_bias = out[4] if inputs[5] is not None else None
        return (out[0], None, *out[1:4], grad_bias, *(None,) * 4)


class _SumsBackward(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.posterior_on_support_backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.how = inputs[18:]
        ctx.save_for_backward(*inputs[:8], *inputs[13:18])

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor) -> Any:
        _no_rows(ctx)
        inputs, grads = ctx.saved_tensors[:8], list(ctx.saved_tensors[8:])
        out = _OPS.posterior_on_support_double_backward(*inputs, grads, list(grad_grads), *ctx.how)
        grad_bias = out[4] if inputs[5] is not None else None
        return (out[0], None, *out[1:4], grad_bias, *(None,) * 7, *out[5:], *(None,) * 2)


_LIB.impl("bound_scan", _scan_without_derivative, "Autograd")
for _name, _function in (
    ("posterior_on_support", _Sums),
    ("posterior_on_support_backward", _SumsBackward),
):
    _LIB.impl(_name, _autograd(_name, _function), "Autograd")
_name = "posterior_on_support_double_backward"
_LIB.impl(_name, _refuse(_name), "Autograd")


# --- vmap ---------------------------------------------------------------------------------------


def _no_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    raise RuntimeError(
        "bound_scan cannot be mapped: the lists of different entries differ in length. Fold the"
        " mapped axis into the batch, or use memokern.posterior, which sweeps densely under vmap"
    )


torch.library.register_vmap("memokern::bound_scan", _no_vmap, lib=_LIB)
for _name in ("posterior_on_support", "posterior_on_support_backward"):
    # The lists count offsets of one batch, and the bias gradient sums over it: never folded.
    torch.library.register_vmap(f"memokern::{_name}", _vmap(_name, frozenset()), lib=_LIB)

bound_scan = _OPS.bound_scan
posterior_on_support = _OPS.posterior_on_support
posterior_on_support_backward = _OPS.posterior_on_support_backward
