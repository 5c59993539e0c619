"""The CUDA kernels on the emulator under AddressSanitizer with UndefinedBehaviorSanitizer, and
under ThreadSanitizer.

    make sanitize-cuda                      # every variant of the list, both builds
    make sanitize-cuda ARGS="--only thread --every 3"

Without Python and without a GPU: ``csrc/testing/cuda/sanitize.cpp`` runs a variant of the sweep,
``sanitize_gradient.cpp`` one of the backward sweep, and ``sanitize_lists.cpp`` the scan, the sums
over lists, the nearest rows and the sweep of few features, on problems of awkward sizes, each
thread of a block as a fibre, which ThreadSanitizer takes for a thread. Arrays of shared memory are
kept apart by memory that must not be touched. The third build, "plain", has what the emulator
itself stops at: barriers that some threads do not reach, copies whose bytes do not add up, threads
that wait for ever. Needs GCC.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tools.sanitize_cpu import ended

ROOT = Path(__file__).resolve().parent.parent
# Of each build: what the kernels are compiled with, and the emulator's runtime, which tells
# ThreadSanitizer of its fibres and is not watched itself.
BUILDS = {
    "plain": ((), ()),
    "address": (("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),) * 2,
    "thread": (("-fsanitize=thread",), ("-DMK_TSAN",)),
}


class Program(NamedTuple):
    """A source of csrc/testing/cuda, and the macros that it is compiled with."""

    main: str
    macros: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        """Of a file."""
        return "-".join([self.main, *(str(value) for _, value in self.macros)])


def _programs(main: str, names: str, *values: tuple[int, ...]) -> list[Program]:
    return [Program(main, tuple(zip(names.split(), each, strict=True))) for each in values]


_SWEEP = "ROWS QUERIES CLUSTER FEATURES TILE STAGES BULK LOG"
PROGRAMS = [
    *_programs(
        "sanitize", _SWEEP,
        (4, 16, 2, 32, 32, 2, 1, 0), (1, 16, 2, 32, 16, 3, 1, 0), (2, 32, 4, 16, 64, 2, 0, 0),
        (3, 16, 1, 48, 32, 2, 1, 1), (4, 64, 2, 16, 128, 2, 0, 1), (1, 16, 8, 16, 32, 2, 0, 0),
    ),
    *_programs(
        "sanitize_gradient", f"{_SWEEP} GRADIENT",
        (4, 16, 2, 32, 32, 2, 1, 0, 1), (1, 16, 4, 16, 64, 3, 1, 0, 1),
        (2, 16, 4, 16, 32, 2, 0, 0, 1), (3, 16, 2, 32, 16, 2, 0, 1, 1),
    ),
    *_programs(
        "sanitize_lists", "ROWS FINE QUERIES GRADIENT FEATURES",
        (4, 3, 1, 1, 2), (1, 1, 4, 1, 8), (2, 3, 4, 1, 4), (3, 1, 1, 1, 2),
    ),
]  # fmt: skip
MAINS = tuple(dict.fromkeys(program.main for program in PROGRAMS))


def build(kind: str, asked: Program, source: Path, out: Path) -> Path:
    """The program as a file, of the sources in a folder."""
    kernels, runtime = BUILDS[kind]
    out.mkdir(parents=True, exist_ok=True)
    here = source / "csrc" / "testing" / "cuda"
    name = f"{kind}-{asked.name}"
    common = [
        "g++", "-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer", "-ffp-contract=off",
        "-Wno-unknown-pragmas", "-Wno-unused-function", "-I", str(source / "csrc" / "cuda"), "-I",
        str(here),
    ]  # fmt: skip
    objects = []
    for part in ("runtime", "numbers"):
        made = out / f"{name}-{part}.o"
        command = [*common, *runtime, "-c", str(here / f"{part}.cpp"), "-o", str(made)]
        subprocess.run(command, check=True)
        objects.append(str(made))
    macros = [f"-DMK_{key}={value}" for key, value in asked.macros]
    program, main = out / name, str(here / f"{asked.main}.cpp")
    subprocess.run(
        [*common, *kernels, *macros, main, *objects, "-o", str(program)],
        check=True,
    )
    return program


def run(program: Path) -> subprocess.CompletedProcess[str]:
    """What a sanitizer or the emulator says is in stderr."""
    options = {
        "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    return ended([str(program)], options)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The CUDA kernels under sanitizers.")
    parser.add_argument("--only", choices=sorted(BUILDS), help="one of the builds")
    parser.add_argument("--main", choices=MAINS, help="one of the sources")
    parser.add_argument("--every", type=int, default=1, help="only every n-th program")
    parser.add_argument("--source", type=Path, default=ROOT, help="the tree that is watched")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "sanitize-cuda")
    asked = parser.parse_args(arguments)
    kinds = [asked.only] if asked.only else ["address", "thread"]
    chosen = [p for p in PROGRAMS if asked.main in (None, p.main)][:: asked.every]
    pairs = [(kind, program) for program in chosen for kind in kinds]
    began = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = list(pool.map(lambda p: build(*p, asked.source, asked.out), pairs))
        print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
        bad = 0
        for (kind, program), done in zip(pairs, pool.map(run, programs), strict=True):
            print(
                f"{kind:<8} {program.name:<44} {done.stdout.strip() or 'nothing ran'}", flush=True
            )
            if done.returncode:
                bad += 1
                print(done.stderr[-6000:], file=sys.stderr)
    print(f"{len(pairs)} programs, {bad} with findings, {time.monotonic() - began:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
