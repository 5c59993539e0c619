"""``bound_scan`` and ``posterior_listed``, the operations of certified pruning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memokern.backends.protocol import Call, choose
from memokern.calls import BasicSums, Gradients, RowLists, Sums
from memokern.ops.dense import (
    fake_double_backward,
    fake_gradients,
    fake_sums,
    query_gradients,
    without_residual,
)
from memokern.ops.flat import (
    PREFIX,
    SEVEN,
    SIX,
    SUM_GRADS,
    SUMS,
    TENSORS,
    WIDTH,
    bounds_of,
    query_of,
    rows_of,
)
from memokern.ops.registration import (
    LIBRARY,
    OPS,
    below_autograd,
    define,
    differentiable,
    fake,
    not_differentiable,
    vmap,
)

_LISTS = "Tensor start, Tensor index"
_BOUNDS = (
    "Tensor coarse, Tensor fine, Tensor z, Tensor norms, Tensor margin, Tensor sq, int[] dims,"
    " int[] first_band, float eps, int most_listed, Tensor? order,"
    " Tensor? ordered, Tensor? half, Tensor? boxes, Tensor? hulls, float excess,"
    " float reading"
)
_AFTER_LISTS = WIDTH + 2


def _bound_scan(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    backend = choose("bound_scan", Call.of(args[0], args[1]))
    scan = backend.bound_scan(query_of(args), rows_of(args), bounds_of(args))
    return scan.lists.start, scan.lists.index, scan.threshold, scan.level


def _listed(*args: Any) -> Sums:
    backend = choose("posterior_listed", Call.of(args[0], args[1]))
    return backend.posterior_listed(query_of(args), rows_of(args), RowLists(*args[WIDTH:]))


def _backward(*args: Any) -> Gradients:
    lists = RowLists(*args[WIDTH:_AFTER_LISTS])
    sums = BasicSums(*args[_AFTER_LISTS : _AFTER_LISTS + 5])
    grads = BasicSums(*args[_AFTER_LISTS + 5 :])
    backend = choose("posterior_listed_backward", Call.of(args[0], args[1]))
    return backend.posterior_listed_backward(query_of(args), rows_of(args), lists, sums, grads)


def _double_backward(*args: Any) -> list[Tensor]:
    lists = RowLists(*args[WIDTH:_AFTER_LISTS])
    grads, grad_grads = BasicSums(*args[_AFTER_LISTS]), Gradients(*args[_AFTER_LISTS + 1])
    backend = choose("posterior_listed_double_backward", Call.of(args[0], args[1]))
    heads, tails = backend.posterior_listed_double_backward(
        query_of(args), rows_of(args), lists, grads, grad_grads
    )
    return [*heads, *tails]


define("bound_scan", f"{PREFIX}, {_BOUNDS}", "(Tensor, Tensor, Tensor, Tensor)", _bound_scan)
define("posterior_listed", f"{PREFIX}, {_LISTS}", SIX, _listed)
define("posterior_listed_backward", f"{PREFIX}, {_LISTS}, {SUMS}, {SUM_GRADS}", SEVEN, _backward)
define(
    "posterior_listed_double_backward",
    f"{PREFIX}, {_LISTS}, Tensor[] grads, Tensor[] grad_grads",
    "Tensor[]",
    _double_backward,
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


fake("bound_scan", _fake_scan)
fake("posterior_listed", fake_sums)
fake("posterior_listed_backward", fake_gradients)
fake("posterior_listed_double_backward", fake_double_backward)


# --- autograd -----------------------------------------------------------------------------------


def _no_gradient_for_rows(ctx: Any) -> None:
    if ctx.needs_input_grad[1]:
        raise RuntimeError(
            "posterior_listed has no gradient for the rows: use the dense sweep"
            " (torch.ops.memokern.posterior, or method='dense'), or detach the rows"
        )


class _Listed(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Any:
        return below_autograd("posterior_listed", args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.options, ctx.given = inputs[TENSORS:WIDTH], [v is not None for v in inputs[5:8]]
        ctx.save_for_backward(*inputs[:TENSORS], *inputs[WIDTH:], *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _no_gradient_for_rows(ctx)
        args = (*ctx.saved_tensors[:TENSORS], *ctx.options)
        lists, sums = ctx.saved_tensors[TENSORS : TENSORS + 2], ctx.saved_tensors[TENSORS + 2 :]
        five, grad_x, grad_alpha = without_residual(grads, sums[0], args[3])
        known = (v.detach() for v in sums[:5])
        found = list(OPS.posterior_listed_backward(*args, *lists, *known, *five))
        found[0], found[2] = found[0] + grad_x, found[2] + grad_alpha
        return (*query_gradients(ctx, tuple(found), None), None, None)


class _ListedBackward(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Any:
        return below_autograd("posterior_listed_backward", args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.options, ctx.given = inputs[TENSORS:WIDTH], [v is not None for v in inputs[5:8]]
        kept = (*inputs[:TENSORS], *inputs[WIDTH:_AFTER_LISTS], *inputs[_AFTER_LISTS + 5 :])
        ctx.save_for_backward(*kept)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor) -> Any:
        _no_gradient_for_rows(ctx)
        args = (*ctx.saved_tensors[:TENSORS], *ctx.options)
        lists, grads = ctx.saved_tensors[TENSORS : TENSORS + 2], ctx.saved_tensors[TENSORS + 2 :]
        out = OPS.posterior_listed_double_backward(*args, *lists, list(grads), list(grad_grads))
        return (*query_gradients(ctx, out[:7], None), *(None,) * 7, *out[7:])


# The lists are discrete: nothing is recorded.
LIBRARY.impl("bound_scan", lambda *args: below_autograd("bound_scan", args), "Autograd")
differentiable("posterior_listed", _Listed)
differentiable("posterior_listed_backward", _ListedBackward)
not_differentiable("posterior_listed_double_backward")


# --- vmap ---------------------------------------------------------------------------------------


def _no_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    raise RuntimeError(
        "bound_scan cannot be mapped: the lists of different entries differ in length. Fold the"
        " mapped axis into the batch, or use memokern.posterior, which sweeps densely under vmap"
    )


torch.library.register_vmap("memokern::bound_scan", _no_vmap, lib=LIBRARY)
# The lists count offsets of one batch, and the bias gradient sums over it: never folded.
vmap("posterior_listed")
vmap("posterior_listed_backward")
