"""How a test asks a backend for an operation.

A test of an operation is written once and runs over every backend that is installed. A backend is
left out of a case only where it refuses the call, in its own words; which calls each of them
refuses is asserted in full in ``backends/test_refusals.py``, so that no case is lost unseen.

Tensors of the tests lie on the CPU. For Triton they are moved to ``DEVICE``: a GPU where there is
one, else the CPU, where its interpreter runs the kernels. New memory is full of NaN, so that what a
kernel leaves unwritten shows.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from memokern.backends import protocol
from memokern.backends.protocol import Backend, Call
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
)
from memokern.util import env
from tests import isas
from tests.triton_interpreter import DEVICE

CPU = torch.device("cpu")
INSTALLED = [name for name in protocol.NAMES if protocol.get(name).unavailable() is None]
# The compiled kernels by every other instruction set that runs here: "cpu:baseline", and so on.
ISAS = [f"cpu:{isa}" for isa in isas.others()] if "cpu" in INSTALLED else []
COMPILED = [name for name in (*INSTALLED, *ISAS) if name != "reference"]


def device_of(name: str) -> torch.device:
    """Where the backend's tensors lie in the tests."""
    return DEVICE if name == "triton" else CPU


def backend_of(name: str) -> Backend:
    """The backend of a name, of which an instruction set may be a part."""
    return protocol.get(name.partition(":")[0])


# That take tensors on the CPU, so that public functions are tested through them where they lie.
ON_CPU = [name for name in INSTALLED if device_of(name) == CPU]


def moved(value: Any, device: torch.device) -> Any:
    """A call object, or any nest of tuples and lists, with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(v, device) for v in value))
    if isinstance(value, tuple | list):
        return type(value)(moved(v, device) for v in value)
    return value


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New tensors are full of NaN, or of the largest integer. PyTorch's own kernels for a GPU may
    have no deterministic form: there memory is left as it is."""
    if DEVICE.type != "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def refusal(
    name: str, operation: str, x: Tensor, rows: Rows, k: int = 0, own_bias: bool = False
) -> str | None:
    """Why the backend does not take the call, or None."""
    call = Call.of(x, rows.data, k, own_bias=own_bias)._replace(device=device_of(name).type)
    return backend_of(name).refusal(operation, call)


def ask(
    name: str, operation: str, x: Tensor, rows: Rows, k: int = 0, own_bias: bool = False
) -> Backend:
    """The backend; the test is skipped where it refuses the call."""
    reason = refusal(name, operation, x, rows, k, own_bias)
    if reason is not None:
        pytest.skip(f"{name}, {operation}: {reason}")
    return backend_of(name)


def _run(name: str, operation: str, x: Tensor, rows: Rows, *args: Any, k: int = 0) -> Any:
    """The operation with these arguments; its results on the CPU."""
    own_bias = any(isinstance(v, Query) and v.own_bias for v in args)
    backend = ask(name, operation, x, rows, k, own_bias)
    with poisoned(), isas.selected(name.partition(":")[2]):
        return moved(getattr(backend, operation)(*moved(args, device_of(name))), CPU)


def posterior(name: str, query: Query, rows: Rows) -> Sums:
    return _run(name, "posterior", query.x, rows, query, rows)


def posterior_state(name: str, query: Query, rows: Rows) -> State:
    return _run(name, "posterior_state", query.x, rows, query, rows)


def backward(name: str, query: Query, rows: Rows, sums: Sums, grads: BasicSums) -> Gradients:
    return _run(name, "posterior_backward", query.x, rows, query, rows, sums, grads)


def backward_rows(name: str, query: Query, rows: Rows, grads: BasicSums) -> Tensor:
    return _run(name, "posterior_backward_rows", query.x, rows, query, rows, grads)


def double_backward(
    name: str, query: Query, rows: Rows, grads: BasicSums, grad_grads: Gradients
) -> tuple[Gradients, BasicSums]:
    return _run(name, "posterior_double_backward", query.x, rows, query, rows, grads, grad_grads)


def nearest(name: str, x: Tensor, rows: Rows, k: int) -> tuple[Tensor, Tensor]:
    return _run(name, "nearest", x, rows, x, rows, k, k=k)


def bound_scan(name: str, query: Query, rows: Rows, bounds: LogitBounds) -> Scan:
    return _run(name, "bound_scan", query.x, rows, query, rows, bounds)


def listed(name: str, query: Query, rows: Rows, lists: RowLists) -> Sums:
    return _run(name, "posterior_listed", query.x, rows, query, rows, lists)


def listed_backward(
    name: str, query: Query, rows: Rows, lists: RowLists, sums: Sums, grads: BasicSums
) -> Gradients:
    args = (query, rows, lists, sums, grads)
    return _run(name, "posterior_listed_backward", query.x, rows, *args)


def listed_double_backward(
    name: str, query: Query, rows: Rows, lists: RowLists, grads: BasicSums, grad_grads: Gradients
) -> tuple[Gradients, BasicSums]:
    args = (query, rows, lists, grads, grad_grads)
    return _run(name, "posterior_listed_double_backward", query.x, rows, *args)


# --- which backends a test runs over ------------------------------------------------------------

every_backend = pytest.mark.parametrize("backend", [*INSTALLED, *ISAS])
plain_backends = pytest.mark.parametrize("backend", INSTALLED)  # of the CPU's, the one in use
compiled_backends = pytest.mark.parametrize("backend", COMPILED)


def over(table: Any, *arguments: str, backends: Sequence[str] = ()) -> Any:
    """Parametrises a test by (backend, *arguments): `table(backend)` gives the arguments' values,
    as a list or as a dict whose keys name the cases. One case follows the other, each over every
    backend that has it, so that what is known of a case may be kept from one to the next."""
    found: dict[str, list[Any]] = {}
    for name in backends or (*INSTALLED, *ISAS):
        cases = table(name)
        pairs = cases.items() if isinstance(cases, dict) else ((_label(c), c) for c in cases)
        for label, values in pairs:
            row = values if len(arguments) > 1 else (values,)
            found.setdefault(label, []).append(pytest.param(name, *row, id=f"{label}-{name}"))
    return pytest.mark.parametrize(
        ("backend", *arguments), list(itertools.chain.from_iterable(found.values()))
    )


def _label(values: Any) -> str:
    parts = values if isinstance(values, tuple) else (values,)
    return "-".join(str(v).removeprefix("torch.") for v in parts)


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """MEMOKERN_BACKEND names it: what it refuses is an error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(env.BACKEND, name)
        yield


@contextlib.contextmanager
def preferred(name: str) -> Iterator[None]:
    """It is asked first and the reference takes what it refuses, as a device's own backend does
    where MEMOKERN_BACKEND is not set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(env.BACKEND, raising=False)
        names = tuple(dict.fromkeys((name, "reference")))
        patch.setattr(protocol, "PREFERENCE", {device_of(name).type: names})
        _forget_choices()
        yield
    _forget_choices()


def _forget_choices() -> None:
    protocol._candidates.cache_clear()
    protocol._preferred.cache_clear()


def sized(*values: Any, triton: Sequence[Any]) -> Any:
    """A table of the same kind of cases: these, and smaller ones where kernels are interpreted."""
    return lambda name: list(triton) if name == "triton" else list(values)
