"""What this machine can do, measured in the same run as the cases, and what it is."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from memokern import info


def seconds(run: Callable[[], object], rounds: int = 5) -> float:
    """The median time of a call, after one to warm up."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return median(times)


def sgemm(n: int = 2048) -> float:
    """Operations per second of an n^3 float32 matrix product."""
    a, b, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    return 2 * n**3 / seconds(lambda: torch.mm(a, b, out=out))


def read_bandwidth(nbytes: int = 1 << 28) -> float:
    """Bytes per second of summing a float32 array much larger than the caches."""
    data = torch.ones(nbytes // 4)
    return nbytes / seconds(data.sum)


def _model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe() -> dict[str, object]:
    """What two runs must share for their figures to be compared."""
    facts = info.collect()
    return {
        "cpu": _model(),
        "cores": facts["cpu"]["cores"],
        "threads": facts["threads"],
        "isa": facts["isa"],
        "torch": facts["libraries"]["torch"],
    }
