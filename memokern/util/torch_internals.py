"""Every private name of PyTorch that memokern leans on, so that a new PyTorch is checked here.

``memokern/ops`` has the only other one: dispatch below autograd.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled as profiled
from torch.autograd import forward_ad
from torch.compiler import is_compiling


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is captured there, which can wait for no value."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


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
            or (t.is_cuda and capturing(t.device))
            or functorch.is_functorch_wrapped_tensor(t)
            or isinstance(t, torch._subclasses.FakeTensor)
        )
        for t in tensors
    )


def has_tangent(tensor: Tensor) -> bool:
    """Whether forward-mode differentiation goes through this tensor."""
    return forward_ad.unpack_dual(tensor).tangent is not None


def primal(tensor: Tensor) -> Tensor:
    """The tensor without its tangent of forward mode."""
    return forward_ad.unpack_dual(tensor).primal


def under_transform(*tensors: Tensor | None) -> bool:
    """Whether a derivative transform that a registered operation would lose is at work here."""
    if is_compiling():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or []
    if any(level.key() != torch._C._functorch.TransformType.Vmap for level in stack):
        return True
    return forward_ad._current_level >= 0 and any(t is not None and has_tangent(t) for t in tensors)


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Autograd on, also inside an operation that the dispatcher called below autograd."""
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(key, False), torch.enable_grad():
        yield


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
_is_recording = torch.is_grad_enabled


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
    record = _is_recording()
    for t in tensors:
        if t is None:
            continue
        if type(t) is not Tensor or _keys_of(t).raw_repr() not in _PLAIN:  # is_plain, inlined
            return False
        if record and t.requires_grad:
            return False
    return True


_version_of = torch.Tensor._version.__get__  # type: ignore[attr-defined]


def version(tensor: Tensor) -> int | None:
    """How often the memory of this tensor was written to in place, as far as PyTorch did it; None
    where nobody counts."""
    if is_compiling() or tensor.is_inference():
        return None
    count: int = _version_of(tensor)
    return count
