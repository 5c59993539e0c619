"""The primitive operations, registered with PyTorch: ``torch.ops.memokern.*``.

Schema, fake, autograd and vmap; nothing else. What an operation computes is in
:mod:`memokern.backends.reference`, who computes it in :mod:`memokern.backends`.

``posterior(x, rows, sigma, alpha, temperature, bias, center, sq_norms, scale, shift, kernel,
precision)``
    One sweep over the rows y = scale * rows + shift. With the logits

    * ``kernel="gaussian"``: l_n = -|x - alpha y_n|^2 / (2 sigma^2) + b_n
    * ``kernel="log"``: l_n = -(D / 2) log(|x - alpha y_n|^2 / D) + b_n

    and w = softmax(l / T), it returns mean = sum w y [B, D] in x's type and, as [B] float64,
    log_z = T logsumexp(l / T), mean_logit = sum w l, mean_bias = sum w b, weight_sq = sum w^2.
    x [B, D] float32 or float64; rows [N, D] float64, float32, bfloat16, float16 or uint8; sigma,
    alpha, temperature [B] float64; bias [N] float64 or None; center [D] and
    sq_norms [N] = |y_n - center|^2 are what the rows' owner has cached, or None. precision, where
    products with float32 rows can be formed in several ways: see :func:`memokern.posterior`.

``nearest(x, rows, k, center, sq_norms, scale, shift)``
    The k smallest |x - y_n|^2 [B, k] float64, ascending, and their indices [B, k] int64.

Both are differentiable twice (posterior: in x, sigma, alpha, temperature, bias; the rows once).
The dispatcher hands a tensor with a forward-mode tangent, or one inside ``torch.func.grad``, to the
same autograd kernel, which would silently lose the tangent: it raises instead. The public functions
of :mod:`memokern` notice these transforms first and answer them through the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from memokern import backends
from memokern.backends import reference

KERNELS = ("gaussian", "log")

_LIB = torch.library.Library("memokern", "DEF")
_DATA = "Tensor? center, Tensor? sq_norms"
_HOW = "float scale, float shift, str kernel, str precision='auto'"
_QUERY = "Tensor x, Tensor rows, Tensor sigma, Tensor alpha, Tensor temperature, Tensor? bias"
_FIVE = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
_SAVED = "Tensor mean, Tensor log_z, Tensor mean_logit, Tensor mean_bias, Tensor weight_sq"
_GRADS = (
    "Tensor grad_mean, Tensor grad_log_z, Tensor grad_mean_logit, Tensor grad_mean_bias,"
    " Tensor grad_weight_sq"
)

_LIB.define(f"posterior({_QUERY}, {_DATA}, {_HOW}) -> {_FIVE}")
_LIB.define(f"posterior_backward({_QUERY}, {_DATA}, {_SAVED}, {_GRADS}, {_HOW}) -> {_FIVE}")
_LIB.define(
    f"posterior_double_backward({_QUERY}, Tensor? center, Tensor[] grads, Tensor[] grad_grads,"
    f" {_HOW}) -> Tensor[]"
)
_LIB.define(f"posterior_backward_rows({_QUERY}, Tensor? center, Tensor[] grads, {_HOW}) -> Tensor")
_LIB.define(
    f"nearest(Tensor x, Tensor rows, SymInt k, {_DATA}, float scale, float shift)"
    " -> (Tensor, Tensor)"
)

_OPS = torch.ops.memokern


def _run(name: str) -> Callable[..., Any]:
    def run(x: Tensor, *args: Any) -> Any:
        return getattr(backends.choose(x.device, name), name)(x, *args)

    return run


def _run_of_kernel(name: str, at: int) -> Callable[..., Any]:
    """The same of an operation that is told the kernel, its argument `at` after x."""

    def run(x: Tensor, *args: Any) -> Any:
        if args[at] not in KERNELS:
            raise ValueError(f"kernel must be {' or '.join(KERNELS)}, not {args[at]!r}")
        return getattr(backends.choose(x.device, name), name)(x, *args)

    return run


for _name, _at in (
    ("posterior", 9), ("posterior_backward", 19), ("posterior_backward_rows", 9)
):  # fmt: skip
    _LIB.impl(_name, _run_of_kernel(_name, _at), "CompositeExplicitAutograd")
_LIB.impl("nearest", _run("nearest"), "CompositeExplicitAutograd")
_LIB.impl(
    "posterior_double_backward", reference.posterior_double_backward, "CompositeExplicitAutograd"
)


# --- fake ---------------------------------------------------------------------------------------


def _fake_posterior(x: Tensor, rows: Tensor, sigma: Tensor, *_: Any) -> tuple[Tensor, ...]:
    stats = [sigma.new_empty(sigma.shape) for _ in range(4)]
    return (x.new_empty(x.shape), *stats)


def _fake_backward(
    x: Tensor, rows: Tensor, sigma: Tensor, alpha: Tensor, temperature: Tensor,
    bias: Tensor | None, *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    stats = [sigma.new_empty(sigma.shape) for _ in range(3)]
    grad_bias = sigma.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return (x.new_empty(x.shape), *stats, grad_bias)


def _fake_double_backward(
    x: Tensor, rows: Tensor, sigma: Tensor, alpha: Tensor, temperature: Tensor,
    bias: Tensor | None, center: Tensor | None, grads: list[Tensor], *_: Any,
) -> list[Tensor]:  # fmt: skip
    heads = _fake_backward(x, rows, sigma, alpha, temperature, bias)
    return [*heads, *(g.new_empty(g.shape) for g in grads)]


def _fake_nearest(x: Tensor, rows: Tensor, k: int, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], k)
    return x.new_empty(shape, dtype=torch.float64), x.new_empty(shape, dtype=torch.int64)


for _name, _fake in (
    ("posterior", _fake_posterior),
    ("posterior_backward", _fake_backward),
    ("posterior_double_backward", _fake_double_backward),
    ("posterior_backward_rows", lambda x, rows, *_: rows.new_empty(rows.shape)),
    ("nearest", _fake_nearest),
):
    torch.library.register_fake(f"memokern::{_name}", _fake, lib=_LIB)


# --- autograd -----------------------------------------------------------------------------------


class _Posterior(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.posterior(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.how = inputs[8:]  # of three or four: the dispatcher leaves a default out
        ctx.save_for_backward(*inputs[:8], *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        *inputs, mean, log_z, mean_logit, mean_bias, weight_sq = ctx.saved_tensors
        saved = [v.detach() for v in (mean, log_z, mean_logit, mean_bias, weight_sq)]
        out = _OPS.posterior_backward(*inputs, *saved, *grads, *ctx.how)
        grad_rows = None
        if ctx.needs_input_grad[1]:
            grad_rows = _OPS.posterior_backward_rows(*inputs[:7], list(grads), *ctx.how)
        grad_bias = out[4] if inputs[5] is not None else None
        return (out[0], grad_rows, *out[1:4], grad_bias, *(None,) * (2 + len(ctx.how)))


class _PosteriorBackward(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.posterior_backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.how = inputs[18:]
        ctx.save_for_backward(*inputs[:7], *inputs[13:18])

    @staticmethod
    def backward(ctx: Any, *grad_grads: Tensor) -> Any:
        if ctx.needs_input_grad[1]:
            raise RuntimeError(
                "second derivatives through the rows are not offered: detach the rows, or write the"
                " posterior in plain PyTorch for this small problem"
            )
        inputs, grads = ctx.saved_tensors[:7], list(ctx.saved_tensors[7:])
        out = _OPS.posterior_double_backward(*inputs, grads, list(grad_grads), *ctx.how)
        grad_bias = out[4] if inputs[5] is not None else None
        return (out[0], None, *out[1:4], grad_bias, *(None,) * 7, *out[5:], *(None,) * len(ctx.how))


def _refuse(what: str) -> Callable[..., Any]:
    """The autograd kernel of an operation without a derivative: says so when one is asked for."""

    class Refused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, call: Callable[[], Any], *tensors: Tensor) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                out = call()
            return tuple(out) if isinstance(out, list) else out

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            raise RuntimeError(
                f"{what} has no further derivative; evaluate it without create_graph"
            )

    op = getattr(_OPS, what)

    def call(*args: Any) -> Any:
        flat: list[Tensor] = []
        for arg in args:
            flat.extend(v for v in (arg if isinstance(arg, list | tuple) else [arg])
                        if isinstance(v, Tensor))  # fmt: skip
        _no_forward_mode(what, flat)
        out = Refused.apply(lambda: op(*args), *flat)
        return list(out) if isinstance(out, tuple) else out

    return call


class _Nearest(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return _OPS.nearest(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, rows, _, _, _, ctx.scale, ctx.shift = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, rows, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        x, rows, index = ctx.saved_tensors
        y = rows[index].to(torch.float64) * ctx.scale + ctx.shift
        pull = 2 * grad[..., None] * (x[:, None].to(torch.float64) - y)  # [B, k, D]
        grad_rows = None
        if ctx.needs_input_grad[1]:
            flat = -ctx.scale * pull.reshape(-1, x.shape[1]).to(rows.dtype)
            grad_rows = torch.zeros_like(rows).index_add(0, index.reshape(-1), flat)
        return (pull.sum(1).to(x.dtype), grad_rows, *(None,) * 5)


def _no_forward_mode(what: str, args: Sequence[Any]) -> None:
    for arg in args:
        if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
            raise RuntimeError(
                f"torch.ops.memokern.{what} carries no forward-mode tangent: use memokern.jvp for"
                " the Jacobian-vector product of the mean, or memokern.posterior, which answers"
                " forward mode and torch.func through the reference"
            )


def _autograd(what: str, function: Any) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        _no_forward_mode(what, args)
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return function.apply(*args)
        return function.forward(*args)  # nothing to record: that would cost more than a small call

    return call


_LIB.impl("posterior", _autograd("posterior", _Posterior), "Autograd")
_LIB.impl("posterior_backward", _autograd("posterior_backward", _PosteriorBackward), "Autograd")
_LIB.impl("nearest", _autograd("nearest", _Nearest), "Autograd")
for _name in ("posterior_double_backward", "posterior_backward_rows"):
    _LIB.impl(_name, _refuse(_name), "Autograd")


# --- vmap ---------------------------------------------------------------------------------------


def _vmap(name: str, per_query: frozenset[int]) -> Callable[..., Any]:
    """Fold the mapped axis into the batch where only per-query tensors have one, else loop."""
    op = getattr(_OPS, name)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        size = info.batch_size
        moved = [a if d is None else a.movedim(d, 0) for a, d in zip(args, in_dims, strict=True)]
        mapped = [d is not None for d in in_dims]
        if size and all(i in per_query for i, m in enumerate(mapped) if m):
            flat = list(moved)
            for i in per_query:
                value = moved[i] if mapped[i] else moved[i].expand(size, *moved[i].shape)
                flat[i] = value.flatten(0, 1)
            outs = op(*flat)
            return tuple(v.unflatten(0, (size, -1)) for v in outs), (0,) * len(outs)
        each = [
            op(*(a[i] if m else a for a, m in zip(moved, mapped, strict=True))) for i in range(size)
        ]
        outs = tuple(torch.stack(column) for column in zip(*each, strict=True))
        return outs, (0,) * len(outs)

    return rule


for _name, _per_query in (
    ("posterior", {0, 2, 3, 4}),
    ("posterior_backward", ()),  # its bias gradient sums over the batch: never folded
    ("nearest", {0}),
):
    torch.library.register_vmap(f"memokern::{_name}", _vmap(_name, frozenset(_per_query)), lib=_LIB)

posterior = _OPS.posterior
posterior_backward = _OPS.posterior_backward
nearest = _OPS.nearest
