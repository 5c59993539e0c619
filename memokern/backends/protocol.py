"""What a backend is, and who runs a call.

A :class:`Backend` has the operations of :data:`OPERATIONS` as methods. ``refuses(operation, call)``
says in one line why it does not take a call, or None; the same answer chooses and explains. No
backend passes a call on to another: :func:`choose` is the only place where that is decided.
"""

from __future__ import annotations

import functools
import importlib
from typing import NamedTuple

import torch
from torch import Tensor

from memokern.calls import (
    BasicSums,
    Gradients,
    LogitBounds,
    Query,
    RowLists,
    Rows,
    Scan,
    State,
    Sums,
    to_sums,
)
from memokern.util import env
from memokern.util.torch_internals import capturing

OPERATIONS = (
    "posterior_state",
    "posterior",
    "posterior_backward",
    "posterior_backward_rows",
    "posterior_double_backward",
    "nearest",
    "bound_scan",
    "posterior_listed",
    "posterior_listed_backward",
    "posterior_listed_double_backward",
)
# From the fastest to the one that takes every call. PyTorch calls AMD's devices cuda as well.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
EVERYWHERE = ("reference",)
NAMES = ("cpu", "cuda", "triton", "reference")


class Call(NamedTuple):
    """What a backend looks at before it takes a call.

    device: the type of the tensors' device. x, rows: their types. b, n, dim: how many queries, rows
    and features. k: how many neighbours, 0 for other operations. transform: whether a derivative
    transform of PyTorch (torch.func, forward mode) is at work, which a compiled kernel would lose.
    own_bias: whether each query has a bias of its own (:attr:`.Query.own_bias`).
    device_index: which device of that type, None for the current one.
    """

    device: str
    x: torch.dtype
    rows: torch.dtype
    b: int
    n: int
    dim: int
    k: int = 0
    transform: bool = False
    own_bias: bool = False
    device_index: int | None = None

    @classmethod
    def of(
        cls,
        x: Tensor,
        rows: Tensor,
        k: int = 0,
        *,
        transform: bool = False,
        own_bias: bool = False,
    ) -> Call:
        """The call with these queries [B, D] and rows [N, D]."""
        (n, dim), device = rows.shape, x.device
        return cls(
            device.type, x.dtype, rows.dtype, x.shape[0], n, dim, k, transform, own_bias,
            device.index,
        )  # fmt: skip


def captured(operation: str, call: Call) -> str | None:
    """Why the call cannot be captured in a CUDA graph, if one is being captured; CUDA's own error
    would say less."""
    if operation == "bound_scan" and call.device == "cuda" and _captures():
        return (
            "it waits for the device to count rows, which cannot be captured in a CUDA graph:"
            " sweep densely there (method='dense')"
        )
    return None


def _captures() -> bool:
    return torch.cuda.is_available() and capturing(torch.device("cuda"))


