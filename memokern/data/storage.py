"""Rows as they are stored: checks of rows and of what comes with them, and passes over them in
chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.compiler import is_compiling

from memokern.calls.values import dequantized
from memokern.data import files, sources
from memokern.util.torch_internals import traced

ROW_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8)
# uint8 images are taken from 0..255 to [-1, 1], as diffusion models take them.
UINT8_SCALE, UINT8_SHIFT = 2 / 255, -1.0
# A pass over the rows takes chunks of at most this many numbers, so that there is never a
# floating-point copy of all rows: 2 MiB as float64, which stays in the cache.
CHUNK_ELEMENTS = 1 << 18


def check_rows(rows: torch.Tensor) -> None:
    """TypeError or ValueError unless these are rows that can be stored: dense, of a type in
    `ROW_DTYPES`, and at least one number."""
    if rows.dtype not in ROW_DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in ROW_DTYPES)
        raise TypeError(
            f"expected rows of type {known}, got {str(rows.dtype).removeprefix('torch.')}: convert "
            "them, images in 0..255 with .to(torch.uint8), anything else with .to(torch.float32)"
        )
    if rows.layout != torch.strided:
        raise TypeError(f"expected dense rows, got layout {rows.layout}: use .to_dense()")
    if rows.ndim == 0 or rows.numel() == 0:
        got = list(rows.shape)
        raise ValueError(f"expected rows [N, *shape] with N >= 1 and D >= 1, got {got}")


def as_given(value: Any, what: str) -> torch.Tensor:
    """A tensor of the caller's numbers: of an array of any strides and byte order, a list or a
    number, which are read on the CPU, whatever torch.device() context this is called in."""
    if isinstance(value, np.ndarray) and not is_compiling():
        return files.as_tensor(value, what)
    return value if isinstance(value, torch.Tensor) else torch.as_tensor(value, device="cpu")


def _vector(name: str, value: Any, n: int) -> torch.Tensor:
    """A copy of the caller's [n] values, so that what is checked of them stays true."""
    try:
        tensor = as_given(value, name)
    except (TypeError, ValueError, RuntimeError):
        if isinstance(value, np.ndarray):
            raise
        raise TypeError(
            f"expected {name} as a tensor, array or list of numbers, got {type(value).__name__}"
        ) from None
    if name == "labels" and tuple(tensor.shape) == (n, 1):
        tensor = tensor[:, 0]
    if tuple(tensor.shape) != (n,):
        one_hot = name == "labels" and tensor.ndim == 2 and len(tensor) == n
        hint = ": of one-hot labels take labels.argmax(1)" if one_hot else ""
        got = f"got {list(tensor.shape)}{hint}"
        raise ValueError(f"expected {name} [{n}], one for each row, {got}")
    if tensor.requires_grad:
        raise ValueError(
            f"{name} require a gradient, which a TrainingSet cannot pass on: give them as bias= "
            "to memokern's functions, or detach them"
        )
    return tensor.clone()


def checked_labels(labels: Any, n: int, device: torch.device) -> torch.Tensor | None:
    """The labels as [n] int64 on the device, or None; TypeError or ValueError for anything else."""
    if labels is None:
        return None
    kind = getattr(labels, "dtype", None)
    first = labels[0] if isinstance(labels, (list, tuple)) and labels else None
    if isinstance(first, str) or (isinstance(kind, np.dtype) and kind.kind in "OSU"):
        raise TypeError(
            "expected labels as integers, got strings or objects: "
            "np.unique(labels, return_inverse=True)[1] numbers them"
        )
    tensor = _vector("labels", labels, n)
    if not sources.is_integer(tensor.dtype):
        raise TypeError(f"expected labels of an integer type, got {tensor.dtype}")
    return tensor.to(device, torch.int64)


