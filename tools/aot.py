"""Every kernel compiled ahead of time, for machines that need not be there.

Registers and spills are read from the machine code, shared memory is the compiler's word; occupancy
is computed from them and from what a multiprocessor has. Needs Triton, and no GPU. Triton must not
be interpreting: run it as a process of its own, ``python -m tools.aot --help``.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memokern.backends.triton import variants as listing
from memokern.backends.triton.core.variant import Variant
from memokern.util import writing
from tools.resources import page


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine: what a block may use, and what a multiprocessor has for all of its blocks.

    Sources: the tuning guides and the table of technical specifications in NVIDIA's CUDA C++
    Programming Guide; AMD's CDNA 3 instruction set architecture.
    """

    name: str
    vendor: str
    arch: int | str
    warp: int
    matrix: str  # how its disassembler calls a product on the matrix cores
    shared: int  # bytes a block may use
    shared_all: int  # bytes of a multiprocessor
    warps: int  # that a multiprocessor holds
    blocks: int


KIB = 1024
KEPT = Path(__file__).resolve().parent.parent / "build" / "triton-resources.json"
TARGETS = {
    t.name: t
    for t in (
        Target("sm_80", "cuda", 80, 32, r"\bHMMA", 163 * KIB, 164 * KIB, 64, 32),
        Target("sm_90", "cuda", 90, 32, r"\bHGMMA|\bHMMA", 227 * KIB, 228 * KIB, 64, 32),
        Target("sm_100", "cuda", 100, 32, r"\bUTC\w*MMA|\bHMMA", 227 * KIB, 228 * KIB, 64, 32),
        Target("gfx942", "hip", "gfx942", 64, r"v_mfma", 64 * KIB, 64 * KIB, 32, 32),
    )
}


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one variant takes on one target. Registers are a thread's, shared memory a block's."""

    variant: str
    target: str
    registers: int
    spills: int
    shared: int
    occupancy: float
    matrix: str  # the first product on the matrix cores in its machine code, or ""


def _source(variant: Variant, target: Target) -> Any:
    from triton.compiler import ASTSource

    variant = variant.on(target.vendor)
    names, constant = variant.kernel.arg_names, variant.constexprs
    attrs = {name: [["tt.divisibility", 16]] for name in variant.aligned}
    if target.vendor == "hip":  # what Triton says there of every tensor below 2 GiB
        for name, kind in variant.signature.items():
            if kind.startswith("*"):
                attrs.setdefault(name, []).append(["tt.pointer_range", 32])
    return ASTSource(
        fn=variant.kernel,
        signature={n: "constexpr" if n in constant else variant.signature[n] for n in names},
        constexprs=constant,
        attrs={(names.index(name),): said for name, said in attrs.items()},
    )


def compiled(variant: Variant, target: Target) -> Any:
    """The variant's machine code."""
    import triton
    from triton.backends.compiler import GPUTarget

    where = GPUTarget(target.vendor, target.arch, target.warp)
    source, options = _source(variant, target), variant.options(target.vendor)
    return triton.compile(source, target=where, options=options)


