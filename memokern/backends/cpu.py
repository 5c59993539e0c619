"""The compiled CPU kernels: checks what pointers cannot, and hands them over.

The signatures are those of :mod:`memokern.ops`. The kernels are described in ``csrc/README.md``.
"""

from __future__ import annotations

import functools
import math
from array import array
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from memokern import env

_ROW_TYPES = {
    torch.float64: 0,
    torch.float32: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.uint8: 4,
}
_KERNELS = {"gaussian": 0, "log": 1}
_F64 = torch.float64
_LEVELS = 16  # the rounding that csrc/scan-inl.h allows for is that of so many levels


@functools.cache
def _module() -> ModuleType:
    """The compiled module, set to the instruction set asked for. Raises ImportError without it."""
    from memokern import _C  # type: ignore[attr-defined]  # compiled: mypy cannot see it

    asked = env.isa()
    try:
        _C.select_isa(asked)
    except RuntimeError as error:
        raise RuntimeError(f"{env.ISA}={asked}: {error}") from None
    return _C


@functools.lru_cache(maxsize=256)
def _described(*values: Any) -> Any:
    """The rows as the module takes them: of the same numbers the same object, which is quicker."""
    return _module().Rows(*values)


def unavailable() -> str | None:
    """None where the kernels can run, else the reason in one line."""
    try:
        _module()
    except ImportError as error:
        return (
            f"the compiled module is missing ({error}): install memokern where there is a C++"
            " compiler"
        )
    return None


def isa() -> str:
    """The instruction set in use: ``baseline``, ``avx2`` or ``avx512``."""
    return str(_module().isa())


def detail() -> str:
    """One line for ``memokern info``."""
    threads = torch.get_num_threads() if _module().openmp else 1
    return f"compiled kernels, {isa()}, {threads} thread{'s' if threads > 1 else ''}"


def _rows(
    rows: Tensor, center: Tensor | None, sq_norms: Tensor | None, scale: float, shift: float
) -> tuple[Any, tuple[Tensor | None, Tensor | None]]:
    """The rows as the module takes them, and the tensors that must outlive the call."""
    if rows.dtype not in _ROW_TYPES:
        known = ", ".join(str(t).removeprefix("torch.") for t in _ROW_TYPES)
        raise TypeError(
            f"rows must be one of {known}, not {str(rows.dtype).removeprefix('torch.')}"
        )
    n, d = rows.shape
    if (center is None) != (sq_norms is None):
        raise ValueError("center and sq_norms belong together: give both or neither")
    if d > 1 and rows.stride(1) != 1:
        raise ValueError(
            f"each row must be contiguous (stride 1), not stride {rows.stride(1)}: call"
            " rows.contiguous() once"
        )
    keep = (_wide(center), _wide(sq_norms))
    if keep[0] is not None and keep[0].shape != (d,):
        raise ValueError(f"center must have shape [{d}], not {list(keep[0].shape)}")
    if keep[1] is not None and keep[1].shape != (n,):
        raise ValueError(f"sq_norms must have shape [{n}], not {list(keep[1].shape)}")
    stride = rows.stride(0) if n > 1 else d
    args = _described(
        rows.data_ptr(),
        n,
        d,
        stride,
        _ROW_TYPES[rows.dtype],
        scale,
        shift,
        _ptr(keep[0]),
        _ptr(keep[1]),
    )
    return args, keep


def _wide(t: Tensor | None) -> Tensor | None:
    if t is None or (t.dtype == _F64 and t.is_contiguous()):
        return t
    return t.to(_F64).contiguous()


