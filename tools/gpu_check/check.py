"""A run of everything on a GPU, or its rehearsal: what is done when, and the status at the end."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.gpu_check import pytests, steps
from tools.gpu_check.record import Record
from tools.gpu_check.schedule import Answer, Pool
from tools.gpu_check.steps import Step

MACHINE = Step("machine", None, 60.0)
SMOKE_SECONDS = 90.0  # at most, of the smoke tests and of what is compiled ahead beside them
WORKERS = 6  # processes of the smoke tests, whose time is the compiler's
LEAST_FOR_TESTS = 20.0  # seconds that must be left for the tests to begin
GPU_TESTS = ("-m", "gpu", "tests")


class Options(NamedTuple):
    """out: the page; its JSON lies beside it. minutes: the budget. backend: whose operations.
    rehearsed: on the CPU, with tiny problems. interpreted: Triton's kernels, on the CPU. only:
    words that the names of all steps must have. tests: pytest's arguments, run whatever time is
    left; None: those that need a GPU, if time is left. faults: what goes wrong in a rehearsal."""

    out: Path
    minutes: float = 6.0
    backend: str = "triton"
    rehearsed: bool = False
    interpreted: bool = False
    only: str = ""
    tests: Sequence[str] | None = None
    faults: dict[str, str] = {}  # noqa: RUF012  # never written to


class Check:
    """Listens to the workers, and writes down what they say."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.plan = steps.plan(options.rehearsed, options.only)
        self.record = Record(options.out, self.plan, options.minutes, options.rehearsed)
        settings = {
            "device": "cpu" if options.rehearsed else "cuda",
            "backend": options.backend,
            "rehearsed": options.rehearsed,
            "interpreted": options.interpreted,
            "faults": options.faults,
        }
        self.pool = Pool(settings, max(1, min(WORKERS, (os.cpu_count() or 2) // 2)))
        self.until = time.monotonic() + 60 * options.minutes

    def run(self) -> int | None:
        """0, 1 where something is wrong, None where there is no GPU."""
        result = self.record.result
        try:
            if not self._has_gpu():
                return None
            self._checked()
            result["state"] = "the time was up" if result["not_run"] else "finished"
        except BaseException:
            result["state"] = "stopped"
            raise
        finally:
            self.pool.end()
            if result["state"] != "running":
                self.record.save()
        right = any("failed" not in line and "skipped" not in line for line in result["smoke"])
        return int(result["wrong"] > 0 or not right)

    def _has_gpu(self) -> bool:
        """Also takes down what it can do."""
        told: list[Answer] = []
        self.pool.start()
        self.pool.run([MACHINE], self.until, told.append)
        facts: dict[str, Any] = told[0].lines[0] if told else {"failed": "the time was up"}
        if facts.get("gpu") is False:
            return False
        if "failed" in facts:
            line = {"failed": facts["failed"]}
            print(self.record.smoke(MACHINE, line, self.record.elapsed), flush=True)
        else:
            self.record.result["machine"] = facts
            self.pool.rates = facts["rates"]
            for line in self.record.head():
                print(line, flush=True)
        self.record.save()
        return True

    def _checked(self) -> None:
        options, plan, pool = self.options, self.plan, self.pool
        # Interpreted kernels take longer.
        seconds = 30 * options.minutes if options.rehearsed else SMOKE_SECONDS
        smoke_until = min(self.until, time.monotonic() + seconds)
        pool.run([*plan.smoke, *plan.warm], smoke_until, self.hear, smoke_until - seconds / 6)
        pool.keep(1)
        pool.run(plan.time, self.until, self.hear)
        pool.keep(0)
        left = self.until - time.monotonic()
        if options.tests is not None:
            self._tests(options.tests, None)
        elif left > LEAST_FOR_TESTS and not options.rehearsed and not options.only:
            self._tests(GPU_TESTS, left)

    def _tests(self, arguments: Sequence[str], seconds: float | None) -> None:
        said = pytests.tested(arguments, seconds)
        self.record.result["tests"] = said._asdict()
        self.record.save()

    def hear(self, answer: Answer) -> None:
        """Write down what a step found, and print it."""
        step, record = answer.step, self.record
        if step.kind == "warm":  # it is timed later, and then told of
            return
        if step.kind == "smoke":
            said = [record.smoke(step, answer.lines[0], answer.seconds)]
        else:
            lines = answer.lines
            if answer.done and any("failed" in line for line in lines):
                # What was told before it failed is kept.
                lines = [*record.told(step), *lines]
            said = record.timed(step, lines, answer.done, answer.seconds)
        record.save()
        if answer.done:
            print(*said, sep="\n", flush=True)
