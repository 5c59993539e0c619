"""The Triton kernels: NVIDIA's and AMD's GPUs, and, for tests, Triton's interpreter on the CPU.

The signatures are those of :mod:`memokern.ops.dense`. Nothing of Triton is imported before the first
call, and nothing compiled before the first launch of each kernel. No call reads a number back from
the device: it can be captured in a CUDA graph, after a first call outside of one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from memokern.backends.cpu.native import queries_of
from memokern.backends.reference import dense as reference
from memokern.backends.triton.core.inputs import center_of, check_queries, numbers
from memokern.util import env

_F64 = torch.float64


@functools.cache
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels; Triton itself decides when it is imported."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def unavailable() -> str | None:
    """None where the kernels can run, else the reason in one line."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'memokern[triton]' on Linux"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if torch.cuda.is_available() or interpreted():
        return None
    return "PyTorch sees no GPU"


def refuses(device_type: str) -> str | None:
    """None for tensors on a GPU, or on the CPU where the kernels are interpreted."""
    if device_type == ("cpu" if interpreted() else "cuda"):
        return None
    where = "CPU, by Triton's interpreter" if interpreted() else "GPU"
    return f"it runs tensors on the {where}, and these are on {device_type}"


def detail() -> str:
    """One line for ``memokern info``."""
    import triton

    where = "interpreted on the CPU" if interpreted() else torch.cuda.get_device_name()
    rest = "float64, and more than 64 neighbours, go to the reference"
    return f"Triton {triton.__version__}, {where}; {rest}"


# --- the posterior -------------------------------------------------------------------------------


def _is_double(x: Tensor, rows: Tensor) -> bool:
    """Whether a call is computed in float64, for which there is no kernel."""
    return _F64 in (x.dtype, rows.dtype)


@functools.cache
def machine(device: torch.device) -> Any:
    """What the planner knows of the device."""
    from memokern.backends.triton.posterior.planner import Machine

    if device.type != "cuda":
        return Machine(multiprocessors=2, l2_bytes=1 << 20)
    found = torch.cuda.get_device_properties(device)
    return Machine(found.multi_processor_count, found.L2_cache_size)


def _precision(asked: str) -> str:
    """AMD's matrix cores multiply float32; there is nothing to choose."""
    if asked not in ("auto", *env.PRECISIONS):
        raise ValueError(f"precision must be auto, {' or '.join(env.PRECISIONS)}, not {asked!r}")
    if torch.version.hip is not None:
        return "ieee"
    return env.precision() if asked == "auto" else asked


def _prepared(
    x: Tensor, rows: Tensor, columns: tuple[Tensor, Tensor, Tensor], bias: Tensor | None,
    center: Tensor | None, sq_norms: Tensor | None, scale: float, shift: float, kernel: str,
    precision: str,
) -> tuple[Any, Any]:  # fmt: skip
    """The queries and the rows as the kernels take them; what their owner has not is computed."""
    from memokern.backends.triton.core.rows import Rows
    from memokern.backends.triton.posterior.queries import Queries

    check_queries(x.shape[0])
    q, numbers_of_each, b = queries_of(x, rows, *columns, bias)
    center, sq_norms = center_of(rows, center, sq_norms, scale, shift)
    units = numbers(scale, shift, x.device)
    queries = Queries(q, rows, numbers_of_each, center, units, kernel, _precision(precision))
    return queries, Rows(rows, sq_norms, b)


