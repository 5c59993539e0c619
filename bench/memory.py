"""Peak memory of one call beyond its inputs, measured in a process of its own.

The kernel's own record is read (VmHWM, reset just before the call), so nothing that lives for a
moment is missed, as it would be by sampling. A known temporary of 100 MB is measured first, in the
same process and the same way: where that isn't seen as 100 MB, nothing is reported.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import memokern
from bench import peers

ROOT = Path(__file__).resolve().parent.parent
KNOWN = 100_000_000  # bytes of the temporary that must be seen, within 5 %
# Blocks of 64 kB and more come from mmap and go back at once; by default that limit rises with use.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def allowed(b: int, d: int, threads: int) -> int:
    """Bytes that memokern may take beyond the inputs (result included), whatever N is."""
    return 3 * threads * b * d * 4 + 32 * 2**20


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def peak(run: Callable[[], object]) -> int:
    """Bytes by which the process's peak during the call exceeds what it held before. OSError where
    Linux's record cannot be reset."""
    ctypes.CDLL(None).malloc_trim(0)  # or the call would reuse what was freed but not given back
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _prepare(
    op: str, name: str, rows: torch.Tensor, x: torch.Tensor, sigma: float
) -> Callable[[], object]:
    if op == "nearest":
        search = peers.NEAREST[name](rows)
        return lambda: search(x, 2)
    if op == "condition":  # another one for each query
        numbers = torch.linspace(0, 1, len(rows))
        data = memokern.TrainingSet(rows, conditions=numbers)
        _, c = data.sq_norms, numbers[: len(x), None] + 1e-3
        return lambda: memokern.posterior(x, data, sigma, condition=c, bandwidth=0.1)
    mean = peers.MEAN[name](rows)
    if op == "mean":
        return lambda: mean(x, sigma)
    x = x.clone().requires_grad_()
    value, grad = mean(x, sigma), torch.ones_like(x)
    return lambda: torch.autograd.grad(value, x, grad, retain_graph=True)


def _measure(op: str, name: str, b: int, n: int, d: int) -> dict[str, int]:
    torch.empty(1 << 20).fill_(1.0)  # loads its code and threads, which are not the temporary
    known = peak(lambda: torch.empty(KNOWN // 4).fill_(1.0))
    torch.manual_seed(0)
    rows = torch.empty(n, d).normal_()  # filled in place: inputs must leave no peak of their own
    x = torch.empty(b, d).normal_()
    # a small call first: threads, libraries and code are not the call's memory
    small = slice(0, min(n, 256))
    _prepare(op, name, rows[small].clone(), x[:1].clone(), d**0.5)()
    run = _prepare(op, name, rows, x, d**0.5)
    return {"known": known, "bytes": peak(run)}


def measure(op: str, name: str, b: int, n: int, d: int, threads: int = 2) -> dict[str, Any]:
    """{"bytes", "known"} of one call in a fresh process; RuntimeError with one line if it fails or
    does not see the known temporary."""
    code = "import sys, json; from bench import memory; memory.main(json.loads(sys.argv[1]))"
    run = subprocess.run(
        [sys.executable, "-c", code, json.dumps([op, name, b, n, d])],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    if run.returncode:
        raise RuntimeError(f"memory of {op}: {run.stderr.strip().splitlines()[-1][:200]}")
    found = json.loads(run.stdout.splitlines()[-1])
    if abs(found["known"] - KNOWN) > KNOWN // 20:
        raise RuntimeError(f"a temporary of {KNOWN} bytes was seen as {found['known']}")
    return found


def main(arguments: list[Any]) -> None:
    print(json.dumps(_measure(*arguments)))
