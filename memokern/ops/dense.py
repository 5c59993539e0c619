"""``posterior`` and ``posterior_state``, the dense sweep, with their derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memokern.backends.protocol import Call, choose
from memokern.calls import BasicSums, Gradients, Query, State, Sums, to_sums
from memokern.calls.checks import check_weighting
from memokern.ops.flat import (
    CONDITIONS,
    PER_QUERY,
    PREFIX,
    SEVEN,
    SIX,
    SUM_GRADS,
    SUMS,
    TENSORS,
    WIDTH,
    flat,
    query_of,
    rows_of,
)
from memokern.ops.registration import (
    OPS,
    below_autograd,
    define,
    differentiable,
    fake,
    not_differentiable,
    vmap,
)

_STATE = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
# A bandwidth at which every condition counts the same.
_FLAT = 1e150
_BOTH = "Tensor[] grads, Tensor[] grad_grads"


def _call(args: tuple[Any, ...]) -> Call:
    check_weighting(args[15])
    return Call.of(args[0], args[1], own_bias=args[6] is not None or args[9] is not None)


def _posterior(*args: Any) -> Sums:
    return choose("posterior", _call(args)).posterior(query_of(args), rows_of(args))


def _posterior_state(*args: Any) -> State:
    query, rows = query_of(args), rows_of(args)
    state = choose("posterior_state", _call(args)).posterior_state(query, rows)
    center = state.center
    if rows.center is not None and center.data_ptr() == rows.center.data_ptr():
        center = center.clone()  # a result of an operation may not be one of its arguments
    kind = _accumulates_in(*args[:2])
    return state._replace(acc=state.acc.to(kind), residual=state.residual.to(kind), center=center)


def _accumulates_in(x: Tensor, rows: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (x.dtype, rows.dtype) else torch.float32


def _backward(*args: Any) -> Gradients:
    sums = BasicSums(*args[WIDTH : WIDTH + 5])
    grads = BasicSums(*args[WIDTH + 5 :])
    backend = choose("posterior_backward", _call(args))
    return backend.posterior_backward(query_of(args), rows_of(args), sums, grads)


def _backward_rows(*args: Any) -> Tensor:
    backend = choose("posterior_backward_rows", _call(args))
    return backend.posterior_backward_rows(query_of(args), rows_of(args), BasicSums(*args[WIDTH]))


def _double_backward(*args: Any) -> list[Tensor]:
    grads, grad_grads = BasicSums(*args[WIDTH]), Gradients(*args[WIDTH + 1])
    backend = choose("posterior_double_backward", _call(args))
    heads, tails = backend.posterior_double_backward(
        query_of(args), rows_of(args), grads, grad_grads
    )
    return [*heads, *tails]


define("posterior", PREFIX, SIX, _posterior)
define("posterior_state", PREFIX, _STATE, _posterior_state)
define("posterior_backward", f"{PREFIX}, {SUMS}, {SUM_GRADS}", SEVEN, _backward)
define("posterior_backward_rows", f"{PREFIX}, Tensor[] grads", "Tensor", _backward_rows)
define("posterior_double_backward", f"{PREFIX}, {_BOTH}", "Tensor[]", _double_backward)


# --- fake ---------------------------------------------------------------------------------------


def fake_sums(x: Tensor, rows: Tensor, sigma: Tensor, *_: Any) -> tuple[Tensor, ...]:
    columns = (sigma.new_empty(sigma.shape) for _ in range(4))
    return (x.new_empty(x.shape), *columns, x.new_empty(x.shape))


def fake_gradients(*args: Any) -> tuple[Tensor, ...]:
    x, _, sigma, _, _, *given = args[:8]
    rest = (sigma.new_empty(0 if v is None else v.shape) for v in given)
    return (x.new_empty(x.shape), *(sigma.new_empty(sigma.shape) for _ in range(3)), *rest)


def fake_double_backward(*args: Any) -> list[Tensor]:
    grads: list[Tensor] = args[-2]
    return [*fake_gradients(*args), *(g.new_empty(g.shape) for g in grads)]


def _fake_state(x: Tensor, rows: Tensor, sigma: Tensor, *_: Any) -> tuple[Tensor, ...]:
    acc, residual = (x.new_empty(x.shape, dtype=_accumulates_in(x, rows)) for _ in range(2))
    center = x.new_empty(x.shape[1], dtype=torch.float64)
    return (*(sigma.new_empty(sigma.shape) for _ in range(6)), acc, residual, center)


fake("posterior", fake_sums)
fake("posterior_state", _fake_state)
fake("posterior_backward", fake_gradients)
fake("posterior_backward_rows", lambda x, rows, *_: rows.new_empty(rows.shape))
fake("posterior_double_backward", fake_double_backward)


# --- autograd -----------------------------------------------------------------------------------


def query_gradients(ctx: Any, grads: tuple[Tensor, ...], rows: Tensor | None) -> list[Any]:
    """Gradients for the arguments of PREFIX, from those for the query and the rows."""
    if ctx.needs_input_grad[CONDITIONS]:
        raise RuntimeError("there is no gradient for the rows' conditions: detach them")
    rest = [g if given else None for g, given in zip(grads[4:7], ctx.given, strict=True)]
    return [grads[0], rows, *grads[1:4], *rest, *(None,) * (WIDTH - 8)]


def without_residual(
    grads: tuple[Tensor, ...], mean: Tensor, alpha: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The gradients for the sums before the residual, alpha mean - x, which become those of
    everything; and what it adds of its own to the gradients for x and for alpha."""
    *five, pull = grads
    five[0] = five[0] + (alpha[:, None] * pull).to(mean.dtype)
    along = torch.where(pull == 0, 0.0, pull * mean)  # without rows of weight the mean is NaN
    return five, -pull, along.to(torch.float64).sum(1)


