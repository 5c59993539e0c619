"""Every CUDA kernel compiled ahead of time, for machines that need not be there.

Registers and spills are the assembler's word, shared memory is the planner's; the disassembled
machine code must have the instructions that the kernel is written for. Needs NVRTC
(`pip install "memokern[cuda]"`), or nvcc with `--nvcc`, and no GPU.

    python -m tools.cubins                                    # all
    python -m tools.cubins sweep rows=4 --target sm_90a
    python -m tools.cubins --markdown docs/cuda-kernels.md
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from memokern.backends.cuda import variants as listing
from memokern.backends.cuda.core import compiler, machine, sources
from memokern.backends.cuda.core.variant import Variant
from memokern.util import writing

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "cuda-kernels.md"
KEPT = ROOT / "build" / "cuda-resources.json"
# sm_80 has no clusters: what does without them is compiled for it too, so that it stays portable.
TARGETS = ("sm_80", *(arch for arch, _ in machine.KNOWN.values()))
SHARED = {"sm_80": 163 << 10, **dict(machine.KNOWN.values())}


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one variant takes on one target: registers of a thread, bytes spilled to memory, shared
    memory of a block, and the instructions found of those that it must have."""

    variant: str
    target: str
    registers: int
    spills: int
    shared: int
    found: tuple[str, ...]


def shared_of(variant: Variant) -> int:
    """Dynamic shared memory of a block."""
    return listing.shared_of(variant)


# --- compiling ----------------------------------------------------------------------------------


def with_nvcc(variant: Variant, arch: str) -> compiler.Compiled:
    """The same as :func:`compiler.compile_variant`, by nvcc."""
    root = sources.folder()
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        macros = [f"-D{name}={value}" for name, value in variant.macros]
        run = subprocess.run(
            ["nvcc", f"-std={compiler.STANDARD}", f"-arch={arch}", "-cubin", "-Xptxas", "-v",
             "-I", str(root), *macros, "-o", str(cubin), str(root / variant.program)],
            capture_output=True, text=True,
        )  # fmt: skip
        if run.returncode != 0:
            raise RuntimeError(f"nvcc does not compile {variant.name} for {arch}:\n{run.stderr}")
        return compiler.Compiled(cubin.read_bytes(), run.stderr)


def unavailable() -> str | None:
    """Why nothing can be compiled here, or None."""
    reason = compiler.missing()
    if reason is None or shutil.which("nvcc"):
        return None
    return f"{reason}, and there is no nvcc"


def compiled(variant: Variant, arch: str, nvcc: bool = False) -> compiler.Compiled:
    """By NVRTC, as where the kernels run, unless it is missing or nvcc is asked for."""
    if nvcc or compiler.missing() is not None:
        return with_nvcc(variant, arch)
    return compiler.compile_variant(variant, arch)


def compiler_name(nvcc: bool = False) -> str:
    if not nvcc and compiler.missing() is None:
        return f"NVRTC {compiler.version()}"
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", said)
    return f"nvcc {found[1] if found else ''}".strip()


# --- reading ------------------------------------------------------------------------------------


def disassembler() -> str | None:
    """nvdisasm: NVIDIA's, or the one that Triton brings."""
    found = shutil.which("nvdisasm")
    if found is None:
        spec = next((p for p in map(Path, sys.path) if (p / "triton").is_dir()), None)
        inside = spec and spec / "triton" / "backends" / "nvidia" / "bin" / "nvdisasm"
        found = str(inside) if inside and inside.exists() else None
    return found


def disassembled(code: bytes) -> str | None:
    """The machine code as text, or None where nothing reads it."""
    tool = disassembler()
    if tool is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(code)
        return subprocess.run(
            [tool, "-c", str(cubin)], check=True, capture_output=True, text=True
        ).stdout


def resources(variant: Variant, target: str, nvcc: bool = False) -> Resources:
    """Compile, and read what the assembler says of all kernels of the program: the most."""
    code, log = compiled(variant, target, nvcc)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    spilled = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log)
    if len(registers) < len(variant.entries) or len(spilled) < len(variant.entries):
        raise RuntimeError(f"the assembler's words are not known: {log}")
    static = [int(n) for n in re.findall(r"(\d+) bytes smem", log)]
    text = disassembled(code) if variant.matrix else None
    found = tuple(w for w in variant.matrix if text is None or re.search(rf"\b{w}", text))
    # Local arrays would be on the stack; there are none, so that it holds what is spilled only.
    stack = max(int(a) + int(b) for a, b in spilled)
    shared = shared_of(variant) + max(static, default=0)
    return Resources(variant.name, target, max(registers), stack, shared, found)


def problem(row: dict[str, Any], variant: Variant) -> str | None:
    """Why a variant may not be in the list, or None."""
    if "error" in row:
        return str(row["error"])
    if row["spills"]:
        return f"{row['spills']} bytes in local memory"
    if row["shared"] > SHARED[row["target"]]:
        return f"{row['shared']} bytes of shared memory, of {SHARED[row['target']]}"
    missing = [w for w in variant.matrix if w not in row["found"]]
    if missing:
        return f"its machine code has no {' and no '.join(missing)}"
    return None


# --- all of them --------------------------------------------------------------------------------


def bare(text: str) -> str:
    """A source without its comments and its layout, which change no machine code.

    >>> bare("int a;  // one\\n\\n/* two */ int  b;")
    'int a;\\nint b;'
    """
    text = re.sub(r"/\*.*?\*/|//[^\n]*", " ", text, flags=re.DOTALL)
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


