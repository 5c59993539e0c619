"""What is known so far, and the two files that say it: gpu-check.json and gpu-check.md."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from tools.gpu_check import page
from tools.gpu_check.steps import Plan, Step


def _plain(value: Any) -> Any:
    """JSON has no infinities and no NaN."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def replace(path: Path, text: str) -> None:
    """The file, whole or as it was, whenever this process is stopped."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


class Record:
    """The result as JSON has it, written anew after each line.

    state: "running", "finished", or why it was stopped. machine: facts of the device. smoke, times:
    a line for each step that is done. tests: what pytest said. not_run: the names of the steps that
    are not done. wrong: how many lines tell of something wrong.
    """

    def __init__(self, out: Path, plan: Plan, minutes: float, rehearsed: bool) -> None:
        self.out, self.began = out, time.monotonic()
        self.result: dict[str, Any] = {
            "state": "running",
            "rehearsed": rehearsed,
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "minutes": minutes,
            "seconds": 0.0,
            "machine": {},
            "wrong": 0,
            "smoke": [],
            "times": [],
            "tests": None,
            "not_run": [step.name for step in [*plan.smoke, *plan.time]],
        }

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    def save(self) -> None:
        """Both files."""
        self.result["seconds"] = round(self.elapsed, 1)
        self.result["wrong"] = sum(map(page.is_wrong, self._lines()))
        text = json.dumps(_plain(self.result), indent=1, allow_nan=False)
        replace(self.out.with_suffix(".json"), text + "\n")
        replace(self.out, page.render(self.result))

    def head(self) -> list[str]:
        """What is said first, in words."""
        machine = self.result["machine"]
        return [page.machine_line(machine), *page.machine_facts(machine)]

    def _lines(self) -> list[dict[str, Any]]:
        """Everything that may be wrong."""
        r = self.result
        tests = [] if r["tests"] is None else [r["tests"]]
        return [*r["smoke"], *(run for case in r["times"] for run in case["runs"]), *tests]

    def smoke(self, step: Step, line: dict[str, Any], seconds: float) -> str:
        """A smoke test's line, in words."""
        found = {"name": step.name, "seconds": round(seconds, 1), **line}
        self._done(step)
        self.result["smoke"].append(found)
        return page.smoke_line(found)

    def timed(
        self, step: Step, runs: list[dict[str, Any]], done: bool, seconds: float
    ) -> list[str]:
        """A problem's lines, in words; they take the place of those that were told before it was
        done. seconds: that the step took, for planning."""
        case = step.case
        assert case is not None
        entry: dict[str, Any] = {"name": case.name, "rows": case.rows, "kind": step.kind}
        entry |= {"took": round(seconds, 1), "runs": runs}
        times = self.result["times"]
        key = ("name", "rows", "kind")
        times[:] = [old for old in times if any(old[k] != entry[k] for k in key)]
        times.append(entry)
        if done:
            self._done(step)
        return page.time_lines(entry)

    def told(self, step: Step) -> list[dict[str, Any]]:
        """What is known of a problem that is not done."""
        case = step.case
        assert case is not None
        found = [
            entry["runs"] for entry in self.result["times"]
            if (entry["name"], entry["rows"], entry["kind"]) == (case.name, case.rows, step.kind)
        ]  # fmt: skip
        return found[0] if found else []

    def _done(self, step: Step) -> None:
        names = self.result["not_run"]
        if step.name in names:
            names.remove(step.name)