class _Posterior(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Any:
        return below_autograd("posterior", args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.options, ctx.given = inputs[TENSORS:], [v is not None for v in inputs[5:8]]
        ctx.save_for_backward(*inputs[:TENSORS], *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        args = (*ctx.saved_tensors[:TENSORS], *ctx.options)
        known = ctx.saved_tensors[TENSORS:]
        five, grad_x, grad_alpha = without_residual(grads, known[0], args[3])
        out = _gradients(ctx, args, [v.detach() for v in known[:5]], five)
        out[0], out[3] = out[0] + grad_x, out[3] + grad_alpha
        return tuple(out)


def _gradients(
    ctx: Any, args: tuple[Any, ...], sums: list[Tensor], grads: list[Tensor]
) -> list[Any]:
    out = OPS.posterior_backward(*args, *sums, *grads)
    grad_rows = None
    if ctx.needs_input_grad[1]:
        grad_rows = OPS.posterior_backward_rows(*args, grads)
    return query_gradients(ctx, out, grad_rows)


class _PosteriorState(torch.autograd.Function):
    """The gradient of a state is that of its normalised sums, with m and key as constants: what is
    made of a state does not depend on which m it is relative to."""

    @staticmethod
    def forward(*args: Any) -> Any:
        return below_autograd("posterior_state", args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.options, ctx.given = inputs[TENSORS:], [v is not None for v in inputs[5:8]]
        ctx.mark_non_differentiable(output[0], output[1], output[8])
        ctx.save_for_backward(*inputs[:TENSORS], *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        args = (*ctx.saved_tensors[:TENSORS], *ctx.options)
        query, state = query_of(args), State(*ctx.saved_tensors[TENSORS:])
        with torch.no_grad():
            sums = BasicSums(*to_sums(state, query)[:5])
        pulled, grad_t = _to_gradients_of_sums(State(*grads), state, query, sums)
        pull, s = grads[7], state.s[:, None]
        grad_x = (-s * pull).to(query.x.dtype)
        grad_alpha = (pull * (state.acc + s * state.center)).to(torch.float64).sum(1)
        if query.bias is not None or query.own_bias:
            # A query to which no row is left has no gradient: it is asked as if it had them all,
            # for gradients of 0, since 0 times what is NaN would be NaN.
            empty = state.s.detach() == 0
            args = flat(_with_every_row(query, empty), rows_of(args))
            sums, pulled = _zero_where(empty, sums), _zero_where(empty, pulled)
        out = _gradients(ctx, args, list(sums), list(pulled))
        out[0], out[3] = out[0] + grad_x, out[3] + grad_alpha
        out[4] = out[4] + grad_t
        return tuple(out)


def _zero_where(which: Tensor, sums: BasicSums) -> BasicSums:
    mean, *rest = sums
    columns = (torch.where(which, 0.0, v) for v in rest)
    return BasicSums(torch.where(which[:, None], 0.0, mean), *columns)


def _with_every_row(query: Query, which: Tensor) -> Query:
    """The query, with nothing that leaves out all rows of those in `which` [B]."""
    bias, condition, leave_out = query.bias, query.condition, query.leave_out
    if bias is not None:
        bias = torch.where(torch.isneginf(bias.detach()).all(), 0.0, bias)
    if condition is not None:
        condition = condition._replace(h=torch.where(which, _FLAT, condition.h))
    if leave_out is not None:
        leave_out = torch.where(which, -1, leave_out)
    return query._replace(bias=bias, condition=condition, leave_out=leave_out)


def _to_gradients_of_sums(
    grads: State, state: State, query: Query, sums: BasicSums
) -> tuple[BasicSums, Tensor]:
    """Gradients for a state as gradients for its sums, and for the temperature where it is not in
    the sums: s = e^(log_z / T - m), s_v = s (mean_logit / T - m), s_bias = s mean_bias,
    s_sq = s^2 weight_sq, acc = s (mean - center), residual = s (alpha mean - x). What the last adds
    to the gradients for x and for alpha is left to the caller."""
    acc = (grads.acc * state.acc + grads.residual * state.residual).to(torch.float64).sum(1)
    by_log_s = grads.s * state.s + grads.s_v * state.s_v + grads.s_bias * state.s_bias
    by_log_s = by_log_s + 2 * grads.s_sq * state.s_sq + acc
    by_mean_v = grads.s_v * state.s
    # Where there is no weight, or log_z is infinite (at sigma = 0), s does not change.
    moves = torch.isfinite(sums.log_z) & (state.s > 0)
    by_log_s, by_mean_v = (torch.where(moves, v, 0.0) for v in (by_log_s, by_mean_v))
    s = torch.where(state.s > 0, state.s, 1.0)
    m = torch.where(moves, state.m, 0.0)
    log_s, mean_v = m + s.log(), m + state.s_v / s
    grad_t = -(by_log_s * log_s + by_mean_v * mean_v) / query.temperature
    pulled = BasicSums(
        (state.s[:, None] * (grads.acc + query.alpha[:, None] * grads.residual)).to(query.x.dtype),
        by_log_s / query.temperature,
        by_mean_v / query.temperature,
        grads.s_bias * state.s,
        grads.s_sq * state.s.square(),
    )
    return pulled, torch.where(moves, grad_t, 0.0)


class _PosteriorBackward(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Any:
        return below_autograd("posterior_backward", args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.options, ctx.given = inputs[TENSORS:WIDTH], [v is not None for v in inputs[5:8]]
        ctx.save_for_backward(*inputs[:TENSORS], *inputs[WIDTH + 5 :])

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor) -> Any:
        if ctx.needs_input_grad[1]:
            raise RuntimeError(
                "second derivatives through the rows are not offered: detach the rows, or write the"
                " posterior in plain PyTorch for this small problem"
            )
        args = (*ctx.saved_tensors[:TENSORS], *ctx.options)
        grads = list(ctx.saved_tensors[TENSORS:])
        out = OPS.posterior_double_backward(*args, grads, list(grad_grads))
        return (*query_gradients(ctx, out[:7], None), *(None,) * 5, *out[7:])


differentiable("posterior", _Posterior)
differentiable("posterior_state", _PosteriorState)
differentiable("posterior_backward", _PosteriorBackward)
not_differentiable("posterior_backward_rows")
not_differentiable("posterior_double_backward")


# --- vmap ---------------------------------------------------------------------------------------

vmap("posterior", PER_QUERY)
vmap("posterior_state", PER_QUERY, shared_outputs=1)
vmap("posterior_backward")  # its gradient for the bias sums over the batch: never folded