@functools.cache
def program(path: str) -> str:
    """A program's text with all that it includes, bare."""
    root, seen = sources.folder(), {}

    def visit(name: str) -> None:
        if name not in seen:
            seen[name] = bare((root / name).read_text())
            for header in re.findall(r'#\s*include\s*"([^"]+)"', seen[name]):
                if (root / header).exists():  # else the emulator's, which a GPU does not see
                    visit(header)

    visit(path)
    return "\n".join(f"== {name}\n{text}" for name, text in sorted(seen.items()))


def key(variant: Variant, target: str, by: str) -> str:
    """All that its machine code depends on."""
    parts = (program(variant.program), variant.macros, variant.matrix, target, by)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def digest(variants: list[Variant]) -> str:
    """Of all programs and variants, but not of the compiler."""
    parts = [key(v, "", "") for v in variants]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def pairs(variants: list[Variant]) -> list[tuple[Variant, str]]:
    return [(v, t) for v in variants for t in TARGETS if v.is_for(t)]


def _one(variant: Variant, target: str, nvcc: bool) -> dict[str, Any]:
    try:
        return dataclasses.asdict(resources(variant, target, nvcc))
    except Exception as error:  # of one variant: the others are wanted too
        return {"variant": variant.name, "target": target, "error": str(error)}


def table(
    asked: list[tuple[Variant, str]], workers: int, seconds: float, nvcc: bool = False
) -> list[dict[str, Any]]:
    """The rows of these, from what earlier runs found where nothing changed. What is not there
    after so many seconds is left out, and the next run goes on."""
    by = compiler_name(nvcc)
    known = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    keys = {(v, t): key(v, t, by) for v, t in asked}
    left = [pair for pair in asked if keys[pair] not in known]
    until = time.monotonic() + seconds
    failed: dict[tuple[Variant, str], dict[str, Any]] = {}  # not kept: they are tried again
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:

        def work(pair: tuple[Variant, str]) -> tuple[tuple[Variant, str], dict[str, Any] | None]:
            return pair, None if time.monotonic() > until else _one(*pair, nvcc)

        for pair, row in pool.map(work, left):
            if row is None:
                continue
            if "error" in row:
                failed[pair] = row
            else:
                known[keys[pair]] = row
                KEPT.parent.mkdir(exist_ok=True)
                writing.write_json(KEPT, known)
            print(line(row), flush=True)
    rows = ((pair, failed.get(pair) or known.get(keys[pair])) for pair in asked)
    return [{**row, "variant": v.name, "target": t} for (v, t), row in rows if row is not None]


def line(row: dict[str, Any]) -> str:
    """A row of the table to read."""
    if "error" in row:
        return f"{row['variant']:<80} {row['target']:<7} {row['error']}"
    return (
        f"{row['variant']:<80} {row['target']:<7} {row['registers']:>4} registers"
        f" {row['spills']:>5} B spilled {row['shared']:>7} B shared {' '.join(row['found'])}"
    )


def page(rows: list[dict[str, Any]], variants: list[Variant], by: str) -> str:
    """All rows, as a page."""
    lines = [
        "# What the CUDA kernels take",
        "",
        "Every kernel that a launcher can ask for, compiled ahead of time: registers of a thread"
        " (r), shared memory of a block (K: KiB). None has local memory, so none spills. Kernels of"
        " the sweep have tensor-core products (HMMA) in their machine code, and, where rows are"
        " aligned (bulk=1), copies by the machine (UBLKCP); that of few features has exponentials"
        " by the special-function unit (MUFU.EX2). rows: 1 float32, 2 bfloat16, 3 float16,"
        " 4 uint8. Written by `make cubins`; no GPU was there. –: not for this target.",
        "",
        f"{by}, kernels {digest(variants)}.",
        "",
        "| kernel | " + " | ".join(TARGETS) + " |",
        "| --- |" + " --- |" * len(TARGETS),
    ]
    cells = {(row["variant"], row["target"]): row for row in rows}
    for variant in variants:
        found = []
        for target in TARGETS:
            row = cells.get((variant.name, target))
            found.append(f"{row['registers']} r, {row['shared'] / 1024:.1f} K" if row else "–")
        lines.append(f"| {variant.name} | {' | '.join(found)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.cubins", description=__doc__)
    parser.add_argument("words", nargs="*", help="only variants whose name has all these words")
    parser.add_argument("--target", action="append", choices=TARGETS)
    parser.add_argument("--nvcc", action="store_true", help="compile with nvcc")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop then; a later run goes on")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page of all")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    reason = unavailable()
    if reason is not None:
        sys.exit(reason)
    variants = listing.variants()
    asked = [
        (v, t) for v, t in pairs(variants)
        if set(args.words) <= set(v.name.split()) and t in (args.target or TARGETS)
    ]  # fmt: skip
    rows = table(asked, args.workers, args.seconds, args.nvcc)
    named = {v.name: v for v in variants}
    bad = [(row, problem(row, named[row["variant"]])) for row in rows]
    bad = [(row, said) for row, said in bad if said]
    for row, said in bad:
        print(f"{row['variant']} on {row['target']}: {said}", file=sys.stderr)
    if bad or len(rows) < len(asked):
        sys.exit(f"{len(rows)} of {len(asked)} are compiled, {len(bad)} are no good")
    print(f"{len(rows)} are compiled, and all are good")
    if args.markdown:
        args.markdown.write_text(page(rows, variants, compiler_name(args.nvcc)))


if __name__ == "__main__":
    main()
