"""What this machine can do, measured in the same rounds as the cases, and what it is."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable
from pathlib import Path

import torch

import memokern
from memokern.apps import info

SGEMM = 2048
READ_BYTES = 1 << 28  # much larger than the caches


def limits() -> dict[str, Callable[[], object]]:
    """A 2048^3 float32 matrix product ("sgemm"), and the sum of 256 MB of float32 ("read")."""
    a, b, out = torch.randn(3, SGEMM, SGEMM)
    data = torch.ones(READ_BYTES // 4)
    return {"sgemm": lambda: torch.mm(a, b, out=out), "read": data.sum}


def rates(seconds: dict[str, float]) -> dict[str, float]:
    """Operations per second and bytes per second from the times of `limits()`."""
    return {"sgemm": 2 * SGEMM**3 / seconds["sgemm"], "read": READ_BYTES / seconds["read"]}


def _model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def code() -> str:
    """A digest of memokern itself: figures of two versions do not belong in one table."""
    root = Path(memokern.__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*root.rglob("*.py"), *root.glob("_C*.so")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


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
