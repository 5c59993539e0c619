"""What this installation is made of, and who would run a call on it: what `memokern info` prints,
and what a bug report needs.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from typing import Any

import torch

import memokern
from memokern.backends import protocol
from memokern.calls.checks import name_of

# Each distribution, and what memokern uses it for.
_LIBRARIES = {
    "torch": "tensors, autograd",
    "numpy": "arrays",
    "scipy": "adaptive solver, Voronoi diagrams",
    "safetensors": "data files",
    "matplotlib": "pictures (optional)",
    "triton": "GPU kernels (optional)",
    "cuda-core": "CUDA kernels (optional)",
    "cuda-bindings": "CUDA kernels (optional)",
    "nvidia-cuda-nvrtc": "CUDA kernels (optional)",
}
# Calls whose backends are explained: operation, type of the queries, type of the rows.
_CALLS = (
    ("posterior", torch.float32, torch.float32),
    ("posterior", torch.float32, torch.uint8),
    ("posterior", torch.float64, torch.float64),
    ("nearest", torch.float32, torch.float32),
)


def version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def instruction_set() -> str | None:
    """The instruction set that the compiled CPU kernels chose ("baseline", "avx2", "avx512", the
    latter two also "with VNNI"), or None where there are none.
    """
    cpu: Any = protocol.get("cpu")
    return cpu.described_isa() if cpu.unavailable() is None else None


def devices() -> list[str]:
    """The types of the devices that PyTorch has here: "cpu", and that of an accelerator."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def cuda_kernels() -> dict[str, Any]:
    """The folder that keeps compiled CUDA kernels, whether it can be written, how many it has for
    each architecture and in how many bytes, and the versions of NVRTC and of the driver, None where
    there is none."""
    found: dict[str, Any] = importlib.import_module("memokern.backends.cuda").facts()
    return found


def check_backend(device: str) -> None:
    """RuntimeError, with the reasons, where no backend sweeps over float32 rows on devices of this
    type, or where an environment variable is wrong."""
    protocol.require(device)


def explained_calls() -> list[dict[str, Any]]:
    """Typical calls on each device, the backend that would run each (None where none would), and
    what the others say."""
    found = []
    for device in devices():
        for operation, x_dtype, rows_dtype in _CALLS:
            x = torch.zeros(4, 2, dtype=x_dtype, device=device)
            rows = torch.zeros(8, 2, dtype=rows_dtype, device=device)
            explanation = memokern.explain(x, rows, 1.0, k=int(operation == "nearest"))
            call, runs = explanation.call, explanation.runs
            types = name_of(call.x)
            if call.rows != call.x:
                types += f"/{name_of(call.rows)}"
            found.append(
                {
                    "call": f"{operation} {types}",
                    "device": device,
                    "runs": runs,
                    "others": {
                        answer.name: "could, and is not asked" if answer.runs else answer.detail
                        for answer in explanation.backends
                        if answer.name != runs
                    },
                }
            )
    return found


def collect() -> dict[str, Any]:
    """Versions, machine, threads, instruction set, backends with their reasons, who would run
    typical calls, and the environment variables that are set.

    Raises: RuntimeError for an environment variable with a value that is not known.

    Example:
        >>> from memokern.apps import info
        >>> facts = info.collect()
        >>> sorted(facts)[:4]
        ['backends', 'calls', 'cpu', 'cuda']
        >>> [row["available"] for row in facts["backends"] if row["name"] == "reference"]
        [True]
    """
    return {
        "memokern": memokern.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"machine": platform.machine(), "cores": os.cpu_count()},
        "threads": torch.get_num_threads(),
        "isa": instruction_set(),
        "libraries": {name: version(name) for name in _LIBRARIES},
        "backends": [
            {"name": answer.name, "available": answer.runs, "reason": answer.detail}
            for answer in protocol.here()
        ],
        "cuda": cuda_kernels(),
        "calls": explained_calls(),
        "environment": {
            name: os.environ[name] for name in sorted(os.environ) if name.startswith("MEMOKERN_")
        },
    }


def _cuda_lines(cuda: dict[str, Any]) -> list[str]:
    """What :func:`cuda_kernels` found, as lines to read."""
    kernels = ", ".join(f"{count} for {arch}" for arch, count in cuda["kernels"].items())
    size = f", {cuda['bytes'] / 1e6:.1f} MB" if kernels else ""
    note = "" if cuda["writable"] else " (cannot be written)"
    return [
        f"  folder       {cuda['folder']}{note}",
        f"  compiled     {kernels or 'none yet'}{size}",
        f"  NVRTC        {cuda['nvrtc'] or 'none'}",
        f"  driver       {'CUDA ' + cuda['driver'] if cuda['driver'] else 'none'}",
    ]


def render(facts: dict[str, Any]) -> str:
    """The facts that :func:`collect` found, as lines to read."""
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
        lines.append(f"  {name:<18} {found or 'not installed':<16} {_LIBRARIES[name]}")
    lines += ["", "backends"]
    for row in facts["backends"]:
        mark = "available" if row["available"] else "not available"
        lines.append(f"  {row['name']:<12} {mark:<16} {row['reason']}".rstrip())
    lines += ["", "CUDA kernels", *_cuda_lines(facts["cuda"])]
    lines += ["", "who runs what (type of the queries, and of the rows if it differs)"]
    # Calls that get the same answers share their lines.
    alike: dict[tuple[Any, ...], list[str]] = {}
    for call in facts["calls"]:
        answers = (call["device"], call["runs"], *call["others"].items())
        alike.setdefault(answers, []).append(call["call"])
    for (device, runs, *others), calls in alike.items():
        lines.append(f"  on {device}, {runs or 'nobody'} runs {', '.join(calls)}")
        lines += [f"    {name:<10} {reason}" for name, reason in others]
    lines += ["", "environment"]
    lines += [f"  {name}={value}" for name, value in facts["environment"].items()] or [
        "  no MEMOKERN_ variable is set"
    ]
    return "\n".join(lines)
