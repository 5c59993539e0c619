"""What the inner loops of the CPU kernels take, counted by a simulator: nothing here was timed.

The loops are found in the objects of a build, by function: of the straight-line loops with the most
multiply-adds, the shortest. LLVM's llvm-mca runs each as if all loads hit L1 and no branch was
mispredicted, by its model of a processor: which units can run an instruction, and how long. A loop
is bound by the units that are busy in 95 % of its cycles; else by the width of dispatch, if that
is; else by waiting, for a result or for a unit that another instruction was given.

    python -m tools.cycles                                  # the table
    python -m tools.cycles --mca llvm-mca-22 --markdown docs/performance.md
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from tools import marks

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- cycles: begin -->", "<!-- cycles: end -->"
ITERATIONS = 1000
FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:\n((?: .*\n)*)", re.MULTILINE)
MULTIPLY = re.compile(r"vfn?m(add|sub)\d+ps|(\{vex\} )?vpdpwssd|vpmaddwd")
# Packing and weights are cycles of a row as measured with AVX2 (docs/performance.md).
QUERIES, FEATURES, PACKING, WEIGHTS = 64, 3072, 760, 250
# Floats, or pairs of 16-bit integers, of a vector.
LANES = {"avx2": 8, "avx2 with VNNI": 8, "avx512": 16}
FIRST, SECOND = "first product, floats", "second product, floats"
INTEGERS, SCAN, WEIGH = "first product, integers", "scan, level 0", "exponentials and weights"
# The functions that they are in; blocks are 6 x 2 vectors with AVX2, 12 x 2 with AVX-512. SUMS is
# what add products of integers up: without VNNI in two instructions.
SUMS = {"avx2": "Plain", "avx2 with VNNI": "Vnni", "avx512": "Vnni"}
KERNELS = {
    FIRST: r"\bmicro_kernel<float, \d+, 2, 1, \d+>",
    SECOND: r"\bpacked_accumulate<float>",
    INTEGERS: r"\bPairQueries<float>::block<[\w:]*\bSUMS, \d+, 2>",
    SCAN: r"\bscan_block<\d+, 2>",
    WEIGH: r"::sweep<float>",
}


class Cpu(NamedTuple):
    """units: vectors that are multiplied and added in a cycle, by the maker's count."""

    name: str
    mcpu: str
    isa: str
    units: int


CPUS = [
    Cpu("Zen 3", "znver3", "avx2", 2),
    Cpu("Alder Lake, P cores", "alderlake", "avx2 with VNNI", 2),
    Cpu("Cascade Lake", "cascadelake", "avx512", 2),
    Cpu("Ice Lake", "icelake-server", "avx512", 2),
    Cpu("Sapphire Rapids", "sapphirerapids", "avx512", 2),
    Cpu("Granite Rapids", "graniterapids", "avx512", 2),
    Cpu("Zen 4", "znver4", "avx512", 1),
    Cpu("Zen 5", "znver5", "avx512", 2),
]


def run(*command: str, text: str | None = None) -> str:
    if shutil.which(command[0]) is None:
        raise SystemExit(f"There is no {command[0]}: objdump is in binutils, llvm-mca in LLVM.")
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def disassembly(isa: str, build: Path) -> str:
    """Of the newest object for an instruction set."""
    name = f"{isa.split()[0]}.o"
    found = sorted(build.glob(f"temp*/csrc/cpu/isa/{name}"), key=lambda p: p.stat().st_mtime)
    if not found:
        how = "On x86-64 `python setup.py build_ext --inplace` makes it."
        raise SystemExit(f"There is no {name} in {build}/temp*/csrc/cpu/isa. {how}")
    return run("objdump", "-d", "-C", "--no-show-raw-insn", str(found[-1]))


def straight_loops(code: str) -> Iterator[list[str]]:
    """Bodies with one jump, the last instruction, to the first; ready to be assembled."""
    lines = re.findall(r"^ *([0-9a-f]+):\t(.*?) *$", code, re.MULTILINE)
    index = {at: i for i, (at, _) in enumerate(lines)}
    for last, (_, instruction) in enumerate(lines):
        jump = re.match(r"(j[a-z]+) +([0-9a-f]+) ", instruction)
        first = index.get(jump[2], last + 1) if jump else last + 1
        body = [re.sub(r" *[#<].*", "", text) for _, text in lines[first:last]]
        if jump and first <= last and not any(re.match("j|call|ret", text) for text in body):
            yield [*body, f"{jump[1]} loop"]


def multiplies(loop: list[str]) -> int:
    return sum(bool(MULTIPLY.match(text)) for text in loop)


def find(kernel: str, isa: str, listing: str) -> list[str]:
    """The loop of a kernel for an instruction set, in what objdump wrote."""
    wanted = KERNELS[kernel].replace("SUMS", SUMS[isa])
    code = [text for name, text in FUNCTION.findall(listing) if re.search(wanted, name)]
    loops = [loop for text in code for loop in straight_loops(text) if multiplies(loop)]
    if not loops:
        raise SystemExit(f"No loop with multiply-adds in {wanted}: was it optimised?")
    return max(loops, key=lambda loop: (multiplies(loop), -len(loop)))