def _ptr(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _queries(
    x: Tensor, rows: Tensor, sigma: Tensor, alpha: Tensor, temperature: Tensor, bias: Tensor | None
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Contiguous copies where needed: x in the compute type, the rest in float64."""
    q = _queried(x, rows)
    columns = [t.to(_F64).contiguous() for t in (sigma, alpha, temperature)]
    for name, t in zip(("sigma", "alpha", "temperature"), columns, strict=True):
        if t.shape != (x.shape[0],):
            raise ValueError(f"{name} must have shape [{x.shape[0]}], not {list(t.shape)}")
    if bias is not None:
        bias = bias.to(_F64).contiguous()
        if bias.shape != (rows.shape[0],):
            raise ValueError(f"bias must have shape [{rows.shape[0]}], not {list(bias.shape)}")
    return q, columns, bias


def _queried(x: Tensor, rows: Tensor) -> Tensor:
    """x, contiguous, in the compute type."""
    if x.ndim != 2 or rows.ndim != 2 or x.shape[1] != rows.shape[1] or rows.shape[0] < 1:
        raise ValueError(
            f"expected x [B, D] and rows [N >= 1, D], not {list(x.shape)} and {list(rows.shape)}"
        )
    return x.to(_F64 if _F64 in (x.dtype, rows.dtype) else torch.float32).contiguous()


def posterior(
    x: Tensor,
    rows: Tensor,
    sigma: Tensor,
    alpha: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    center: Tensor | None,
    sq_norms: Tensor | None,
    scale: float,
    shift: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The dense sweep; see :func:`memokern.ops.posterior` for the formulas."""
    q, numbers, b = _queries(x, rows, sigma, alpha, temperature, bias)
    mean, *stats = sweep(q, rows, numbers, b, center, sq_norms, scale, shift, kernel)
    return mean.to(x.dtype), stats[0], stats[1], stats[2], stats[3]


def sweep(
    q: Tensor,
    rows: Tensor,
    numbers: Sequence[Tensor],
    bias: Tensor | None,
    center: Tensor | None,
    sq_norms: Tensor | None,
    scale: float,
    shift: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`posterior` of queries [*batch, *shape], contiguous in the compute type, and numbers
    [*batch] float64."""
    args, keep = _rows(rows, center, sq_norms, scale, shift)
    bias = _wide(bias)
    s, a, t = numbers
    if s.numel() > 1:  # they may be views of one number
        s, a, t = s.contiguous(), a.contiguous(), t.contiguous()
    mean, log_z = torch.empty_like(q), torch.empty_like(s)
    # Not views of one tensor: outputs of an operation may not alias.
    mean_logit, mean_bias = torch.empty_like(s), torch.empty_like(s)
    weight_sq = torch.empty_like(s)
    _module().posterior(
        args, q.dtype == _F64, q.data_ptr(), s.numel(),
        s.data_ptr(), a.data_ptr(), t.data_ptr(), _ptr(bias),
        _KERNELS[kernel], torch.get_num_threads(), mean.data_ptr(),
        log_z.data_ptr(), mean_logit.data_ptr(), mean_bias.data_ptr(), weight_sq.data_ptr(),
    )  # fmt: skip
    del keep
    return mean, log_z, mean_logit, mean_bias, weight_sq


def small_mean(
    q: Tensor,
    rows: Tensor,
    sigma: float,
    alpha: float,
    temperature: float,
    bias: Tensor | None,
    center: Tensor,
    sq_norms: Tensor,
    scale: float,
    shift: float,
) -> Tensor:
    """The mean alone, of a few queries as for :func:`sweep` with numbers that they share and a
    training set's contiguous tensors: no tensor is made but the result, nothing is checked."""
    n, d = rows.shape
    b = q.numel() // d
    mean = torch.empty_like(q)
    # The numbers of each query, and room for its four sums.
    columns = array("d", (sigma, alpha, temperature, 0.0, 0.0, 0.0, 0.0))
    if b != 1:
        one, columns = columns, array("d")
        for number in one:
            columns.extend(array("d", (number,)) * b)
    start, step = columns.buffer_info()[0], 8 * b
    args = _described(
        rows.data_ptr(), n, d, d, _ROW_TYPES[rows.dtype], scale, shift,
        center.data_ptr(), sq_norms.data_ptr(),
    )  # fmt: skip
    _module().posterior(
        args, q.dtype == _F64, q.data_ptr(), b, start, start + step, start + 2 * step,
        0 if bias is None else bias.data_ptr(), 0, torch.get_num_threads(), mean.data_ptr(),
        start + 3 * step, start + 4 * step, start + 5 * step, start + 6 * step,
    )  # fmt: skip
    return mean


def posterior_backward(
    x: Tensor,
    rows: Tensor,
    sigma: Tensor,
    alpha: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    center: Tensor | None,
    sq_norms: Tensor | None,
    mean: Tensor,
    log_z: Tensor,
    mean_logit: Tensor,
    mean_bias: Tensor,
    weight_sq: Tensor,
    grad_mean: Tensor,
    grad_log_z: Tensor,
    grad_mean_logit: Tensor,
    grad_mean_bias: Tensor,
    grad_weight_sq: Tensor,
    scale: float,
    shift: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for x, sigma, alpha, temperature and bias; see :mod:`memokern.ops`."""
    q, (s, a, t), b = _queries(x, rows, sigma, alpha, temperature, bias)
    args, keep = _rows(rows, center, sq_norms, scale, shift)
    # x's type rounded the mean: what is left of <g, y - mean> would be noise.
    if q.dtype != x.dtype:
        mean = posterior(
            q, rows, sigma, alpha, temperature, bias, center, sq_norms, scale, shift, kernel
        )[0]
    mean, grad_mean = mean.to(_F64).contiguous(), grad_mean.to(_F64).contiguous()
    stats = torch.stack([v.to(_F64) for v in (log_z, mean_logit, mean_bias, weight_sq)])
    grad_stats = torch.stack(
        [v.to(_F64) for v in (grad_log_z, grad_mean_logit, grad_mean_bias, grad_weight_sq)]
    )
    grad_x = torch.empty_like(q)
    grads = tuple(torch.empty(q.shape[0], dtype=_F64) for _ in range(3))
    grad_bias = torch.empty(0 if b is None else b.shape[0], dtype=_F64)
    _module().backward(
        args, q.dtype == _F64, q.data_ptr(), q.shape[0],
        s.data_ptr(), a.data_ptr(), t.data_ptr(), _ptr(b),
        _KERNELS[kernel], torch.get_num_threads(),
        mean.data_ptr(), stats.data_ptr(), grad_mean.data_ptr(),
        grad_stats.data_ptr(), grad_x.data_ptr(),
        *(v.data_ptr() for v in grads), 0 if b is None else grad_bias.data_ptr(),
    )  # fmt: skip
    del keep
    return grad_x.to(x.dtype), grads[0], grads[1], grads[2], grad_bias


def nearest(
    x: Tensor,
    rows: Tensor,
    k: int,
    center: Tensor | None,
    sq_norms: Tensor | None,
    scale: float,
    shift: float,
) -> tuple[Tensor, Tensor]:
    """The k smallest |x - y_n|^2 by direct differences, ascending, ties to the lower index."""
    q = _queried(x, rows)
    if not 1 <= k <= rows.shape[0]:
        raise ValueError(f"k must lie between 1 and the number of rows, {rows.shape[0]}; got {k}")
    args, keep = _rows(rows, center, sq_norms, scale, shift)
    sq_dist = torch.empty(q.shape[0], k, dtype=_F64)
    index = torch.empty(q.shape[0], k, dtype=torch.int64)
    _module().nearest(
        args,
        q.dtype == _F64,
        q.data_ptr(),
        q.shape[0],
        k,
        torch.get_num_threads(),
        sq_dist.data_ptr(),
        index.data_ptr(),
    )
    del keep
    return sq_dist, index


def _shaped(name: str, t: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
    """`t`, contiguous; ValueError unless it has the shape and one of the dtypes."""
    if tuple(t.shape) != shape or t.dtype not in dtypes:
        kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = str(t.dtype).removeprefix("torch.")
        raise ValueError(f"{name} must be {kinds} {list(shape)}, not {got} {list(t.shape)}")
    return t.contiguous()


def _ladder(coarse: Tensor, dims: list[int], first_band: list[int]) -> tuple[int, Tensor, Tensor]:
    """The number of bands, and the ladder as tensors; ValueError unless it is one."""
    if not 1 <= len(dims) <= _LEVELS or len(first_band) != len(dims):
        raise ValueError(
            f"dims must have 1 to {_LEVELS} levels and first_band as many,"
            f" not {len(dims)} and {len(first_band)}"
        )
    bands = coarse.shape[-1] - dims[0] - 1
    ups = all(a < b for a, b in zip([0, *dims], dims, strict=False))
    in_order = all(a <= b for a, b in zip([0, *first_band], first_band, strict=False))
    if not ups or not in_order or first_band[0] != 0 or first_band[-1] > bands:
        raise ValueError(
            f"dims must increase from 1 and first_band from 0 to at most the {bands} bands of"
            f" coarse; got dims={dims}, first_band={first_band}"
        )
    return bands, torch.tensor(dims, dtype=torch.int64), torch.tensor(first_band, dtype=torch.int64)


def bound_scan(
    x: Tensor, rows: Tensor, sigma: Tensor, alpha: Tensor, temperature: Tensor,
    bias: Tensor | None, center: Tensor, sq_norms: Tensor, scale: float, shift: float,
    coarse: Tensor, fine: Tensor, z: Tensor, norms: Tensor, margin: Tensor, sq: Tensor,
    dims: list[int], first_band: list[int], eps: float, cap: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The rows that can matter to each query; see :mod:`memokern.ops` for what is proven."""
    q, (s, a, t), b = _queries(x, rows, sigma, alpha, temperature, bias)
    args, keep = _rows(rows, center, sq_norms, scale, shift)
    dims, first_band = list(dims), list(first_band)
    bands, ladder, firsts = _ladder(coarse, dims, first_band)
    if not 0 < eps < 1 or not math.isfinite(rows.shape[0] / eps):
        raise ValueError(f"eps must lie between 0 and 1, both excluded; got {eps}")
    if cap < 1 or rows.shape[0] >= 2**32:
        raise ValueError(f"cap must be at least 1 and rows below 2^32, not {cap} and {len(rows)}")
    (n, _), m = rows.shape, x.shape[0]
    held = (
        _shaped("coarse", coarse, (n, dims[0] + bands + 1), torch.float32),
        _shaped("fine", fine, (n, dims[-1] - dims[0]), torch.float16, torch.float32),
        _shaped("z", z, (m, dims[-1]), torch.float32),
        _shaped("norms", norms, (m, bands + 1), torch.float32),
        _shaped("margin", margin, (m,), _F64),
        _shaped("sq", sq, (m,), _F64),
    )
    start = torch.empty(m + 1, dtype=torch.int64)
    threshold, level = torch.empty(m, dtype=_F64), torch.empty(m, dtype=torch.int64)
    found = _module().bound_scan(
        args, q.dtype == _F64, q.data_ptr(), m, s.data_ptr(), a.data_ptr(), t.data_ptr(),
        _ptr(b), held[0].data_ptr(), held[1].data_ptr(), fine.dtype == torch.float16,
        *(v.data_ptr() for v in held[2:]), ladder.data_ptr(), firsts.data_ptr(), len(dims), bands,
        eps, min(cap, n), torch.get_num_threads(),
        start.data_ptr(), threshold.data_ptr(), level.data_ptr(),
    )  # fmt: skip
    index = torch.empty(found.count, dtype=torch.int64)
    found.copy(index.data_ptr())
    del keep
    return start, index, threshold, level


def posterior_on_support(
    x: Tensor, rows: Tensor, sigma: Tensor, alpha: Tensor, temperature: Tensor,
    bias: Tensor | None, start: Tensor, index: Tensor, scale: float, shift: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The sums of ``posterior`` over the rows listed, each logit by direct differences."""
    q, (s, a, t), b = _queries(x, rows, sigma, alpha, temperature, bias)
    args, _ = _rows(rows, None, None, scale, shift)
    start = _shaped("start", start, (x.shape[0] + 1,), torch.int64)
    index = _shaped("index", index, (index.numel(),), torch.int64)
    mean = torch.empty_like(q)
    stats = tuple(torch.empty(q.shape[0], dtype=_F64) for _ in range(4))
    _module().support(
        args, q.dtype == _F64, q.data_ptr(), q.shape[0],
        s.data_ptr(), a.data_ptr(), t.data_ptr(), _ptr(b), start.data_ptr(), index.data_ptr(),
        len(index), torch.get_num_threads(), mean.data_ptr(), *(v.data_ptr() for v in stats),
    )  # fmt: skip
    return mean.to(x.dtype), stats[0], stats[1], stats[2], stats[3]


def posterior_on_support_backward(
    x: Tensor, rows: Tensor, sigma: Tensor, alpha: Tensor, temperature: Tensor,
    bias: Tensor | None, start: Tensor, index: Tensor, mean: Tensor, log_z: Tensor,
    mean_logit: Tensor, mean_bias: Tensor, weight_sq: Tensor, grad_mean: Tensor,
    grad_log_z: Tensor, grad_mean_logit: Tensor, grad_mean_bias: Tensor, grad_weight_sq: Tensor,
    scale: float, shift: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients for x, sigma, alpha, temperature and bias.

    The weights are taken anew in float64: the forward results are not needed, and what their type
    rounded away does not enter.
    """
    q, (s, a, t), b = _queries(x, rows, sigma, alpha, temperature, bias)
    args, _ = _rows(rows, None, None, scale, shift)
    start = _shaped("start", start, (x.shape[0] + 1,), torch.int64)
    index = _shaped("index", index, (index.numel(),), torch.int64)
    grad_mean = grad_mean.to(_F64).contiguous()
    grad_stats = torch.stack(
        [v.to(_F64) for v in (grad_log_z, grad_mean_logit, grad_mean_bias, grad_weight_sq)]
    )
    grad_x = torch.empty_like(q)
    grads = tuple(torch.empty(q.shape[0], dtype=_F64) for _ in range(3))
    grad_bias = torch.empty(0 if b is None else b.shape[0], dtype=_F64)
    _module().support_backward(
        args, q.dtype == _F64, q.data_ptr(), q.shape[0],
        s.data_ptr(), a.data_ptr(), t.data_ptr(), _ptr(b), start.data_ptr(), index.data_ptr(),
        len(index), torch.get_num_threads(), grad_mean.data_ptr(), grad_stats.data_ptr(),
        grad_x.data_ptr(), *(v.data_ptr() for v in grads), 0 if b is None else grad_bias.data_ptr(),
    )  # fmt: skip
    return grad_x.to(x.dtype), grads[0], grads[1], grads[2], grad_bias
