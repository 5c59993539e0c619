"""What the device can do, measured in a second, and which share of it a time is."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bench import peers
from memokern.backends import protocol
from tools.gpu_check.stand_in import is_gpu

REPEATED = 5


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether PyTorch may multiply float32 by one product of tf32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if is_gpu(device):
        torch.cuda.synchronize(device)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The shortest of a few runs after a first one."""
    call()
    wait(device)
    times = []
    for _ in range(REPEATED):
        start = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _copy(size: int, device: torch.device) -> float:
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def _product(n: int, kind: torch.dtype, device: torch.device) -> float:
    a, b = torch.randn(2, n, n, device=device).to(kind)
    return 2 * n**3 / _seconds(lambda: a @ b, device)


def measured(device: torch.device) -> dict[str, float]:
    """Bytes a second of a copy, counting what is read and what is written; operations a second of
    large matrix products of random 16-bit numbers, and of float32 by tf32 and as they are."""
    size, n = (1 << 31, 8192) if device.type == "cuda" else (1 << 24, 256)
    found = {"memory": _copy(size, device), "half": _product(n, torch.bfloat16, device)}
    for name in ("tf32", "fp32"):
        with tf32(name == "tf32"):
            found[name] = _product(n, torch.float32, device)
    return found


def describe(device: torch.device) -> dict[str, Any]:
    """The device and what runs on it; the rates come with it."""
    facts: dict[str, Any] = {
        "device": "a CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton(),
        "cores": os.cpu_count(),
        "backends": [f"{a.name}: {a.detail}" for a in protocol.here()],
        "left_out": {name: why for name in peers.LIBRARY if (why := peers.missing(name))},
    }
    if is_gpu(device):
        p = torch.cuda.get_device_properties(device)
        facts |= {
            "device": p.name, "multiprocessors": p.multi_processor_count,
            "memory_bytes": p.total_memory, "l2_bytes": p.L2_cache_size,
            "capability": f"{p.major}.{p.minor}",
        }  # fmt: skip
    return {**facts, "rates": measured(device)}


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)


def shares(
    nbytes: float, operations: float, seconds: float, rows: str, rates: dict[str, float]
) -> dict[str, float | None]:
    """Of the rate of a copy, and of a matrix product in the operands that such rows allow; None
    where these are not known."""
    memory, product = rates.get("memory"), rates.get("tf32" if rows == "float32" else "half")
    return {
        "gb_s": nbytes / seconds / 1e9,
        "tflop_s": operations / seconds / 1e12,
        "of_memory": None if memory is None else nbytes / seconds / memory,
        "of_product": None if product is None else operations / seconds / product,
    }
