"""The command line: `python -m tools.gpu_check --help`."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from tools import gpu_check
from tools.gpu_check.check import Check, Options
from tools.gpu_check.schedule import ROOT
from tools.gpu_check.worker import FAULTS

NO_GPU = "There is no GPU here: the kernels are compiled ahead of time instead."


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_check", description=gpu_check.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=6.0, help="the budget (6)")
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-check.md",
                        help="the page; its JSON lies beside it")  # fmt: skip
    parser.add_argument("--only", default="", metavar="WORDS",
                        help="only steps whose name has all these words, and none that begins"
                             " with - (--only='mean -compiled')")  # fmt: skip
    parser.add_argument("--tests", nargs="?", const="-m gpu tests", metavar="ARGUMENTS",
                        help="run pytest too, whatever time is left (-m gpu tests)")  # fmt: skip
    parser.add_argument("--compile", action="store_true",
                        help="compile every kernel ahead of time, and nothing else")  # fmt: skip
    parser.add_argument("--rehearse", nargs="?", const="triton", metavar="BACKEND",
                        help="no GPU: tiny problems on the CPU, Triton interpreting")  # fmt: skip
    parser.add_argument("--fault", action="append", default=[], metavar="STEP=KIND",
                        help=f"what goes wrong in a rehearsal: {', '.join(FAULTS)}")  # fmt: skip
    parser.add_argument("words", nargs="*", help="only kernels named with these, where compiled")
    args = parser.parse_args()
    args.faults = dict(fault.rsplit("=", 1) for fault in args.fault)
    if args.faults and not args.rehearse:
        parser.error("faults are for rehearsals")
    for kind in args.faults.values():
        if kind not in FAULTS:
            parser.error(f"expected a fault of {', '.join(FAULTS)}, got {kind!r}")
    return args


def _compile(words: list[str]) -> int:
    """Every kernel, or those named with these words."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.aot", *words]
    return subprocess.run(command, cwd=ROOT, env=env).returncode


def _stop(number: int, frame: object) -> None:
    sys.exit(128 + number)


def main() -> int:
    args = _arguments()
    if args.compile:
        return _compile(args.words)
    signal.signal(signal.SIGTERM, _stop)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    options = Options(
        out=args.out.resolve(),
        minutes=args.minutes,
        backend=args.rehearse or "triton",
        rehearsed=args.rehearse is not None,
        interpreted=args.rehearse == "triton",
        only=args.only,
        tests=None if args.tests is None else shlex.split(args.tests),
        faults=args.faults,
    )
    status = Check(options).run()
    if status is None:
        print(NO_GPU, flush=True)
        return _compile(args.words)
    print(f"The page: {options.out}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
