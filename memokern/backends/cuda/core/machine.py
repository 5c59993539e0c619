"""What the planner and the launchers know of a device."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

# By compute capability: the target of the compiler, and the bytes of shared memory that a block may
# use. Both have clusters. On others every call is refused.
KNOWN = {(9, 0): ("sm_90a", 227 << 10), (10, 0): ("sm_100a", 227 << 10)}


class Machine(NamedTuple):
    """arch: what kernels are compiled for. multiprocessors: how many there are. shared: bytes that
    a block may use. l2_bytes: the size of the L2 cache."""

    arch: str
    multiprocessors: int
    shared: int
    l2_bytes: int


@functools.cache
def of(device: torch.device) -> Machine:
    """The device's figures; RuntimeError for one that there are no kernels for."""
    reason = unknown(device)
    if reason is not None:
        raise RuntimeError(reason)
    found = torch.cuda.get_device_properties(device)
    arch, shared = KNOWN[(found.major, found.minor)]
    return Machine(arch, found.multi_processor_count, shared, found.L2_cache_size)


@functools.cache
def unknown(device: torch.device) -> str | None:
    """Why there are no kernels for this device, in one line, or None."""
    capability = torch.cuda.get_device_capability(device)
    if capability in KNOWN:
        return None
    known = ", ".join(arch for arch, _ in KNOWN.values())
    name, (major, minor) = torch.cuda.get_device_name(device), capability
    return f"it has kernels for {known}, not for sm_{major}{minor} ({name})"