def checked_conditions(conditions: Any, n: int, device: torch.device) -> torch.Tensor | None:
    """The conditions as [n, k] float64 on the device, or None; TypeError or ValueError unless they
    are finite numbers, k >= 1 for each row."""
    if conditions is None:
        return None
    try:
        tensor = as_given(conditions, "conditions")
    except (TypeError, ValueError, RuntimeError):
        if isinstance(conditions, np.ndarray):
            raise
        got = type(conditions).__name__
        raise TypeError(f"expected conditions as a tensor or array, got {got}") from None
    tensor = tensor[:, None] if tensor.ndim == 1 else tensor.flatten(1)
    if len(tensor) != n or tensor.shape[1] < 1:
        raise ValueError(f"expected conditions [{n}, K], got {list(tensor.shape)}")
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"expected conditions as real numbers, got {tensor.dtype}")
    tensor = tensor.detach().to(device, torch.float64, copy=True).contiguous()
    if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).any(1).nonzero()[0])
        raise ValueError(f"expected finite conditions, got NaN or inf at row {bad}")
    return tensor


def checked_log_weights(log_weights: Any, n: int, device: torch.device) -> torch.Tensor | None:
    """The log weights as [n] float64 on the device, or None; ValueError unless they are finite or
    -inf, and not all -inf."""
    if log_weights is None:
        return None
    tensor = _vector("log_weights", log_weights, n).to(device, torch.float64)
    if tensor.is_meta:  # there are no values to check
        return tensor
    bad = torch.isnan(tensor) | (tensor == math.inf)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"expected log_weights to be finite or -inf, got {float(tensor[first])} at row {first}"
        )
    if bool((tensor == -math.inf).all()):
        raise ValueError("all log_weights are -inf: at least one row must have weight")
    return tensor


def checked_choice(
    index: torch.Tensor | np.ndarray | Sequence[int] | slice, n: int, device: torch.device
) -> torch.Tensor | slice:
    """What chooses some of n rows: a slice, an index [k] int64 or a mask [n] bool. TypeError or
    ValueError for anything else, and for nothing at all."""
    if isinstance(index, slice):
        return index
    index = as_given(index, "index").to(device)
    if index.numel() == 0:
        raise ValueError("the subset has no rows")
    if index.ndim != 1 or index.is_floating_point() or index.is_complex():
        raise TypeError(
            "expected a slice, or a one-dimensional index or boolean mask, "
            f"got {list(index.shape)} {index.dtype}"
        )
    if index.dtype != torch.bool:
        return index.to(torch.int64)
    if len(index) != n:
        raise ValueError(f"expected a mask of {n} entries, got {len(index)}")
    return index


def checked_index(index: torch.Tensor, n: int, device: torch.device) -> torch.Tensor:
    """Row numbers in 0..n-1, of any shape, as int64; TypeError or IndexError otherwise."""
    index = as_given(index, "index")
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"expected an index of int64, got {index.dtype}")
    index = index.to(device, torch.int64)
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < n:
        raise IndexError(
            f"expected indices in 0..{n - 1}, got {int(index.min())}..{int(index.max())}"
        )
    return index


def rows_of_label(labels: torch.Tensor, label: int | Sequence[int]) -> torch.Tensor:
    """A mask [n] of the rows with this label, or one of these labels. TypeError for anything but
    integers, ValueError where no row has one."""
    try:
        wanted = as_given(label, "label").to(labels.device).reshape(-1)
    except (TypeError, ValueError, RuntimeError):  # no number, or beyond int64
        wanted = torch.empty(0, device="cpu")
    if not sources.is_integer(wanted.dtype):
        raise TypeError(f"expected a label, or several, of integers (int64), got {label!r}")
    mask = torch.isin(labels, wanted)
    if not mask.any():
        known = labels.unique().tolist()
        shown = f"{known[:20]}{' ...' if len(known) > 20 else ''}"
        raise ValueError(f"no row has the label {label}; the labels are {shown}")
    return mask


