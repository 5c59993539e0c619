"""`python -m bench`: runs the benchmarks with pytest and prints the table."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import pytest

import memokern
from bench import table

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="N = 10,000 instead of 50,000")
    parser.add_argument("--rows", type=int, help="N")
    parser.add_argument("-k", metavar="WORDS", help="only the cases that match, as pytest's -k")
    parser.add_argument("--data", help="a file of rows (.npy, .npz, .safetensors)")
    parser.add_argument("--json", type=Path, help="where the figures go (default: results/)")
    parser.add_argument("--markdown", action="store_true", help="the table as Markdown")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="two files")
    args = parser.parse_args()
    if args.compare:
        try:
            print(table.compare(*(json.loads(p.read_text()) for p in args.compare)))
        except (OSError, ValueError) as error:
            print(f"bench: {error}", file=sys.stderr)
            return 2
        return 0
    if args.data:
        try:
            memokern.TrainingSet(args.data)  # a wrong file is said now, whatever -k selects
        except (OSError, TypeError, ValueError) as error:
            print(f"bench: --data {args.data}: {error}", file=sys.stderr)
            return 2
    out = args.json or Path("results") / f"bench-{time.strftime('%Y%m%d-%H%M%S')}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = args.rows or (10_000 if args.quick else 50_000)
    options = [str(HERE), "-q", "--benchmark-disable-gc", "--benchmark-columns=median", "-W",
               "default", f"--rows={rows}", f"--out={out.resolve()}", "-p", "no:cacheprovider",
               "--rootdir", str(HERE.parent)]  # fmt: skip
    options += ["-k", args.k] if args.k else []
    options += [f"--data={Path(args.data).resolve()}"] if args.data else []
    status = int(pytest.main(options))
    if out.exists():
        result = json.loads(out.read_text())
        print(table.render(result, args.markdown))
        for line in result["accuracy"]:
            errors = "  ".join(f"{k} {v:.1e}" if v is not None else f"{k} nan"
                               for k, v in line["errors"].items())  # fmt: skip
            print(f"sigma {line['sigma']:<6} {errors}")
        print(f"figures in {out}")
    return status


if __name__ == "__main__":
    sys.exit(main())
