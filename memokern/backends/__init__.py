"""Who runs the primitive operations, and why the others don't.

Each backend is a module with the operations of :mod:`memokern.ops` under the same names and
signatures, ``unavailable() -> str | None``: ``None`` where it can run here, else the reason in one
line, and ``refuses(device_type) -> str | None``, the same for tensors of a device. The same
predicates choose and explain.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import NamedTuple

import torch

from memokern import env

# From the fastest to the one that always works.
_LADDER = ("cpu", "triton", "reference")
# Who has kernels for the tensors of a device; PyTorch calls AMD's devices cuda as well.
_KERNELS = {"cpu": "cpu", "cuda": "triton"}


class Explanation(NamedTuple):
    """One backend: whether it can run on this machine, and why (or why not)."""

    name: str
    available: bool
    detail: str


@functools.cache
def get(name: str) -> ModuleType:
    """The backend's module: ``"cpu"``, ``"triton"`` or ``"reference"``."""
    if name not in _LADDER:
        raise ValueError(f"backend must be one of {', '.join(_LADDER)}, not {name!r}")
    return importlib.import_module(f"memokern.backends.{name}")


def choose(device: torch.device, operation: str = "posterior") -> ModuleType:
    """The backend that runs `operation` on `device`; RuntimeError if the one asked for cannot."""
    return choose_for(device.type, operation)


def choose_for(device_type: str, operation: str = "posterior") -> ModuleType:
    """:func:`choose` by the device's type."""
    return _choose(device_type, env.raw_backend(), operation)


@functools.cache
def _choose(device_type: str, _raw: object, operation: str) -> ModuleType:
    """For one value of the environment variable, read again only where it is another."""
    asked = env.backend()
    if asked == "auto":
        kernels = _KERNELS.get(device_type)
        if kernels is not None and _refusal(kernels, device_type, operation) is None:
            return get(kernels)
        return get("reference")
    reason = _refusal(asked, device_type, operation)
    if reason is not None:
        raise RuntimeError(f"{env.BACKEND}={asked} cannot run: {reason}")
    return get(asked)


def _refusal(name: str, device_type: str, operation: str) -> str | None:
    """Why the backend cannot run the operation on tensors of the device; None if it can."""
    backend = get(name)
    reason = backend.unavailable() or backend.refuses(device_type)
    if reason is None and not hasattr(backend, operation):
        reason = f"it has no {operation}"
    return reason


def explain() -> list[Explanation]:
    """Every backend, in the order of preference, with what it is or why it cannot run.

    >>> [row.name for row in explain()]
    ['cpu', 'triton', 'reference']
    """
    rows = []
    for name in _LADDER:
        backend = get(name)
        reason = backend.unavailable()
        rows.append(Explanation(name, reason is None, reason or backend.detail()))
    return rows
