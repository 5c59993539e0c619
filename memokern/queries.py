"""What the public functions are asked, checked: queries, numbers per query, rows, biases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from memokern.data import TrainingSet
from memokern.rows import UINT8_SCALE, UINT8_SHIFT, check_rows

KERNELS = ("gaussian", "log")

PerQuery = float | int | Tensor


class Rows(NamedTuple):
    """A data set as the operations take it."""

    rows: Tensor
    shape: tuple[int, ...]
    scale: float
    shift: float
    center: Tensor | None
    sq_norms: Tensor | None
    log_weights: Tensor | None


def as_rows(data: TrainingSet | Tensor) -> Rows:
    """A training set, or a tensor [N, *shape] checked."""
    if isinstance(data, TrainingSet):
        return Rows(
            data.rows, data.shape, data.scale, data.shift, data.center, data.sq_norms,
            data.log_weights,
        )  # fmt: skip
    if not isinstance(data, Tensor):
        raise TypeError(
            f"expected data as a TrainingSet or a tensor [N, ...], got {type(data).__name__};"
            " wrap arrays and files in memokern.TrainingSet"
        )
    check_rows(data)
    if data.dim() < 2:
        raise ValueError(
            f"expected data [N, *shape], got {tuple(data.shape)}; one row is data[None], rows of"
            " one number each are data[:, None]"
        )
    scale, shift = (UINT8_SCALE, UINT8_SHIFT) if data.dtype == torch.uint8 else (1.0, 0.0)
    rows = data.reshape(data.shape[0], -1)
    if rows.stride(1) != 1:  # the kernels read whole rows; a TrainingSet copies once, not per call
        rows = rows.contiguous()
    return Rows(rows, tuple(data.shape[1:]), scale, shift, None, None, None)


def batch_shape(x: Tensor, data: Rows | TrainingSet | Tensor) -> torch.Size:
    """[*batch] of queries x [*batch, *shape]; TypeError or ValueError if they are not that."""
    rows = data if isinstance(data, Rows) else as_rows(data)
    if not isinstance(x, Tensor):
        raise TypeError(f"expected x as a tensor [*batch, *shape], got {type(x).__name__}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"expected x as float32 or float64, got {x.dtype}; use x.float() (rows may stay in"
            " half precision or uint8)"
        )
    if x.device != rows.rows.device:
        raise ValueError(
            f"x is on {x.device} and the data on {rows.rows.device}; move one with .to(device)"
        )
    k = len(rows.shape)
    if x.dim() < k or tuple(x.shape[x.dim() - k :]) != rows.shape:
        raise ValueError(
            f"expected x [*batch, {', '.join(map(str, rows.shape))}] to match the rows, got"
            f" {tuple(x.shape)}"
        )
    return x.shape[: x.dim() - k]


def per_query(name: str, value: PerQuery, batch: Sequence[int], device: torch.device) -> Tensor:
    """A float or a tensor that broadcasts to the batch -> [*batch] float64."""
    if isinstance(value, bool) or not isinstance(value, float | int | Tensor):
        raise TypeError(f"expected {name} as a number or a tensor, got {type(value).__name__}")
    tensor = torch.as_tensor(value, dtype=torch.float64, device=device)
    try:
        return tensor.expand(tuple(batch))
    except RuntimeError:
        raise ValueError(
            f"expected {name} as a number or a tensor that broadcasts to the batch"
            f" {tuple(batch)}, got {tuple(tensor.shape)}"
        ) from None


def require(name: str, value: PerQuery, tensor: Tensor, ok: Tensor, what: str) -> None:
    """Raises where a value is out of range; tensors under a compiler or transform, or without
    values (meta), are trusted."""
    if traced(tensor):
        return
    good = ok.all()
    if not bool(good):
        got = value if not isinstance(value, Tensor) else tensor[~ok][0].item()
        raise ValueError(f"expected {name} {what}, got {got}")


def wide(value: Tensor, like: Tensor) -> Tensor:
    """A number per query, shaped to multiply `like`, in its type."""
    return value.reshape(value.shape + (1,) * (like.dim() - value.dim())).to(like.dtype)


def traced(*tensors: Tensor | None) -> bool:
    """Whether these have no values to look at: under a compiler, a transform, or on meta."""
    if torch.compiler.is_compiling():
        return True
    functorch = torch._C._functorch
    return any(
        t is not None
        and (
            t.is_meta
            or functorch.is_functorch_wrapped_tensor(t)
            or isinstance(t, torch._subclasses.FakeTensor)
        )
        for t in tensors
    )


def under_transform(*tensors: Tensor | None) -> bool:
    """Whether a derivative transform that a registered operation would lose is at work here."""
    if torch.compiler.is_compiling():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or []
    if any(level.key() != torch._C._functorch.TransformType.Vmap for level in stack):
        return True
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def _bias(bias: Tensor | None, rows: Rows) -> tuple[Tensor | None, Tensor]:
    """The bias with the rows' log weights, and log sum exp of it."""
    n, device = rows.rows.shape[0], rows.rows.device
    if bias is not None:
        if not isinstance(bias, Tensor):
            raise TypeError(f"expected bias as a tensor [{n}], got {type(bias).__name__}")
        if bias.shape != (n,):
            raise ValueError(f"expected bias [{n}], one per row, got {tuple(bias.shape)}")
        if bias.device != device:
            raise ValueError(f"bias is on {bias.device} and the rows on {device}")
        if not bias.is_floating_point():
            raise TypeError(f"expected a floating-point bias, got {bias.dtype}")
        bias = bias.to(torch.float64)
        if not traced(bias):
            if bool((torch.isnan(bias) | torch.isposinf(bias)).any()):
                raise ValueError("expected bias finite or -inf (a row left out), got NaN or +inf")
            if bool(torch.isneginf(bias).all()):
                raise ValueError("every bias is -inf: no row is left to weigh")
    if rows.log_weights is not None:
        bias = rows.log_weights if bias is None else bias + rows.log_weights
        if not traced(bias) and bool(torch.isneginf(bias).all()):
            raise ValueError("bias and log_weights together leave no row: all sums are -inf")
    if bias is None:
        total = torch.full((), math.log(n), dtype=torch.float64, device=device)
    else:
        total = torch.logsumexp(bias, 0)
    return bias, total


def checked(
    x: Tensor,
    data: TrainingSet | Tensor,
    sigma: PerQuery,
    alpha: PerQuery,
    temperature: PerQuery,
    bias: Tensor | None,
    kernel: str,
) -> tuple[Rows, torch.Size, tuple[Tensor, Tensor, Tensor], Tensor | None, Tensor]:
    """A call's arguments, checked: rows, [*batch], sigma, alpha and temperature [*batch], the bias
    with the rows' log weights, and log sum exp of it."""
    rows = as_rows(data)
    batch = batch_shape(x, rows)
    if kernel not in KERNELS:
        raise ValueError(f"expected kernel one of {', '.join(KERNELS)}, got {kernel!r}")
    s = per_query("sigma", sigma, batch, x.device)
    a = per_query("alpha", alpha, batch, x.device)
    t = per_query("temperature", temperature, batch, x.device)
    require("sigma", sigma, s, (s >= 0) & torch.isfinite(s), "finite and >= 0")
    require("alpha", alpha, a, torch.isfinite(a), "finite")
    require("temperature", temperature, t, (t > 0) & torch.isfinite(t), "finite and > 0")
    return rows, batch, (s, a, t), *_bias(bias, rows)
