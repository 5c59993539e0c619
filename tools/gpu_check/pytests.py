"""The tests that need a GPU, shown as they come."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import NamedTuple

from tools.gpu_check.schedule import ROOT


class Said(NamedTuple):
    """What the tests did: pytest's exit status, its last line, and a line for each that failed."""

    status: int
    summary: str
    failures: list[str]


def tested(arguments: Sequence[str], seconds: float | None = None) -> Said:
    """Runs pytest, for so long at most."""
    command = [sys.executable, "-u", "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    failures, summary = [], "they printed nothing"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        ended = threading.Event()

        def end() -> None:
            ended.set()
            run.kill()

        timer = threading.Timer(seconds, end) if seconds is not None else None
        if timer is not None:
            timer.start()
        assert run.stdout is not None
        try:
            for line in run.stdout:
                print(line, end="", flush=True)
                if line.startswith(("FAILED ", "ERROR ")):
                    failures.append(line.strip())
                summary = line.strip("= \n") or summary
        finally:
            if timer is not None:
                timer.cancel()
            run.kill()
    if ended.is_set():
        # What they said before the time was up stands.
        return Said(int(bool(failures)), f"the time was up: {summary}", failures)
    return Said(run.returncode, summary, failures)
