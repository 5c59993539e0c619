"""What the public functions are given, checked: queries, numbers per query, rows, biases."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling

from memokern.calls import WEIGHTINGS, Query, Rows
from memokern.data.parted import PartedSet
from memokern.data.storage import UINT8_SCALE, UINT8_SHIFT, as_given, check_rows
from memokern.data.training_set import TrainingSet
from memokern.util import env
from memokern.util.torch_internals import is_plain, traced

HALVES = (torch.float16, torch.bfloat16)
# A number, or one for each query.
PerQuery = float | int | np.number | np.ndarray | Tensor


class Data(NamedTuple):
    """A data set as the operations take it. shape: of one row; log_weights: [N] float64 or None."""

    rows: Rows
    shape: tuple[int, ...]
    log_weights: Tensor | None


class Asked(NamedTuple):
    """A call's arguments, checked.

    query: of [B] queries x [B, D]; batch: the shape [*batch] that they were given in;
    sigma, alpha, temperature: [*batch] float64.
    """

    data: Data
    query: Query
    batch: torch.Size
    sigma: Tensor
    alpha: Tensor
    temperature: Tensor


def as_data(data: TrainingSet | Tensor) -> Data:
    """A training set, or a tensor [N, *shape] checked."""
    if isinstance(data, TrainingSet):
        return Data(data.as_rows(), data.shape, data.log_weights)
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
    return Data(Rows(rows, scale, shift), tuple(data.shape[1:]), None)


def computable(x: Tensor) -> Tensor:
    """x, or half-precision queries in the float32 that they are computed in; differentiable."""
    return x.to(torch.float32) if isinstance(x, Tensor) and x.dtype in HALVES else x


def batch_shape(x: Tensor, data: Data | TrainingSet | Tensor) -> torch.Size:
    """[*batch] of queries x [*batch, *shape]; TypeError or ValueError if they are not that."""
    rows, shape, _ = data if isinstance(data, Data) else as_data(data)
    if not isinstance(x, Tensor):
        raise TypeError(f"expected x as a tensor [*batch, *shape], got {type(x).__name__}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"expected x as float32 or float64, got {x.dtype}; use x.float() (rows may stay in"
            " half precision or uint8)"
        )
    if x.device != rows.data.device:
        raise ValueError(
            f"x is on {x.device} and the data on {rows.data.device}; move one with .to(device)"
        )
    k = len(shape)
    if x.dim() < k or tuple(x.shape[x.dim() - k :]) != shape:
        raise ValueError(
            f"expected x [*batch, {', '.join(map(str, shape))}] to match the rows, got"
            f" {tuple(x.shape)}"
        )
    return x.shape[: x.dim() - k]


def broadcastable(name: str, value: PerQuery, batch: Sequence[int], device: torch.device) -> Tensor:
    """A number, or one for each query, as float64 that broadcasts to the batch.

    Numbers are Python's or numpy's; arrays and tensors may have axes of size 1 after the batch's,
    [*batch, 1, ..., 1], as samplers give them.
    """
    if isinstance(value, Tensor):
        tensor = value.to(device, torch.float64)
        if tensor.dim() == 0 or tensor.shape == batch:  # small calls feel what is asked below
            return tensor
    elif isinstance(value, np.ndarray):
        tensor = as_given(value, name).to(device, torch.float64)
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"expected {name} as a number or a tensor, got {type(value).__name__}")
    elif is_compiling():
        # torch.full would bake the first values of a symbolic float into the graph, without a word.
        return torch.zeros((), dtype=torch.float64, device=device) + value
    else:  # filled in there: a copy from the host would wait for the device
        return torch.full((), value, dtype=torch.float64, device=device)
    extra = tensor.shape[len(batch) :]
    if all(size == 1 for size in extra):
        tensor = tensor.reshape(tensor.shape[: len(batch)])
        sizes = zip(reversed(tensor.shape), reversed(batch), strict=False)
        if all(n in (1, size) for n, size in sizes):
            return tensor
    raise ValueError(
        f"expected {name} as a number or a tensor that broadcasts to the batch {tuple(batch)}, got"
        f" {tuple(value.shape)}"
    )


def per_query(name: str, value: PerQuery, batch: Sequence[int], device: torch.device) -> Tensor:
    """The same, expanded to [*batch]."""
    tensor = broadcastable(name, value, batch, device)
    return tensor if tensor.shape == batch else tensor.expand(tuple(batch))


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


def _bias(bias: Tensor | None, data: Data, part: bool) -> Tensor | None:
    """The bias with the rows' log weights. part: of a part of the data, of which no row may be
    left."""
    if bias is None:
        return data.log_weights  # a TrainingSet has checked them
    n, device = data.rows.n, data.rows.data.device
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
        if not part and bool(torch.isneginf(bias).all()):
            raise ValueError("every bias is -inf: no row is left to weigh")
    if data.log_weights is not None:
        bias = bias + data.log_weights
        if not part and not traced(bias) and bool(torch.isneginf(bias).all()):
            raise ValueError("bias and log_weights together leave no row: all sums are -inf")
    return bias


def log_total(bias: Tensor | None, n: int) -> Tensor | float:
    """log sum exp of the bias []; log N without one."""
    return math.log(n) if bias is None else torch.logsumexp(bias, 0)


def log_sum_exp(values: Tensor) -> Tensor:
    """logsumexp of numbers [M] that may all be -inf, as the biases of a part of the data of which
    no row is left: its derivatives are 0 there and not NaN."""
    nothing = torch.isneginf(values).all()
    return torch.where(nothing, -math.inf, torch.logsumexp(torch.where(nothing, 0.0, values), 0))


# What each must be, said of a float or of every entry of a tensor. NaN is never in a range.
_RANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "sigma": (lambda v: (v >= 0) & (v < math.inf), "finite and >= 0"),
    "alpha": (lambda v: (v > -math.inf) & (v < math.inf), "finite"),
    "temperature": (lambda v: (v > 0) & (v < math.inf), "finite and > 0"),
}


def _number(name: str, value: PerQuery, batch: Sequence[int], device: torch.device) -> Tensor:
    """sigma, alpha or temperature [*batch], checked."""
    good, what = _RANGES[name]
    if type(value) is float and not is_compiling():  # there it may be symbolic
        if not good(value):
            raise ValueError(f"expected {name} {what}, got {value}")
        return torch.full(batch, value, dtype=torch.float64, device=device)
    tensor = per_query(name, value, batch, device)
    # Of one number Python sees as much as four kernels do.
    if is_compiling() or (tensor.numel() == 1 and is_plain(tensor) and good(tensor.item())):
        return tensor
    require(name, value, tensor, good(tensor), what)
    return tensor


def one_of(name: str, value: str, known: Sequence[str]) -> str:
    """The value; ValueError unless it is one of those known."""
    if value not in known:
        raise ValueError(f"expected {name} one of {', '.join(known)}, got {value!r}")
    return value


def check_k(k: int, n: int) -> None:
    """TypeError or ValueError unless k is a number of n rows."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"expected k as an int, got {type(k).__name__}")
    if not 1 <= k <= n:
        raise ValueError(f"expected 1 <= k <= N = {n}, got {k}")


def checked(
    x: Tensor,
    data: TrainingSet | Tensor,
    sigma: PerQuery,
    alpha: PerQuery,
    temperature: PerQuery,
    bias: Tensor | None,
    weighting: str = "gaussian",
    precision: str = "auto",
    *,
    part: bool = False,
) -> Asked:
    """The arguments of a public function; errors say what was expected and what came. part: the
    data are a part of all, of which the bias may leave no row."""
    found = as_data(data)
    batch = batch_shape(x, found)
    one_of("weighting", weighting, WEIGHTINGS)
    one_of("precision", precision, ("auto", *env.PRECISIONS))
    s = _number("sigma", sigma, batch, x.device)
    a = _number("alpha", alpha, batch, x.device)
    t = _number("temperature", temperature, batch, x.device)
    # Of a set whose rows are apart, a part may have no weight.
    b = _bias(bias, found, part or isinstance(data, PartedSet))
    flat = x if x.dim() == 2 and len(batch) == 1 else x.reshape(-1, found.rows.dim)
    columns = (s, a, t) if len(batch) == 1 else (s.reshape(-1), a.reshape(-1), t.reshape(-1))
    return Asked(found, Query(flat, *columns, b, weighting, precision), batch, s, a, t)
