"""Times on a machine that may be doing something else too."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

STAT = Path("/proc/stat")
TRIES = 4  # of a call that others disturb
PATIENCE = 300.0  # seconds that one run of the benchmark may wait for a quiet machine
TICKS = 0.03  # seconds: time taken is counted in ticks of 0.01
DISTURBED = 0.1  # share of one processor that others may take


def taken_by_others() -> float:
    """Processor seconds, since some fixed time, that went to other processes or machines (Linux;
    elsewhere 0: nothing is known)."""
    if not STAT.exists():
        return 0.0
    user, nice, system, _idle, _wait, irq, softirq, steal = (
        int(ticks) for ticks in STAT.read_text().split("\n", 1)[0].split()[1:9]
    )
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return busy - own.user - own.system


class Clock:
    """Times calls, and knows which of them other processes disturbed."""

    def __init__(self, patience: float = PATIENCE) -> None:
        self.patience = patience  # seconds left to wait for a quiet machine
        self.start()

    def start(self) -> None:
        self._others, self._start = taken_by_others(), time.perf_counter()

    def alone(self) -> bool:
        """Whether others left the machine alone since start()."""
        elapsed = time.perf_counter() - self._start
        return taken_by_others() - self._others < TICKS + DISTURBED * elapsed

    def wait(self) -> None:
        """Returns when others take little for a moment, or when patience is at an end."""
        while self.patience > 0:
            self.start()
            time.sleep(0.1)
            if self.alone():
                return
            self.patience -= 0.1

    def time(self, call: Callable[[], object], before: Callable[[], object]) -> tuple[float, bool]:
        """(seconds of a call made after `before`, whether others left it alone): the first that
        they did, of a few tries, or else the best."""
        times = []
        for _ in range(TRIES):
            before()
            self.start()
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
            if self.alone():
                return times[-1], True
            if self.patience <= 0:
                break
            self.wait()
        return min(times), False


def repeated(call: Callable[[], object], times: int) -> Callable[[], object]:
    """That many calls, one after the other: a call of microseconds, alone after others, would be
    timed with caches that they left, and with the clock's own cost."""
    if times == 1:
        return call

    def run() -> None:
        for _ in range(times):
            call()

    return run


def best(times: list[tuple[float, bool]], calls: int = 1) -> dict[str, float]:
    """The best round, of so many calls, stands for the machine undisturbed: the best of those that
    were, if any ("quiet"). Median over best, of all, says how far they spread."""
    quiet = [seconds for seconds, alone in times if alone]
    seconds = min(quiet or [seconds for seconds, _ in times])
    spread = median(seconds for seconds, _ in times) / seconds
    return {
        "seconds": seconds / calls, "spread": spread, "rounds": len(times), "quiet": bool(quiet)
    }  # fmt: skip