def _key(variant: Variant, target: Target) -> str:
    """All that its machine code, and what is read from it, depend on."""
    import triton

    reading = (_source, compiled, resources, _of_cuda, _of_hip, occupancy)
    parts = (
        _source(variant, target).hash(), variant.options(target.vendor), variant.matrix, target,
        triton.__version__, *(inspect.getsource(step) for step in reading),
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def resources(variant: Variant, target: Target) -> Resources:
    """Compile, and read what the assembler says."""
    code = compiled(variant, target)
    read = _of_cuda if target.vendor == "cuda" else _of_hip
    registers, spills, text = read(code, variant.matrix)
    found = re.search(rf"(?:{target.matrix})[\w.]*", text)
    shared = int(code.metadata.shared)
    return Resources(
        variant.name, target.name, registers, spills, shared,
        occupancy(target, registers, shared, variant.num_warps), found[0] if found else "",
    )  # fmt: skip


def _of_cuda(code: Any, matrix: bool) -> tuple[int, int, str]:
    """From the machine code itself. Without arrays, a stack holds what is spilled only."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(code.asm["cubin"])

        def said(tool: str, *flags: str) -> str:
            return subprocess.run(
                [tool, *flags, str(cubin)], check=True, capture_output=True, text=True
            ).stdout

        usage = said(triton.knobs.nvidia.cuobjdump.path, "-res-usage")
        # Disassembling takes as long as compiling.
        text = said(triton.knobs.nvidia.nvdisasm.path, "-c") if matrix else ""
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), int(found[2]), text


def _of_hip(code: Any, matrix: bool) -> tuple[int, int, str]:
    text = code.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    # .vgpr_count is that of both register files, which are one on this machine. Scalar registers
    # spill into vector registers: only the private segment is memory.
    return field("vgpr_count"), field("private_segment_fixed_size"), text


def occupancy(target: Target, registers: int, shared: int, num_warps: int) -> float:
    """Warps that a multiprocessor holds at a time, as a share of those that it could."""
    if target.vendor == "hip":  # 512 registers a lane, in steps of 8, on each of 4 units
        waves = min(target.warps // 4, 512 // max(8, -(-registers // 8) * 8))
        by_registers = 4 * waves // num_warps
        reserved = 0
    else:  # 65,536 registers, given to a warp in steps of 256; a block takes 1 KiB for itself
        by_registers = 65536 // (max(1, -(-registers * 32 // 256)) * 256) // num_warps
        reserved = KIB
    by_shared = target.shared_all // (shared + reserved) if shared + reserved else target.blocks
    blocks = min(by_registers, by_shared, target.warps // num_warps, target.blocks)
    return blocks * num_warps / target.warps


def _one(name: str, target: str) -> dict[str, Any]:
    variant = next(v for v in listing.variants() if v.name == name)
    try:
        return dataclasses.asdict(resources(variant, TARGETS[target]))
    except Exception as error:  # of one variant: the others are wanted too
        return {"variant": name, "target": target, "error": f"{type(error).__name__}: {error}"}


def table(
    pairs: list[tuple[str, str]], workers: int, kept: Path | None = None,
    tell: Callable[[dict[str, Any]], object] = lambda row: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """The resources of these variants on these targets, by their names, as plain rows; a row has
    "error" where it does not compile. kept: a file of earlier results, added to. tell: is told each
    row as soon as it is there."""
    known: dict[str, Any] = {}
    if kept is not None and kept.exists():
        known = json.loads(kept.read_text())
    named = {v.name: v for v in listing.variants()}
    keys = {pair: _key(named[pair[0]], TARGETS[pair[1]]) for pair in pairs}

    def row(pair: tuple[str, str]) -> dict[str, Any]:
        # Variants of two names may be one kernel to the compiler.
        return {**known[keys[pair]], "variant": pair[0], "target": pair[1]}

    left = [pair for pair in pairs if keys[pair] not in known]
    for pair in pairs:
        if keys[pair] in known:
            tell(row(pair))
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        found = {pool.submit(_one, *pair): pair for pair in left}
        for done in concurrent.futures.as_completed(found):
            known[keys[found[done]]] = done.result()
            tell(row(found[done]))
            if kept is not None:
                kept.parent.mkdir(exist_ok=True)
                writing.write_json(kept, known)
    return [row(pair) for pair in pairs]


def line(row: dict[str, Any]) -> str:
    """A row of the table to read."""
    if "error" in row:
        return f"{row['variant']:<40} {row['target']:<7} {row['error']}"
    return (
        "{variant:<40} {target:<7} {registers:>4} registers {spills:>5} B spilled "
        "{shared:>7} B shared {occupancy:>6.1%} {matrix}".format(**row)
    )


def problem(row: dict[str, Any], chosen: list[Variant]) -> str | None:
    """Why a variant may not be in the list, or None."""
    target = TARGETS[row["target"]]
    wanted = next(v.matrix for v in chosen if v.name == row["variant"])
    if "error" in row:
        return str(row["error"])
    if row["spills"]:
        return f"{row['spills']} bytes spilled"
    if row["shared"] > target.shared:
        return f"{row['shared']} bytes of shared memory, where a block may use {target.shared}"
    if wanted and not row["matrix"]:
        return "its products are not on the matrix cores"
    tile = next(v.constexprs.get("BLOCK_B", 0) for v in chosen if v.name == row["variant"])
    if wanted and target.name == "sm_90" and tile >= 64 and "HGMMA" not in row["matrix"]:
        return "its products are not a warp group's, which take tiles of 64"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.aot", description=__doc__)
    parser.add_argument("words", nargs="*", help="only variants whose name has all these words")
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the page of all kernels"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.exit("Triton is interpreting, and then compiles nothing: unset TRITON_INTERPRET")
    chosen = [v for v in listing.variants() if all(w in v.name for w in args.words)]
    targets = args.target or list(TARGETS)
    pairs = [(v.name, t) for v in chosen for t in targets if v.is_for(t)]
    if args.json:
        print(json.dumps(table(pairs, args.workers, KEPT)))
        return
    rows = table(pairs, args.workers, KEPT, lambda row: print(line(row), flush=True))
    bad = [row for row in rows if problem(row, chosen)]
    for row in bad:
        print(f"{row['variant']} on {row['target']}: {problem(row, chosen)}", file=sys.stderr)
    if bad:
        sys.exit(f"{len(bad)} of {len(rows)} are no good")
    if args.markdown:
        import triton

        args.markdown.write_text(page(rows, chosen, triton.__version__))


if __name__ == "__main__":
    main()
