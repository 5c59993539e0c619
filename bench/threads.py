"""`python -m bench.threads`: one thread and two, on an idle machine and beside a busy process.

Machines are shared: with one of two cores taken, a call on two threads should not take longer than
the core that is left explains. Every call is timed in four ways, which take turns: one thread and
two, alone and with a process that never waits on one core. What is printed: the medians; two
threads over one on the idle machine; and for either, beside the busy process over idle.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch

import memokern
from bench import images, machine, pruned
from bench.timing import Clock

BATCHES = (1, 4, 16, 64)
BUSY = "import os\nos.sched_setaffinity(0, {%d})\nwhile True: pass"
SIGMA = 0.3
SECONDS = 0.25  # of each way of each call, at least
# Two threads over one, idle; and beside a busy process over idle.
MOST_IDLE, MOST_BUSY = 1.05, 2.2


@contextmanager
def busy(core: int) -> Iterator[None]:
    """A process that never waits, on this core."""
    process = subprocess.Popen([sys.executable, "-c", BUSY % core])
    try:
        time.sleep(0.3)
        yield
    finally:
        process.kill()
        process.wait()


def seconds(call: Callable[[], object]) -> float:
    """The median of the times of a call, after a few for warmth."""
    for _ in range(3):
        call()
    times: list[float] = []
    while sum(times) < SECONDS or len(times) < 5:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return median(times)


def calls(path: str | None) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    data = images.load(path)
    rows = pruned.prepared(data)
    found: dict[str, Callable[[], object]] = {}
    for b in BATCHES:
        x = pruned.noisy_rows(data, b, SIGMA)

        def of(method: str, x: torch.Tensor = x) -> Callable[[], object]:
            if method == "nearest":
                return lambda: memokern.nearest(x, rows, 1)
            return lambda: memokern.denoise(x, rows, SIGMA, method=method)

        found |= {f"{method} B={b}": of(method) for method in ("dense", "pruned", "nearest")}
    return found


def measure(path: str | None, rounds: int, patience: float) -> bool:
    """Prints a line for each call. Whether all are within what is allowed."""
    clock, good = Clock(patience), True
    core = min(os.sched_getaffinity(0))
    print(f"{machine.describe()}\nms: 1 thread, 2 threads, the same beside a busy process")
    for name, call in calls(path).items():
        times: dict[tuple[int, bool], list[float]] = {}
        for _ in range(rounds):
            for beside in (False, True):
                if not beside:
                    clock.wait()
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    if beside:
                        with busy(core):
                            took = seconds(call)
                    else:
                        took = seconds(call)
                    times.setdefault((threads, beside), []).append(took)
        one, two, one_busy, two_busy = (
            min(times[threads, beside]) for beside in (False, True) for threads in (1, 2)
        )
        ratios = (two / one, one_busy / one, two_busy / two)
        ok = ratios[0] <= MOST_IDLE and ratios[2] <= MOST_BUSY
        good &= ok
        print(
            f"{name:14} {1e3 * one:8.3f} {1e3 * two:8.3f} {1e3 * one_busy:8.3f}"
            f" {1e3 * two_busy:8.3f}   two/one {ratios[0]:.2f}  busy/idle {ratios[1]:.2f}"
            f" {ratios[2]:.2f}{'' if ok else '  missed'}",
            flush=True,
        )
    return good


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench.threads", description=__doc__)
    parser.add_argument("--images", help="a file of uint8 images (.npy, .npz, .safetensors)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--patience", type=float, default=60.0, metavar="SECONDS",
                        help="how long to wait, in all, for a quiet machine")  # fmt: skip
    args = parser.parse_args()
    if len(os.sched_getaffinity(0)) != 2:
        print("bench.threads: it takes exactly two cores (taskset -c 0,1)", file=sys.stderr)
        return 2
    return 0 if measure(args.images, args.rounds, args.patience) else 1


if __name__ == "__main__":
    sys.exit(main())
