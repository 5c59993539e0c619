"""What stands in for PyTorch's CUDA in a rehearsal, so that the lines that only a GPU takes are run
too. Tensors stay on the CPU."""

from __future__ import annotations

import contextlib
import time
import types
from collections.abc import Iterator
from typing import Any

import torch

from memokern.strategies import costs

_installed = False


COSTS = costs.Costs(row=1e-12, query=1e-11, listed=1e-9, call=1e-9)


def is_gpu(device: torch.device) -> bool:
    """Whether PyTorch's CUDA is to be asked about the device; in a rehearsal this stands in."""
    return device.type == "cuda" or _installed


class Event:
    """A moment of the wall's clock."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing, "an event that is not timed says nothing"
        self.at = 0.0

    def record(self) -> None:
        """Now."""
        self.at = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        """Milliseconds."""
        return 1000 * (other.at - self.at)


class Graph:
    """A graph whose one result is there already."""

    def replay(self) -> None:
        """There is nothing to do."""


@contextlib.contextmanager
def _within(_: Any = None) -> Iterator[None]:
    yield


def _properties(_: Any = None) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        name="stand-in for an H200", multi_processor_count=132, total_memory=1 << 36,
        L2_cache_size=50 << 20, major=9, minor=0,
    )  # fmt: skip


def _nothing(*_: Any) -> int:
    return 0


def install() -> None:
    """Replace what :mod:`tools.gpu_check` asks of PyTorch's CUDA, in this process."""
    global _installed
    _installed = True
    replaced = {
        "Event": Event,
        "CUDAGraph": Graph,
        "Stream": object,
        "stream": _within,
        "graph": _within,
        "synchronize": _nothing,
        "empty_cache": _nothing,
        "memory_allocated": _nothing,
        "max_memory_allocated": _nothing,
        "reset_peak_memory_stats": _nothing,
        "get_device_properties": _properties,
        "get_device_name": lambda _=None: _properties().name,
    }
    for name, value in replaced.items():
        assert hasattr(torch.cuda, name), name
        setattr(torch.cuda, name, value)
    costs.costs_of = lambda x, rows: COSTS  # to measure them takes minutes where Triton interprets
