"""`python -m bench`: runs the benchmarks with pytest and prints the table, targets included."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import memokern
from bench import images, isas, loops, machine, report
from memokern.util import writing

HERE = Path(__file__).resolve().parent
RAN = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few cases, N = 10,000: a minute")
    parser.add_argument("--rows", type=int, help="N (50,000)")
    parser.add_argument("-k", metavar="WORDS", help="pytest's -k: nearest, B64-D3072, memory ...")
    parser.add_argument("--data", help="a file of rows (.npy, .npz, .safetensors)")
    parser.add_argument("--images", help="a file of uint8 images, for the cases of pruning")
    parser.add_argument("--isa", metavar="NAMES",
                        help="instruction sets to time ours in beside the one in use, separated by"
                             " commas (avx2 where that is avx512)")  # fmt: skip
    parser.add_argument("--json", type=Path, help="where the figures go (default: results/)")
    parser.add_argument("--update", type=Path, metavar="FILE",
                        help="only what FILE lacks, or what others disturbed")  # fmt: skip
    parser.add_argument("--load", type=Path, help="print figures already taken, run nothing")
    parser.add_argument("--markdown", nargs="?", const=str(report.PAGE), metavar="FILE",
                        help="the table into FILE, between its marks (docs/performance.md; - prints"
                             " it)")  # fmt: skip
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="two files")
    return parser.parse_args()


def _print(result: dict[str, Any], markdown: str | None) -> None:
    if markdown == "-":
        print(report.markdown(result))
        return
    print(report.text(result))
    if markdown:
        report.write(Path(markdown), report.markdown(result))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _loops(out: Path, quick: bool) -> None:
    """Adds to the figures those of the loops that calls take the place of."""
    entries = []
    for entry in loops.run(quick):
        print(loops.line(entry), flush=True)
        entries.append(entry)
    writing.write_json(out, {**_read(out), "loops": entries})


def _run(args: argparse.Namespace) -> int:
    out = Path("results") / f"bench-{time.strftime('%Y%m%d-%H%M%S')}.json"
    out = args.update or args.json or out
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = args.rows or (10_000 if args.quick else 50_000)
    options = [str(HERE), "-q", "--benchmark-disable-gc", "--benchmark-columns=min", "-W",
               "default", f"--rows={rows}", f"--out={out.resolve()}", "-p", "no:cacheprovider",
               "--rootdir", str(HERE.parent)]  # fmt: skip
    options += [f"--keep={out.resolve()}"] if args.update and out.exists() else []
    options += ["--quick"] if args.quick else []
    options += ["-k", args.k] if args.k else []
    options += [f"--data={Path(args.data).resolve()}"] if args.data else []
    options += [f"--images={Path(args.images).resolve()}"] if args.images else []
    options += [f"--isa={args.isa}"] if args.isa is not None else []
    print(report.on(machine.describe()), flush=True)
    started = time.time()
    status = int(pytest.main(options))
    if status in RAN and out.exists() and out.stat().st_mtime >= started:
        if not (args.k or args.data):  # which choose among the cases above
            _loops(out, args.quick)
        _print(_read(out), args.markdown)
        print(f"figures in {out}", file=sys.stderr)
    return status


def main() -> int:
    args = _arguments()
    try:
        if args.compare:
            print(report.compare(*map(_read, args.compare)))
            return 0
        if args.load:
            _print(_read(args.load), args.markdown)
            return 0
    except (OSError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if args.data:
        try:
            memokern.TrainingSet(args.data)  # a wrong file is said now, whatever -k selects
        except (OSError, TypeError, ValueError) as error:
            print(f"bench: --data {args.data}: {error}", file=sys.stderr)
            return 2
    try:
        isas.beside(args.isa)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if args.images:
        try:
            images.load(args.images)
        except (OSError, TypeError, ValueError) as error:
            print(f"bench: --images {args.images}: {error}", file=sys.stderr)
            return 2
    return _run(args)


if __name__ == "__main__":
    sys.exit(main())
