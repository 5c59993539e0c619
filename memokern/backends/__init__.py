"""Who runs the primitive operations, and why the others don't.

Each backend is a module with the operations of :mod:`memokern.ops` under the same names and
signatures, and ``unavailable() -> str | None``: ``None`` where it can run here, else the reason in
one line. The same predicate chooses and explains.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import NamedTuple

import torch

from memokern import env

# From the fastest to the one that always works.
_LADDER = ("cpu", "reference")


class Explanation(NamedTuple):
    """One backend: whether it can run on this machine, and why (or why not)."""

    name: str
    available: bool
    detail: str


@functools.cache
def get(name: str) -> ModuleType:
    """The backend's module: ``"cpu"`` or ``"reference"``."""
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
        cpu = get("cpu")
        if device_type == "cpu" and cpu.unavailable() is None and hasattr(cpu, operation):
            return cpu
        return get("reference")
    backend = get(asked)
    reason = backend.unavailable()
    if reason is None and asked == "cpu" and device_type != "cpu":
        reason = f"it runs tensors on the CPU, and these are on {device_type}"
    if reason is None and not hasattr(backend, operation):
        reason = f"it has no {operation}"
    if reason is not None:
        raise RuntimeError(f"{env.BACKEND}={asked} cannot run: {reason}")
    return backend


def explain() -> list[Explanation]:
    """Every backend, in the order of preference, with what it is or why it cannot run.

    >>> [row.name for row in explain()]
    ['cpu', 'reference']
    """
    rows = []
    for name in _LADDER:
        backend = get(name)
        reason = backend.unavailable()
        rows.append(Explanation(name, reason is None, reason or backend.detail()))
    return rows
