"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, and ThreadSanitizer.

    make sanitize-cpu                    # one build for the widest vectors, one for the narrowest
    make sanitize-cpu ARGS="--isa all"   # both of every instruction set of the machine
    make sanitize-cpu ARGS="--isa avx2 --only thread"

Without Python: ``tests/cpp/sanitize.cpp`` runs every kernel on problems of awkward sizes, in memory
of exactly their size. In the first build the arrays of a kernel's work space are kept apart by
memory that must not be touched (``csrc/cpu/core/memory-inl.h``), and no memory is used again. The
second sees how the kernels' own threads (``csrc/cpu/runtime/threads.cpp``) meet. Needs GCC.

The kernels are one source. Arrays are longest beside their ends where vectors are widest, and how
threads meet is the same for all, so two programs have what all six would see, but for a fault in
the few functions that an instruction set has of its own (``csrc/cpu/core/vec-inl.h``,
``convert-inl.h``, ``pair_vec-inl.h``).
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import runpy
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = {
    "address": ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
# avx2w16 is the width of AVX-512 with the instructions of AVX2: for machines without AVX-512.
SOURCES = {
    "baseline": "csrc/cpu/isa/baseline.cpp",
    "avx2": "csrc/cpu/isa/avx2.cpp",
    "avx512": "csrc/cpu/isa/avx512.cpp",
    "avx2w16": "csrc/testing/avx2w16.cpp",
}
FLAGS_OF_AVX2 = {"avx2", "fma", "f16c"}
FLAGS_OF_AVX512 = {"avx512f", "avx512vl", "avx512bw", "avx512dq"}


def isas() -> list[str]:
    """The instruction sets that this machine runs; of two with one width, the real one."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ["baseline"]
    text = Path("/proc/cpuinfo").read_text()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    known = set(found[1].split()) if found else set()
    if not known >= FLAGS_OF_AVX2:
        return ["baseline"]
    return ["baseline", "avx2", "avx512" if known >= FLAGS_OF_AVX512 else "avx2w16"]


def programs_of(asked: list[str] | None) -> list[tuple[str, str]]:
    """Pairs of a sanitizer and an instruction set: of those asked for both, by default a build of
    each."""
    here = isas()
    if asked is None:
        return [("address", here[-1]), ("thread", here[0])]
    wanted = here if "all" in asked else asked
    return [(sanitizer, isa) for isa in wanted for sanitizer in SANITIZERS]


def build(sanitizer: str, isa: str, source: Path, out: Path) -> Path:
    """The program with one instruction set's kernels, of the sources in a folder. Only the parts
    that have changed are compiled again."""
    setup = runpy.run_path(str(source / "setup.py"), run_name="flags")
    out.mkdir(parents=True, exist_ok=True)
    headers = [*(source / "csrc").rglob("*.h"), *(source / "tests/cpp").glob("*.h")]
    newest = max(path.stat().st_mtime for path in headers)
    common = [
        "g++", "-std=c++17", *setup["FLAGS"], "-O1", "-g", "-fno-omit-frame-pointer",
        *SANITIZERS[sanitizer], "-I" + str(source / "csrc/include"), "-I" + str(source / "csrc"),
        f"-DMEMOKERN_TABLE=table_{isa}",
    ]  # fmt: skip

    def compiled(name: str, *flags: str) -> str:
        path, object_ = source / name, out / f"{sanitizer}-{isa}-{Path(name).stem}.o"
        if not object_.exists() or object_.stat().st_mtime < max(newest, path.stat().st_mtime):
            subprocess.run([*common, *flags, "-c", str(path), "-o", str(object_)], check=True)
        return str(object_)

    kernels = SOURCES[isa]
    flags = [f for f in setup["ISA_FLAGS"].get(kernels, []) if not f.startswith("-O")]
    objects = [compiled(kernels, *flags), compiled("tests/cpp/sanitize.cpp")]
    objects += [compiled(name) for name in setup["RUNTIME"]]
    program = out / f"{sanitizer}-{isa}"
    link = ["g++", *SANITIZERS[sanitizer], *objects, "-pthread", "-o", str(program)]
    subprocess.run(link, check=True)
    return program


def run(program: Path, share: int, of: int) -> subprocess.CompletedProcess[str]:
    """Every of-th problem; what the sanitizer says is in stderr."""
    options = {
        "ASAN_OPTIONS": "detect_leaks=1:strict_init_order=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
    }
    return ended([str(program), str(share), str(of)], options)


def ended(command: list[str], options: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The command with the sanitizers' options in its environment."""
    environment = {**os.environ, **options}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:  # GCC 12's ThreadSanitizer on newer kernels
        command = ["setarch", "-R", *command]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The C++ kernels under sanitizers.")
    parser.add_argument(
        "--isa", choices=["all", *sorted(SOURCES)], action="append", help="both builds of it"
    )
    parser.add_argument("--only", choices=sorted(SANITIZERS), help="one of the two builds")
    parser.add_argument("--every", type=int, default=1, help="only every n-th problem")
    parser.add_argument("--source", type=Path, default=ROOT, help="the tree that is watched")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "sanitize")
    asked = parser.parse_args(arguments)
    pairs = [(s, i) for s, i in programs_of(asked.isa) if asked.only in (None, s)]
    began = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = list(pool.map(lambda p: build(*p, asked.source, asked.out), pairs))
        print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)
        runs = pool.map(lambda program: run(program, 0, asked.every), programs)
        bad = 0
        for (sanitizer, isa), done in zip(pairs, runs, strict=True):
            print(f"{sanitizer:<8} {isa:<9} {done.stdout.strip() or 'nothing ran'}", flush=True)
            if done.returncode:
                bad += 1
                print(done.stderr[-6000:], file=sys.stderr)
    print(f"{len(pairs)} programs, {bad} with findings, {time.monotonic() - began:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