class Classes(NamedTuple):
    """Rows sorted by their labels: those with labels[k] are order[start[k] : start[k + 1]],
    ascending.

    labels: [C] ascending. order: [N] int64. start: [C + 1] int64.
    """

    labels: torch.Tensor
    order: torch.Tensor
    start: torch.Tensor


def sorted_by_class(labels: torch.Tensor) -> Classes:
    """Of labels [N].

    Example:
        >>> import torch
        >>> from memokern.data.storage import sorted_by_class
        >>> [part.tolist() for part in sorted_by_class(torch.tensor([7, 2, 7]))]
        [[2, 7], [1, 0, 2], [0, 1, 3]]
    """
    known, counts = labels.unique(return_counts=True)
    start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Classes(known, torch.argsort(labels, stable=True), start)


def chunks(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views of rows [N, D] that have at most `CHUNK_ELEMENTS` numbers each, or one row."""
    return rows.split(max(1, CHUNK_ELEMENTS // rows.shape[1]))


# A training set keeps what the next two functions compute. Calls that record a gradient use it too,
# and autograd cannot save tensors that were made under torch.inference_mode.
@torch.inference_mode(False)
def mean(rows: torch.Tensor, scale: float, shift: float, dtype: torch.dtype) -> torch.Tensor:
    """The mean of the rows' values, [D], accumulated in float64 and rounded to `dtype`."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for chunk in chunks(rows):
        total += chunk.sum(dim=0, dtype=torch.float64)
    return (total / len(rows) * scale + shift).to(dtype)


SAMPLE, SAMPLE_ELEMENTS = 64, 1 << 22  # rows, and numbers, by which a mean is judged, at most


@torch.inference_mode(False)
def center(
    rows: torch.Tensor,
    scale: float,
    shift: float,
    dtype: torch.dtype,
    log_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mean [D], in `dtype`, of the values of rows that can have weight; the median of some of
    them, feature by feature, where few rows lie so far off that the mean is no center of the
    others: further from the median than half of the rows are."""
    if rows.is_meta or traced(rows):  # there are no values to look at
        return mean(rows, scale, shift, dtype)
    kept = None if log_weights is None else ~torch.isneginf(log_weights)
    if kept is not None and not bool(kept.all()):
        rows = rows[kept]
    found = mean(rows, scale, shift, torch.float64)
    count = max(1, min(len(rows), SAMPLE, SAMPLE_ELEMENTS // rows.shape[1]))
    some = torch.linspace(0, len(rows) - 1, count, device="cpu").to(torch.int64)
    values = dequantized(rows[some.to(rows.device)], scale, shift).to(torch.float64)
    median = values.median(0).values
    off = (values - median).square().sum(1).median()
    if bool((found - median).square().sum() > off):
        found = median
    return found.to(dtype)


@torch.inference_mode(False)
def sq_norms(rows: torch.Tensor, scale: float, shift: float, center: torch.Tensor) -> torch.Tensor:
    """|y_n - center|^2 [N] float64 of the rows' values, for the center as it is stored."""
    center = center.to(torch.float64)
    norms = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    start = 0
    for chunk in chunks(rows):
        value = dequantized(chunk, scale, shift).to(torch.float64) - center
        torch.sum(value.square_(), dim=1, out=norms[start : start + len(chunk)])
        start += len(chunk)
        del value  # before the next chunk is made
    return norms


def require_finite(rows: torch.Tensor, start: int = 0) -> None:
    """ValueError that names the first row of [N, D] with NaN or inf, if there is one. start: the
    number of the first row here."""
    if rows.is_meta or not rows.dtype.is_floating_point:
        return
    for chunk in chunks(rows):
        # The minimum and maximum are NaN where a value is, so that one pass without a temporary
        # decides.
        if not torch.isfinite(torch.stack(chunk.aminmax())).all():
            bad = (~torch.isfinite(chunk)).any(dim=1).nonzero()
            raise ValueError(
                f"expected finite rows, got NaN or infinite values in row {start + int(bad[0])}: "
                "remove such rows or replace the values"
            )
        start += len(chunk)
