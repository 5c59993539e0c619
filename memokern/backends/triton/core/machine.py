"""What the planner and the launchers know of a device."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Machine(NamedTuple):
    """How many multiprocessors a device has, and the size of its L2 cache."""

    multiprocessors: int
    l2_bytes: int


@functools.cache
def of(device: torch.device) -> Machine:
    """The device's figures; small ones where kernels are interpreted, so that the tests' small
    problems are divided too."""
    if device.type != "cuda":
        return Machine(multiprocessors=2, l2_bytes=1 << 20)
    found = torch.cuda.get_device_properties(device)
    return Machine(found.multi_processor_count, found.L2_cache_size)
