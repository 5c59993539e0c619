"""What this installation is made of and what it will use: what `memokern info` prints, and what a
bug report needs.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from typing import Any

import torch

import memokern
from memokern.backends import protocol as backends

# name of the distribution, and what memokern does with it
_LIBRARIES = {
    "torch": "tensors, autograd",
    "numpy": "arrays",
    "scipy": "adaptive solver, Voronoi diagrams",
    "safetensors": "data files",
    "matplotlib": "pictures (optional)",
    "triton": "GPU kernels (optional)",
}


def version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def instruction_set() -> str | None:
    """The instruction set that the compiled CPU kernels chose ("baseline", "avx2", "avx512"), or
    None without them.
    """
    cpu: Any = backends.get("cpu")
    return cpu.isa() if cpu.unavailable() is None else None


def collect() -> dict[str, Any]:
    """Versions, machine, threads, instruction set, backends with their reasons, and the environment
    variables that are set.

    Example:
        >>> from memokern import info
        >>> facts = info.collect()
        >>> sorted(facts)[:4]
        ['backends', 'cpu', 'environment', 'isa']
        >>> [row["available"] for row in facts["backends"] if row["name"] == "reference"]
        [True]
    """
    rows = [
        {"name": name, "available": bool(available), "reason": reason}
        for name, available, reason in backends.here()
    ]
    return {
        "memokern": memokern.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"machine": platform.machine(), "cores": os.cpu_count()},
        "threads": torch.get_num_threads(),
        "isa": instruction_set(),
        "libraries": {name: version(name) for name in _LIBRARIES},
        "backends": rows,
        "environment": {
            name: os.environ[name] for name in sorted(os.environ) if name.startswith("MEMOKERN_")
        },
    }


def render(facts: dict[str, Any]) -> str:
    """`collect()`'s facts as lines to read."""
    lines = [
        f"memokern {facts['memokern']}",
        f"python   {facts['python']}, {facts['platform']}",
        f"cpu      {facts['cpu']['machine']}, {facts['cpu']['cores']} cores, {facts['threads']} "
        f"threads",
        f"kernels  {facts['isa'] or 'no compiled CPU kernels'}",
        "",
        "libraries",
    ]
    for name, found in facts["libraries"].items():
        lines.append(f"  {name:<12} {found or 'not installed':<16} {_LIBRARIES[name]}")
    lines += ["", "backends"]
    for row in facts["backends"]:
        mark = "available" if row["available"] else "not available"
        lines.append(f"  {row['name']:<12} {mark:<16} {row['reason']}".rstrip())
    lines += ["", "environment"]
    lines += [f"  {name}={value}" for name, value in facts["environment"].items()] or [
        "  no MEMOKERN_ variable is set"
    ]
    return "\n".join(lines)
