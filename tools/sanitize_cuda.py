"""The CUDA kernels on the emulator under AddressSanitizer with UndefinedBehaviorSanitizer, and
under ThreadSanitizer.

    make sanitize-cuda                      # every variant of the list, both builds
    make sanitize-cuda ARGS="--only thread --every 3"

Without Python and without a GPU: ``csrc/testing/cuda/sanitize.cpp`` runs a variant of the sweep,
and ``sanitize_gradient.cpp`` one of the backward sweep, on
problems of awkward sizes, each thread of a block as a fibre, which ThreadSanitizer takes for a
thread. Arrays of shared memory are kept apart by memory that must not be touched. The third build,
"plain", has what the emulator itself stops at: barriers that some threads do not reach, copies
whose bytes do not add up, threads that wait for ever. Needs GCC.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.sanitize_cpu import ended

ROOT = Path(__file__).resolve().parent.parent
# Of each build: what the kernels are compiled with, and the emulator's runtime, which tells
# ThreadSanitizer of its fibres and is not watched itself.
BUILDS = {
    "plain": ((), ()),
    "address": (("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),) * 2,
    "thread": (("-fsanitize=thread",), ("-DMK_TSAN",)),
}
# rows, queries, blocks of a cluster, features of a block, rows of a tile, tiles, copies by the
# machine, weighting "log", backward sweep.
VARIANTS = (
    (4, 16, 2, 32, 32, 2, 1, 0, 0),
    (1, 16, 2, 32, 16, 3, 1, 0, 0),
    (2, 32, 4, 16, 64, 2, 0, 0, 0),
    (3, 16, 1, 48, 32, 2, 1, 1, 0),
    (4, 64, 2, 16, 128, 2, 0, 1, 0),
    (1, 16, 8, 16, 32, 2, 0, 0, 0),
    (4, 16, 2, 32, 32, 2, 1, 0, 1),
    (1, 16, 4, 16, 64, 3, 1, 0, 1),
    (2, 16, 4, 16, 32, 2, 0, 0, 1),
    (3, 16, 2, 32, 16, 2, 0, 1, 1),
)
MACROS = ("ROWS", "QUERIES", "CLUSTER", "FEATURES", "TILE", "STAGES", "BULK", "LOG", "GRADIENT")


def build(kind: str, variant: tuple[int, ...], source: Path, out: Path) -> Path:
    """The program of one variant, of the sources in a folder."""
    kernels, runtime = BUILDS[kind]
    out.mkdir(parents=True, exist_ok=True)
    here = source / "csrc" / "testing" / "cuda"
    name = f"{kind}-" + "-".join(map(str, variant))
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
    macros = [f"-DMK_{key}={value}" for key, value in zip(MACROS, variant, strict=True)]
    program, main = out / name, "sanitize_gradient.cpp" if variant[-1] else "sanitize.cpp"
    subprocess.run(
        [*common, *kernels, *macros, str(here / main), *objects, "-o", str(program)],
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
    parser.add_argument("--every", type=int, default=1, help="only every n-th variant")
    parser.add_argument("--source", type=Path, default=ROOT, help="the tree that is watched")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "sanitize-cuda")
    asked = parser.parse_args(arguments)
    kinds = [asked.only] if asked.only else ["address", "thread"]
    pairs = [(kind, variant) for variant in VARIANTS[:: asked.every] for kind in kinds]
    began = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = list(pool.map(lambda p: build(*p, asked.source, asked.out), pairs))
        print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
        bad = 0
        for (kind, variant), done in zip(pairs, pool.map(run, programs), strict=True):
            words = " ".join(map(str, variant))
            print(f"{kind:<8} {words:<24} {done.stdout.strip() or 'nothing ran'}", flush=True)
            if done.returncode:
                bad += 1
                print(done.stderr[-6000:], file=sys.stderr)
    print(f"{len(pairs)} programs, {bad} with findings, {time.monotonic() - began:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