def posterior(
    x: Tensor, rows: Tensor, sigma: Tensor, alpha: Tensor, temperature: Tensor,
    bias: Tensor | None, center: Tensor | None, sq_norms: Tensor | None, scale: float, shift: float,
    kernel: str, precision: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The dense sweep; see :mod:`memokern.ops.dense` for the formulas."""
    data = (center, sq_norms, scale, shift, kernel)
    if _is_double(x, rows):
        return reference.posterior(x, rows, sigma, alpha, temperature, bias, *data)
    out = _swept(*_prepared(x, rows, (sigma, alpha, temperature), bias, *data, precision), kernel)
    return out[0].to(x.dtype), out[1], out[2], out[3], out[4]


def _swept(queries: Any, stored: Any, kernel: str) -> list[Tensor]:
    """The mean [B, D] float32, and log_z, mean_logit, mean_bias, weight_sq [B] float64."""
    from memokern.backends.triton.posterior import sweep

    (b, _), device = queries.x.shape, queries.x.device
    out = [torch.empty(queries.x.shape, dtype=torch.float32, device=device)]
    out += [torch.empty(b, dtype=_F64, device=device) for _ in range(4)]
    if b:
        sweep.posterior(queries, stored, machine(device), kernel, queries.precision, out)
    return out


def posterior_backward(
    x: Tensor, rows: Tensor, sigma: Tensor, alpha: Tensor, temperature: Tensor,
    bias: Tensor | None, center: Tensor | None, sq_norms: Tensor | None, mean: Tensor,
    log_z: Tensor, mean_logit: Tensor, mean_bias: Tensor, weight_sq: Tensor, grad_mean: Tensor,
    grad_log_z: Tensor, grad_mean_logit: Tensor, grad_mean_bias: Tensor, grad_weight_sq: Tensor,
    scale: float, shift: float, kernel: str, precision: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients for x, sigma, alpha, temperature and bias; see :mod:`memokern.ops.dense`."""
    data = (center, sq_norms, scale, shift, kernel)
    saved = (log_z, mean_logit, mean_bias, weight_sq)
    coming = (grad_log_z, grad_mean_logit, grad_mean_bias, grad_weight_sq)
    if _is_double(x, rows):
        return reference.posterior_backward(
            x, rows, sigma, alpha, temperature, bias, center, sq_norms, mean, *saved, grad_mean,
            *coming, scale, shift, kernel,
        )  # fmt: skip
    from memokern.backends.triton.gradient import gradient

    queries, stored = _prepared(x, rows, (sigma, alpha, temperature), bias, *data, precision)
    b, device = x.shape[0], x.device
    grad_bias = torch.zeros(0 if bias is None else rows.shape[0], dtype=_F64, device=device)
    out = [torch.empty(b, dtype=_F64, device=device) for _ in range(3)]
    grad_x = torch.empty(x.shape, dtype=torch.float32, device=device)
    if b:
        gradient.posterior_backward(
            queries, stored, mean.to(torch.float32).contiguous(),
            torch.stack([v.to(_F64) for v in saved]), grad_mean.to(torch.float32).contiguous(),
            torch.stack([v.to(_F64) for v in coming]), machine(device), kernel, queries.precision,
            [grad_x, *out, grad_bias],
        )  # fmt: skip
    return grad_x, out[0], out[1], out[2], grad_bias


def posterior_backward_rows(
    x: Tensor, rows: Tensor, sigma: Tensor, alpha: Tensor, temperature: Tensor,
    bias: Tensor | None, center: Tensor | None, grads: list[Tensor], scale: float, shift: float,
    kernel: str, precision: str = "auto",
) -> Tensor:  # fmt: skip
    """The gradient for floating-point rows [N, D]; see :mod:`memokern.ops.dense`."""
    columns = (sigma, alpha, temperature)
    if _is_double(x, rows):
        return reference.posterior_backward_rows(
            x, rows, *columns, bias, center, grads, scale, shift, kernel
        )
    from memokern.backends.triton.gradient import gradient

    if x.shape[0] == 0:
        return torch.zeros(rows.shape, dtype=rows.dtype, device=rows.device)
    # The center alone saves nothing: the norms about it are not given.
    queries, stored = _prepared(x, rows, columns, bias, None, None, scale, shift, kernel, precision)
    mean, *stats = _swept(queries, stored, kernel)
    out = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    gradient.posterior_backward_rows(
        queries, stored, mean, torch.stack(stats), grads[0].to(torch.float32).contiguous(),
        torch.stack([v.to(_F64) for v in grads[1:]]), machine(x.device), kernel, queries.precision,
        scale, shift, out,
    )  # fmt: skip
    return out


# --- rows selected: listed/launch.py, scan/launch.py ------------------------------------------------


def _from(module: str, name: str) -> Callable[..., Any]:
    """An operation whose launcher imports Triton, which must wait for the first call."""

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(f"memokern.backends.triton.{module}"), name)(*args)

    return run


nearest = _from("listed.launch", "nearest")
posterior_on_support = _from("listed.launch", "posterior_on_support")
posterior_on_support_backward = _from("listed.launch", "posterior_on_support_backward")
bound_scan = _from("scan.launch", "bound_scan")
