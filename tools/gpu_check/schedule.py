"""Who does which step when. This process needs neither PyTorch nor a GPU, so nothing that happens
there can stop it."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tools.gpu_check.steps import Step

ROOT = Path(__file__).resolve().parent.parent.parent
STARTING = 60.0  # seconds that a process may take to import PyTorch, beyond a step's own limit


class Answer(NamedTuple):
    """lines: of a step. done: whether they are all. seconds: since it was asked for."""

    step: Step
    lines: list[dict[str, Any]]
    done: bool
    seconds: float


class Process:
    """A worker and what it is doing."""

    def __init__(self, settings: dict[str, Any]) -> None:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.run = subprocess.Popen(
            [sys.executable, "-u", "-m", "tools.gpu_check.worker", json.dumps(settings)],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.step: Step | None = None
        self.began = self.deadline = time.monotonic()
        self.answered = False
        self._rest = b""

    @property
    def out(self) -> int:
        """Where it answers."""
        assert self.run.stdout is not None
        return self.run.stdout.fileno()

    def ask(self, step: Step, rates: dict[str, float]) -> None:
        """Begin a step."""
        assert self.run.stdin is not None
        self.step, self.began = step, time.monotonic()
        self.deadline = self.began + step.limit + (0.0 if self.answered else STARTING)
        message = json.dumps({**step.message(), "rates": rates})
        with contextlib.suppress(BrokenPipeError):  # it is gone, which reading from it will tell
            self.run.stdin.write(message.encode() + b"\n")
            self.run.stdin.flush()

    def read(self) -> list[dict[str, Any]] | None:
        """What it has answered; None where it is gone."""
        chunk = os.read(self.out, 1 << 16)
        if not chunk:
            return None
        self.answered = True
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [json.loads(line) for line in lines]

    def end(self) -> None:
        """Whatever it is doing."""
        self.run.kill()
        self.run.wait()
        for pipe in (self.run.stdin, self.run.stdout):
            with contextlib.suppress(BrokenPipeError):  # it was not read to the end
                if pipe is not None:
                    pipe.close()


class Pool:
    """Some workers, which do the steps of a queue in order."""

    def __init__(self, settings: dict[str, Any], most: int) -> None:
        self.settings, self.most = settings, most
        self.processes: list[Process] = []
        self.rates: dict[str, float] = {}

    def start(self) -> None:
        """All of them, ahead of their first steps: they import PyTorch at once."""
        while len(self.processes) < self.most:
            self.processes.append(Process(self.settings))

    def keep(self, most: int) -> None:
        """Go on with so many."""
        self.most = most
        while len(self.processes) > most:
            self.processes.pop().end()

    def run(
        self, steps: list[Step], until: float, tell: Callable[[Answer], object],
        begin_until: float = float("inf"),
    ) -> None:  # fmt: skip
        """Do the steps, until this moment; those that are cut off then are told of nowhere. None is
        begun after `begin_until`."""
        queue = deque(steps)
        while time.monotonic() < until:
            if time.monotonic() > begin_until:
                queue.clear()
            self._hand_out(queue)
            busy = [p for p in self.processes if p.step is not None]
            if not busy:
                return
            for process in self._ready(busy, until):
                self._hear(process, tell)
            for process in busy:
                if process.step is not None and time.monotonic() > process.deadline:
                    limit = process.deadline - process.began
                    self._lose(process, f"it took longer than {limit:.0f} s and was ended", tell)
        for process in [p for p in self.processes if p.step is not None]:
            process.end()
            self.processes.remove(process)

    def _hand_out(self, queue: deque[Step]) -> None:
        idle = [p for p in self.processes if p.step is None]
        while queue and (idle or len(self.processes) < self.most):
            if not idle:
                idle.append(Process(self.settings))
                self.processes += idle
            idle.pop().ask(queue.popleft(), self.rates)

    @staticmethod
    def _ready(busy: list[Process], until: float) -> list[Process]:
        """Those that have something to say, or nothing any more."""
        with selectors.DefaultSelector() as selector:
            for process in busy:
                selector.register(process.out, selectors.EVENT_READ, process)
            wait = min(until, *(p.deadline for p in busy)) - time.monotonic()
            return [key.data for key, _ in selector.select(max(wait, 0.0) + 0.01)]

    def _hear(self, process: Process, tell: Callable[[Answer], object]) -> None:
        answers = process.read()
        if answers is None:
            process.run.wait()
            self._lose(process, f"its process ended ({process.run.returncode})", tell)
            return
        for answer in answers:
            assert process.step is not None
            step, seconds = process.step, time.monotonic() - process.began
            if answer["done"]:
                process.step = None
            if answer["lost"]:
                process.end()
                self.processes.remove(process)
            tell(Answer(step, answer["lines"], answer["done"], seconds))

    def _lose(self, process: Process, why: str, tell: Callable[[Answer], object]) -> None:
        step = process.step
        assert step is not None
        process.end()
        self.processes.remove(process)
        line = {"run": "memokern", "failed": why}
        tell(Answer(step, [line], True, time.monotonic() - process.began))

    def end(self) -> None:
        """All of them."""
        self.keep(0)