class Backend:
    """Who computes. Every method takes and returns the objects of :mod:`memokern.calls`; what each
    operation computes is said in :mod:`memokern.ops`."""

    name = ""

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine, in one line, or None."""
        return None

    def detail(self) -> str:
        """What it is on this machine, in one line; only where it is available."""
        raise NotImplementedError

    def refuses(self, operation: str, call: Call) -> str | None:
        """Why it does not take this call, in one line, or None; only where it is available."""
        raise NotImplementedError

    def refusal(self, operation: str, call: Call) -> str | None:
        """Why it cannot run this call here, in one line, or None."""
        return self.unavailable() or self.refuses(operation, call)

    def posterior_state(self, query: Query, rows: Rows) -> State:
        """The dense sweep, not normalised."""
        raise NotImplementedError

    def posterior(self, query: Query, rows: Rows) -> Sums:
        """The dense sweep. A backend that normalises in its last kernel has its own."""
        return to_sums(self.posterior_state(query, rows), query)

    def posterior_backward(
        self, query: Query, rows: Rows, sums: BasicSums, grads: BasicSums
    ) -> Gradients:
        """The gradients for the query, given those for the sums."""
        raise NotImplementedError

    def posterior_backward_rows(self, query: Query, rows: Rows, grads: BasicSums) -> Tensor:
        """The gradient for floating-point rows [N, D], in their type."""
        raise NotImplementedError

    def posterior_double_backward(
        self, query: Query, rows: Rows, grads: BasicSums, grad_grads: Gradients
    ) -> tuple[Gradients, BasicSums]:
        """The gradients of <grad_grads, posterior_backward> for the query and for grads."""
        raise NotImplementedError

    def nearest(self, x: Tensor, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
        """Squared distances [B, k] float64, ascending, and the rows [B, k] int64."""
        raise NotImplementedError

    def bound_scan(self, query: Query, rows: Rows, bounds: LogitBounds) -> Scan:
        """Which rows can matter."""
        raise NotImplementedError

    def posterior_listed(self, query: Query, rows: Rows, lists: RowLists) -> Sums:
        """The sweep over a list of rows for each query."""
        raise NotImplementedError

    def posterior_listed_backward(
        self, query: Query, rows: Rows, lists: RowLists, sums: BasicSums, grads: BasicSums
    ) -> Gradients:
        """The gradients for the query, given those for the sums."""
        raise NotImplementedError

    def posterior_listed_double_backward(
        self, query: Query, rows: Rows, lists: RowLists, grads: BasicSums, grad_grads: Gradients
    ) -> tuple[Gradients, BasicSums]:
        """The gradients of <grad_grads, posterior_listed_backward> for the query and for grads."""
        raise NotImplementedError


class Answer(NamedTuple):
    """One backend's answer: whether it runs here or takes the call, and what it is or why not."""

    name: str
    runs: bool
    detail: str


@functools.cache
def get(name: str) -> Backend:
    """The backend ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``."""
    if name not in NAMES:
        raise ValueError(f"expected a backend of {', '.join(NAMES)}, got {name!r}")
    found: Backend = importlib.import_module(f"memokern.backends.{name}").BACKEND
    return found


@functools.cache
def _candidates(device: str, _raw: object) -> tuple[Backend, ...]:
    """Who is asked, in this order, for tensors on a device: for one value of the environment
    variable, which is read again only where it is another."""
    named = env.backend()
    names = PREFERENCE.get(device, EVERYWHERE) if named == "auto" else (named,)
    return tuple(get(name) for name in names)


@functools.cache
def _preferred(device: str, raw: object) -> Backend | None:
    return next((b for b in _candidates(device, raw) if b.unavailable() is None), None)


def preferred(device: str) -> Backend | None:
    """Who is asked first for tensors on a device, whatever the call."""
    return _preferred(device, env.raw_backend())


def require(device: str) -> None:
    """Raises RuntimeError where MEMOKERN_BACKEND names a backend that cannot run here, or that does
    not run tensors on this device, for a plain call in float32."""
    choose("posterior", Call(device, torch.float32, torch.float32, 1, 1, 1))


def choose(operation: str, call: Call) -> Backend:
    """The backend that runs the call: the first on its device's list that does not refuse it.

    Raises RuntimeError with the reasons if none takes it, as where MEMOKERN_BACKEND names one that
    refuses it.
    """
    for backend in _candidates(call.device, env.raw_backend()):
        if backend.refusal(operation, call) is None:
            return backend
    asked = _candidates(call.device, env.raw_backend())
    reasons = "; ".join(f"{b.name} does not: {b.refusal(operation, call)}" for b in asked)
    named = env.backend()
    hint = "" if named == "auto" else f". {env.BACKEND}={named} asks for it: unset it for another"
    raise RuntimeError(f"no backend runs this {operation}: {reasons}{hint}")


def explain(operation: str, call: Call) -> list[Answer]:
    """Every backend, the preferred ones first, with what it is, or why it does not run the call."""
    order = [b.name for b in _candidates(call.device, env.raw_backend())]
    answers = []
    for name in [*order, *(name for name in NAMES if name not in order)]:
        backend = get(name)
        reason = backend.refusal(operation, call)
        answers.append(Answer(name, reason is None, reason or backend.detail()))
    return answers


def here() -> list[Answer]:
    """Every backend, with what it is on this machine, or why it cannot run here.

    >>> [answer.name for answer in here()]
    ['cpu', 'cuda', 'triton', 'reference']
    """
    answers = []
    for name in NAMES:
        backend = get(name)
        reason = backend.unavailable()
        answers.append(Answer(name, reason is None, reason or backend.detail()))
    return answers