class Count(NamedTuple):
    """Of an iteration. units: how many instructions that multiply can run in a cycle."""

    cycles: float
    multiplies: int
    units: float
    bound: str
    model: str


def simulate(loop: list[str], mcpu: str, mca: str) -> Count:
    options = [f"-mcpu={mcpu}", f"-iterations={ITERATIONS}", "-json"]
    report: Any = json.loads(run(mca, *options, text="\n".join(["loop:", *loop, ""])))
    names, region = report["TargetInfo"]["Resources"], report["CodeRegions"][0]
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    model = "".join(letters[0] for letters in alike).removesuffix("Port")
    used = {
        names[x["ResourceIndex"]].removeprefix(model): x["ResourceUsage"]
        for x in region["ResourcePressureView"]["ResourcePressureInfo"]
        if x["InstructionIndex"] == len(loop)  # the sum over them
    }
    each = zip(region["InstructionInfoView"]["InstructionList"], loop, strict=True)
    rates = [1 / x["RThroughput"] for x, text in each if MULTIPLY.match(text)]
    summary = region["SummaryView"]
    cycles, uops = summary["TotalCycles"] / ITERATIONS, summary["TotaluOps"] / ITERATIONS
    full = ", ".join(sorted(name for name, busy in used.items() if busy >= 0.95 * cycles))
    bound = full or ("dispatch" if uops / summary["DispatchWidth"] >= 0.95 * cycles else "waiting")
    return Count(cycles, len(rates), max(rates), bound, model)


def column(cpu: Cpu, counts: dict[str, Count]) -> dict[str, str]:
    """What is found for a processor."""
    floats, pairs = counts[FIRST].units, counts[INTEGERS].units
    cells = {"vectors a cycle: floats, pairs (maker)": f"{floats:g}, {pairs:g} ({cpu.units})"}
    row = {}  # cycles for a row
    for kernel, count in counts.items():
        lanes = LANES[cpu.isa] * (2 if kernel == INTEGERS else 1)
        rate = lanes * count.multiplies / count.cycles
        cells[kernel] = f"{count.cycles:.1f}; {rate:.1f} ({count.bound})"
        row[kernel] = QUERIES * FEATURES / rate
    rest, first, second = PACKING + WEIGHTS, row[FIRST], row[SECOND]
    peak = 2 * QUERIES * FEATURES / floats / LANES[cpu.isa]
    cells["products in floats, share of the peak"] = f"{peak / (first + second):.2f}"
    alone, few, all_rows = ((first + x) / (row[INTEGERS] + x) for x in (0, rest, second + rest))
    known = floats == pairs
    cells["first product, floats / integers"] = f"{alone:.2f}" if known else "–"
    cells["sweep, the same"] = f"{all_rows:.2f} to {few:.2f}" if known else "–"
    return cells


def table(mca: str, build: Path) -> str:
    version = run(mca, "--version").partition("LLVM version ")[2].split()[0]
    known = subprocess.run([mca, "-mcpu=help"], input="", capture_output=True, text=True).stderr
    listings = {isa: disassembly(isa, build) for isa in LANES}
    loops = {isa: {k: find(k, isa, text) for k in KERNELS} for isa, text in listings.items()}
    columns: dict[str, dict[str, str]] = {}
    models: dict[str, str] = {}
    others = []
    for cpu in CPUS:
        if f" {cpu.mcpu} " not in known:
            others.append(f"{cpu.name} (unknown)")
            continue
        counts = {k: simulate(loop, cpu.mcpu, mca) for k, loop in loops[cpu.isa].items()}
        model = counts[FIRST].model
        if model in models:
            others.append(f"{cpu.name} (taken for {models[model]})")
            continue
        models[model], columns[f"{cpu.name}, {cpu.isa}"] = cpu.name, column(cpu, counts)
    lines = [
        f"Simulated by llvm-mca {version}, never timed, with all loads in L1. Of a loop: cycles of"
        " an iteration; multiply-adds a cycle; what binds it. Without a model of their own:"
        f" {', '.join(others) or 'none'}. –: the model is wrong about one of the two (below). The"
        f" sweep is of {QUERIES} queries and {FEATURES} features, with {PACKING + WEIGHTS} cycles a"
        " row for packing and weights, as measured with AVX2; first where all rows have weight,"
        " then where so few have that there is no second product. Written by `python -m"
        " tools.cycles --markdown docs/performance.md`.",
        "",
        "| | " + " | ".join(columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for name in next(iter(columns.values()), ()):
        lines.append(f"| {name} | {' | '.join(cells[name] for cells in columns.values())} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tools.cycles", description=__doc__)
    parser.add_argument("--mca", default="llvm-mca", help="the simulator, by name or path")
    parser.add_argument("--build", type=Path, default=ROOT / "build", help="where objects lie")
    marks.write_or_print(parser, lambda args: table(args.mca, args.build), BEGIN, END)
