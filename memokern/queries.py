"""What the public functions are asked, checked: queries, numbers per query, rows, biases."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled as profiled
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from memokern.data import TrainingSet
from memokern.ops import KERNELS
from memokern.rows import UINT8_SCALE, UINT8_SHIFT, check_rows

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

    @property
    def how(self) -> tuple[Tensor | None, Tensor | None, float, float]:
        """What an operation takes after the bias."""
        return self.center, self.sq_norms, self.scale, self.shift


def as_rows(data: TrainingSet | Tensor) -> Rows:
    """A training set, or a tensor [N, *shape] checked."""
    if isinstance(data, TrainingSet):
        return Rows(
            data.rows, data.shape, data.scale, data.shift, data.center64, data.sq_norms,
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
    if isinstance(value, Tensor):
        tensor = value.to(device, torch.float64)
    else:  # filled in there: a copy from the host would wait for the device
        tensor = torch.full((), value, dtype=torch.float64, device=device)
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


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is captured, which can wait for no value."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def traced(*tensors: Tensor | None) -> bool:
    """Whether these have no values to look at: under a compiler, a transform, while a CUDA graph is
    captured, or on meta."""
    if is_compiling():
        return True
    functorch = torch._C._functorch
    return any(
        t is not None
        and (
            t.is_meta
            or capturing(t)
            or functorch.is_functorch_wrapped_tensor(t)
            or isinstance(t, torch._subclasses.FakeTensor)
        )
        for t in tensors
    )


def under_transform(*tensors: Tensor | None) -> bool:
    """Whether a derivative transform that a registered operation would lose is at work here."""
    if is_compiling():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or []
    if any(level.key() != torch._C._functorch.TransformType.Vmap for level in stack):
        return True
    return forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def _keys(*names: str) -> int:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    for name in names:
        keys = keys.add(getattr(torch._C.DispatchKey, name))
    return int(keys.raw_repr())


# The dispatch keys of a dense CPU tensor of its own values (not negated on reading, not a subclass,
# not a functorch wrapper), and those that a thread without modes adds; the second ones are under
# torch.inference_mode. A PyTorch that has others goes through the dispatcher.
_PLAIN = (
    _keys("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU"),
    _keys("CPU", "AutocastCPU"),
)
_IDLE = (_keys("BackendSelect", "ADInplaceOrView"), _keys("BackendSelect"))
_keys_of = torch._C._dispatch_keys
_keys_of_thread = torch._C._dispatch_tls_local_include_set
_function_modes = torch._C._len_torch_function_stack


def is_plain(tensor: Tensor) -> bool:
    """Whether it is a dense tensor in the memory of the CPU and nothing more."""
    return type(tensor) is Tensor and _keys_of(tensor).raw_repr() in _PLAIN


def undispatched(*tensors: Tensor | None) -> bool:
    """Whether an operation on these may be called below the dispatcher, which would only find the
    backend and costs as much as a small sweep: plain CPU tensors, no gradient to record, no
    transform, no mode, nothing that traces or times."""
    if (
        is_compiling()
        or _keys_of_thread().raw_repr() not in _IDLE
        or _function_modes()
        or forward_ad._current_level >= 0
        or profiled()
    ):
        return False
    record = torch.is_grad_enabled()
    for t in tensors:
        if t is None:
            continue
        if type(t) is not Tensor or _keys_of(t).raw_repr() not in _PLAIN:  # is_plain, inlined
            return False
        if record and t.requires_grad:
            return False
    return True


def _bias(bias: Tensor | None, rows: Rows) -> Tensor | None:
    """The bias with the rows' log weights."""
    if bias is None:
        return rows.log_weights  # a TrainingSet has checked them
    n, device = rows.rows.shape[0], rows.rows.device
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
        bias = bias + rows.log_weights
        if not traced(bias) and bool(torch.isneginf(bias).all()):
            raise ValueError("bias and log_weights together leave no row: all sums are -inf")
    return bias


def log_total(bias: Tensor | None, rows: Rows) -> Tensor:
    """log sum exp of the bias []; log N without one."""
    if bias is not None:
        return torch.logsumexp(bias, 0)
    n, device = rows.rows.shape[0], rows.rows.device
    return torch.full((), math.log(n), dtype=torch.float64, device=device)


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
    if not (tensor.numel() == 1 and is_plain(tensor) and good(tensor.item())):
        require(name, value, tensor, good(tensor), what)
    return tensor


def checked(
    x: Tensor,
    data: TrainingSet | Tensor,
    sigma: PerQuery,
    alpha: PerQuery,
    temperature: PerQuery,
    bias: Tensor | None,
    kernel: str,
) -> tuple[Rows, torch.Size, tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """A call's arguments, checked: rows, [*batch], sigma, alpha and temperature [*batch], and the
    bias with the rows' log weights."""
    rows = as_rows(data)
    batch = batch_shape(x, rows)
    if kernel not in KERNELS:
        raise ValueError(f"expected kernel one of {', '.join(KERNELS)}, got {kernel!r}")
    numbers = (
        _number("sigma", sigma, batch, x.device),
        _number("alpha", alpha, batch, x.device),
        _number("temperature", temperature, batch, x.device),
    )
    return rows, batch, numbers, _bias(bias, rows)
