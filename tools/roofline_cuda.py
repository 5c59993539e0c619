"""What the CUDA sweep and Triton's would take for wide rows, side by side: predicted, never
measured.

Two figures each. The floor: the launches' bytes over the device memory's rate, or their products
over the tensor cores', whichever is longer, as :mod:`tools.roofline` has them. And with overheads:
for Triton the floor and what it costs to start its launches; for CUDA the count of
:mod:`memokern.backends.cuda.posterior.costs`, in which a tile also waits for shared memory, and for
the barriers of its cluster.

    python -m tools.roofline_cuda                          # the table
    python -m tools.roofline_cuda --markdown docs/cuda.md
"""

from __future__ import annotations

import argparse
import itertools
from typing import NamedTuple

import torch

from memokern.backends.cuda.core.machine import Machine
from memokern.backends.cuda.core.variant import ROW_CODES
from memokern.backends.cuda.posterior import costs, planner
from memokern.backends.cuda.posterior.tiles import Tile, size_of
from tools import marks, roofline

BEGIN, END = "<!-- cuda roofline: begin -->", "<!-- cuda roofline: end -->"
GPU = next(gpu for gpu in roofline.GPUS if gpu.name == "H200")
MACHINE = Machine("sm_90a", GPU.multiprocessors, 227 << 10, GPU.l2)
RATES = costs.RATES["sm_90a"]._replace(memory=GPU.memory)
SIZES = ((50_000, 3072), (50_000, 12_288), (1_281_167, 3072), (1_281_167, 12_288))


class Prediction(NamedTuple):
    """Of one problem: launches, bytes of device memory, seconds at least, and with overheads."""

    launches: int
    bytes: float
    floor: float
    seconds: float


def cuda(b: int, n: int, d: int, rows: torch.dtype) -> tuple[Tile, Prediction]:
    """By the tile that the planner takes, whether or not the backend would refuse the call."""
    tile = planner.plan(b, n, d, rows, MACHINE)
    assert tile is not None
    sweeps = -(-b // tile.queries)
    moved = sweeps * (float(n) * d * size_of(rows) + costs.part_bytes(tile, n, MACHINE))
    work = 2.0 * sweeps * tile.queries * n * d * sum(costs.products(rows)) / RATES.warp
    seconds = costs.sweep_seconds(rows, tile, b, n, MACHINE, RATES)
    return tile, Prediction(3 * sweeps, moved, max(moved / RATES.memory, work), seconds)


def triton(b: int, n: int, d: int, rows: torch.dtype) -> Prediction:
    """By its own launchers. The rows are read once, and once more where a chunk does not stay in
    the L2 cache."""
    problem = roofline.Problem("mean", b, n, d, rows)
    found = problem.on(GPU)
    with roofline.launches_on(GPU) as launches:
        problem.launch()
    kernels = [(roofline.COSTS.get(roofline.kernel_name(x.variant)), x) for x in launches]
    moved = sum(cost(x, GPU).bytes for cost, x in kernels if cost is not None)
    seconds = found.seconds + found.launches * costs.LAUNCH
    return Prediction(found.launches, moved, found.seconds, seconds)


def table() -> str:
    """All problems on an H200."""
    ms = roofline.milliseconds
    lines = [
        f"Predicted for an H200, never measured: {GPU.memory / 1e12:g} TB/s, 989 TFLOP/s by warp"
        f" groups and {RATES.warp / 1e12:.0f} by warps. Floor: milliseconds at least. With"
        f" overheads: {1e6 * costs.LAUNCH:g} us for each launch; in CUDA also what tiles wait for"
        f" in shared memory, and {1e6 * costs.TILE:g} us of barriers for each. Share: the rows'"
        " bytes over the time with overheads, of the memory's rate. Runs: who is asked first."
        " Written by `python -m tools.roofline_cuda --markdown docs/cuda.md`.",
        "",
        "| queries | rows | D | type | CUDA launches | MB | floor | with overheads | share |"
        " Triton launches | MB | floor | with overheads | runs |",
        "| --- |" + " --- |" * 13,
    ]
    for (n, d), b, rows in itertools.product(SIZES, (1, 8, 16, 64), ROW_CODES):
        _, here = cuda(b, n, d, rows)
        there = triton(b, n, d, rows)
        share = n * d * size_of(rows) / here.seconds / GPU.memory
        runs = "Triton" if planner.refuses(b, n, d, rows, MACHINE) else "CUDA"
        name = str(rows).removeprefix("torch.")
        lines.append(
            f"| {b} | {n:,} | {d} | {name} | {here.launches} | {here.bytes / 1e6:,.0f} |"
            f" {ms(here.floor)} | {ms(here.seconds)} | {share:.0%} | {there.launches} |"
            f" {there.bytes / 1e6:,.0f} | {ms(there.floor)} | {ms(there.seconds)} | {runs} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tools.roofline_cuda", description=__doc__)
    marks.write_or_print(parser, lambda _: table(), BEGIN, END)
