"""A process that does one step at a time: `python -m tools.gpu_check.worker SETTINGS`.

It reads a step as a line of JSON, and answers with lines of JSON: {"lines": [...], "done": false}
for what is known already, and at the end {"lines": [...], "done": true, "lost": ...}. lost: the
GPU's context is gone, and with it this process. Whatever else is printed goes to stderr.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent.parent
TRACE = 4000  # characters of a failure's traceback that the JSON keeps
# What can be made to go wrong in a rehearsal.
FAULTS = ("wrong", "memory", "lost", "crash", "hang")


def die_with_parent() -> None:
    """On Linux: where the process that asks is killed, nobody would end a step that hangs."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def interpret() -> None:
    """Triton's interpreter, made exact by what the tests use."""
    os.environ["TRITON_INTERPRET"] = "1"
    path = next((ROOT / "tests").rglob("triton_interpreter.py"))
    spec = importlib.util.spec_from_file_location("triton_interpreter", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.install()


@contextlib.contextmanager
def mistaken() -> Iterator[None]:
    """Every result of the backend is off."""
    from torch import Tensor

    from memokern.backends import protocol
    from memokern.util import env

    backend = protocol.get(env.backend())

    def off(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value + 1 if value.is_floating_point() else value
        if isinstance(value, tuple):
            parts = [off(v) for v in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return value

    def wrong(right: Any) -> Any:
        return lambda *args, **kwargs: off(right(*args, **kwargs))

    def written_wrong(right: Any) -> Any:
        def run(*args: Any) -> None:
            right(*args)
            for out in args[4:]:
                if out is not None:
                    out += 1

        return run

    small = "small_posterior"  # it writes into its last arguments
    with contextlib.ExitStack() as stack:
        for name in protocol.OPERATIONS:
            stack.enter_context(mock.patch.object(backend, name, wrong(getattr(backend, name))))
        if hasattr(backend, small):
            change = written_wrong(getattr(backend, small))
            stack.enter_context(mock.patch.object(backend, small, change))
        yield


class Worker:
    """settings: "device", "backend", "rehearsed", "interpreted", "faults" (a step's name: one of
    FAULTS)."""

    def __init__(self, settings: dict[str, Any], answers: TextIO) -> None:
        self.settings, self.answers = settings, answers
        import torch

        if settings["rehearsed"]:
            from tools.gpu_check import stand_in

            stand_in.install()

        self.device = torch.device(settings["device"])

    def tell(self, lines: list[dict[str, Any]], done: bool = False, lost: bool = False) -> None:
        answer = {"lines": lines, "done": done, "lost": lost}
        print(json.dumps(answer), file=self.answers, flush=True)

    def serve(self) -> None:
        """Until there are no more steps, or nothing runs any more."""
        for line in sys.stdin:
            message = json.loads(line)
            try:
                lines, lost = self._answer(message)
            except Exception as error:  # one line of the page, not the end of the others
                lines, lost = self._failed(error, quiet=message["kind"] == "warm")
            self.tell(lines, done=True, lost=lost)
            if lost:
                return
            self._tidy()

    def _failed(self, error: Exception, quiet: bool) -> tuple[list[dict[str, Any]], bool]:
        import torch

        from bench.peers import reason
        from tools.gpu_check.timing import is_lost

        lost = is_lost(self.device) or "illegal memory access" in str(error)
        words = reason(error)
        if isinstance(error, torch.OutOfMemoryError):
            words = "out of memory: " + words
        trace = "".join(traceback.format_exception(error))
        if not quiet:
            print(trace, file=sys.stderr, flush=True)
        return [{"run": "memokern", "failed": words, "trace": trace[-TRACE:]}], lost

    def _answer(self, message: dict[str, Any]) -> tuple[list[dict[str, Any]], bool]:
        from tools.gpu_check.steps import step_of

        step = step_of(message)
        fault = self.settings["faults"].get(step.name)
        self._meet(fault)
        with mistaken() if fault == "wrong" else contextlib.nullcontext():
            if step.kind == "machine":
                return self._machine(), False
            if step.kind == "smoke":
                return self._smoke(step.case), False
            return self._timed(step.kind, step.case, message.get("rates", {}))

    @staticmethod
    def _meet(fault: str | None) -> None:
        """What a rehearsal wants to go wrong."""
        import torch

        if fault == "memory":
            raise torch.OutOfMemoryError("rehearsed")
        if fault == "lost":
            raise RuntimeError("CUDA error: an illegal memory access was encountered (rehearsed)")
        if fault == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        while fault == "hang":
            time.sleep(1)

    def _machine(self) -> list[dict[str, Any]]:
        import torch

        if self.device.type == "cuda" and not torch.cuda.is_available():
            return [{"gpu": False}]
        from tools.gpu_check import rates

        return [{"gpu": True, **rates.describe(self.device)}]

    def _smoke(self, case: Any) -> list[dict[str, Any]]:
        from tools.gpu_check import smoke

        reason = smoke.skipped(case, self.device)
        if reason is not None:
            return [{"skipped": reason}]
        return [smoke.check(case, self.device)._asdict()]

    def _timed(
        self, kind: str, problem: Any, known: dict[str, float]
    ) -> tuple[list[dict[str, Any]], bool]:
        from tools.gpu_check import timing

        on = timing.Conditions(self.device, known, compiled=kind == "compiled")
        if kind == "warm":
            timing.prepared(problem, on)
            return [], False
        told: list[dict[str, Any]] = []

        def tell(lines: list[dict[str, Any]]) -> None:
            told.extend(lines)
            self.tell(lines)

        try:
            return timing.measure(problem, on, tell), False
        except timing.PeerLost as peer:
            return [*told, {"run": str(peer), "skipped": "it took the GPU's context with it"}], True

    def _tidy(self) -> None:
        """So that the next step finds the memory free."""
        import gc

        import torch

        gc.collect()
        if self.device.type == "cuda" or self.settings["rehearsed"]:
            torch.cuda.empty_cache()


def main() -> None:
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = json.loads(sys.argv[1])
    os.environ["MEMOKERN_BACKEND"] = settings["backend"]
    if settings["interpreted"]:
        interpret()
    Worker(settings, answers).serve()


if __name__ == "__main__":
    main()
