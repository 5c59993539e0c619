"""What the Triton kernels would take at best, predicted: nothing here was measured on a GPU.

The launchers are asked for a problem of given size with a GPU's multiprocessors and L2 cache, as
they would be on it, and their launches are written down instead of made. Each launch takes at least
the time that its products need at the tensor cores' rate and its bytes at the device memory's, both
from the data sheet; a problem takes the sum over its launches, without what it costs to make them.
So a prediction is a bound from below: no kernel reaches either rate.

    python -m tools.roofline                          # the table
    python -m tools.roofline --markdown docs/triton.md
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench import report
from memokern.backends.triton import BACKEND
from memokern.backends.triton.core import machine
from memokern.backends.triton.core.machine import Machine
from memokern.backends.triton.core.operands import operand_of
from memokern.backends.triton.core.variant import Variant
from memokern.calls import Query, Rows
from tools import marks

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- roofline: begin -->", "<!-- roofline: end -->"


class Gpu(NamedTuple):
    """From the data sheets, dense, in operations and bytes per second: NVIDIA A100 80 GB SXM, H100
    SXM, H200 SXM, HGX B200."""

    name: str
    multiprocessors: int
    l2: int
    memory: float
    rates: dict[str, float]


def _rates(half: float, tf32: float, fp32: float, fp64: float) -> dict[str, float]:
    return {"half": half * 1e12, "tf32": tf32 * 1e12, "fp32": fp32 * 1e12, "fp64": fp64 * 1e12}


HOPPER = _rates(989, 494, 67, 34)
GPUS = [
    Gpu("A100", 108, 40 << 20, 2.04e12, _rates(312, 156, 19.5, 9.7)),
    Gpu("H100", 132, 50 << 20, 3.35e12, HOPPER),
    Gpu("H200", 132, 50 << 20, 4.8e12, HOPPER),
    Gpu("B200", 148, 126 << 20, 8.0e12, _rates(2250, 1100, 80, 40)),
]


class Cost(NamedTuple):
    """Of a launch: operations at a rate, and bytes of device memory."""

    rate: str
    operations: float
    bytes: float

    def seconds(self, gpu: Gpu) -> float:
        return max(self.operations / gpu.rates[self.rate], self.bytes / gpu.memory)


class Launch(NamedTuple):
    variant: Variant
    grid: tuple[int, ...]
    args: dict[str, Any]


def _product(launch: Launch, size: float, second: bool = False) -> tuple[str, float]:
    """The rate of a product with the rows, and its operations; size: of one plain product."""
    rows, how = launch.args["rows"].dtype, launch.variant.constexprs
    if rows == torch.float32:
        return ("tf32", 3 * size) if how["PRECISION"] == "tf32x3" else ("fp32", size)
    # Weights are two terms, queries as many as the type needs.
    return "half", (2 if second else operand_of(rows, "tf32x3").terms) * size


def _rows(launch: Launch, n: int) -> float:
    return float(n * launch.args["D"] * launch.args["rows"].element_size())


def _sweep(launch: Launch, gpu: Gpu) -> Cost:
    """Both products; the rows from memory once, since all queries pass a part at the same time; and
    the parts' sums, written and read again."""
    b, n, d = (launch.args[name] for name in ("B", "N", "D"))
    rate, first = _product(launch, 2.0 * b * n * d)
    parts = 8.0 * (launch.grid[0] // -(-b // launch.variant.constexprs["BLOCK_B"])) * b * d
    return Cost(rate, first + _product(launch, 2.0 * b * n * d, True)[1], _rows(launch, n) + parts)


def _dots(launch: Launch, gpu: Gpu) -> Cost:
    b, n, d = (launch.args[name] for name in ("b", "n", "D"))
    return Cost(*_product(launch, 2.0 * b * n * d), _rows(launch, n))


def _accumulate(launch: Launch, gpu: Gpu) -> Cost:
    """The rows are in the L2 cache, if the chunk fits."""
    b, n, d = (launch.args[name] for name in ("b", "n", "D"))
    size = _rows(launch, n)
    return Cost(*_product(launch, 2.0 * b * n * d, True), 0.0 if size <= gpu.l2 else size)


def _groups(launch: Launch, gpu: Gpu) -> Cost:
    b, n, d = (launch.args[name] for name in ("B", "N", "D"))
    return Cost("tf32", 6.0 * b * n * d, _rows(launch, n) + 4.0 * launch.args["least"].numel())


def _exact(launch: Launch, gpu: Gpu) -> Cost:
    """As many groups of rows for each query as neighbours: the bounds rule out the others."""
    b, d, rows = len(launch.args["x"]), launch.args["D"], 64 * launch.args["k"]
    return Cost("fp64", 3.0 * b * rows * d, _rows(launch, rows * b))


def _pairs(launch: Launch, gpu: Gpu) -> Cost:
    m, d = launch.args["M"], launch.args["D"]
    return Cost("fp64", 3.0 * m * d, _rows(launch, m))


def _sum(launch: Launch, gpu: Gpu) -> Cost:
    m, d = launch.args["w"].numel(), launch.args["D"]
    return Cost("fp64", 2.0 * m * d, _rows(launch, m))


# Kernels that are not here pass over a few numbers of each query, or over what is in the L2 cache.
COSTS: dict[str, Callable[[Launch, Gpu], Cost]] = {
    "sweep_kernel": _sweep,
    "dot_products_kernel": _dots,
    "accumulate_kernel": _accumulate,
    "nearest_groups_kernel": _groups,
    "nearest_exact_kernel": _exact,
    "pairs_kernel": _pairs,
    "listed_sum_kernel": _sum,
}


def kernel_name(variant: Variant) -> str:
    return str(variant.kernel.fn.__name__)


@contextlib.contextmanager
def launches_on(gpu: Gpu) -> Iterator[list[Launch]]:
    """What is launched inside, as it would be on this GPU; nothing runs."""
    found: list[Launch] = []

    def write_down(self: Variant, grid: tuple[int, ...], device: torch.device, **args: Any) -> None:
        found.append(Launch(self, grid, args))

    with (
        mock.patch.object(Variant, "launch", write_down),
        mock.patch.object(machine, "of", lambda _: Machine(gpu.multiprocessors, gpu.l2)),
    ):
        yield found


class Prediction(NamedTuple):
    """seconds: at least. memory: the share of it in launches that wait for memory."""

    seconds: float
    memory: float
    launches: int


class Problem(NamedTuple):
    """An operation on b queries and n rows of d numbers of a type."""

    operation: str  # mean | nearest
    b: int
    n: int
    d: int
    dtype: torch.dtype

    def launch(self) -> None:
        """Through the launchers, on rows that take no memory."""
        one = torch.ones(self.b, dtype=torch.float64)
        data = torch.zeros(1, self.d, dtype=self.dtype).expand(self.n, self.d)
        rows = Rows(data, center=torch.zeros(self.d), sq_norms=one.new_ones(self.n))
        x = torch.zeros(self.b, self.d)
        if self.operation == "nearest":
            BACKEND.nearest(x, rows, 1)
        else:
            BACKEND.posterior(Query(x, one, one, one), rows)

    def on(self, gpu: Gpu) -> Prediction:
        with launches_on(gpu) as found:
            self.launch()
        known = [x for x in found if kernel_name(x.variant) in COSTS]
        costs = [COSTS[kernel_name(x.variant)](x, gpu) for x in known]
        seconds = sum(cost.seconds(gpu) for cost in costs)
        waits = (c.seconds(gpu) for c in costs if c.bytes / gpu.memory == c.seconds(gpu))
        return Prediction(seconds, sum(waits) / seconds, len(found))


F32, BF16, U8 = torch.float32, torch.bfloat16, torch.uint8
PROBLEMS = [
    *(Problem("mean", b, 50_000, 3072, t) for b in (1, 8, 64, 256) for t in (F32, BF16, U8)),
    *(Problem("mean", 4096, 50_000, d, F32) for d in (16, 64)),
    *(Problem("mean", b, 50_000, 256, t) for b in (1, 64, 4096) for t in (F32, BF16)),
    *(Problem("mean", b, 1_281_167, 12_288, U8) for b in (1, 64)),
    Problem("nearest", 64, 50_000, 3072, F32),
]


def measured_on_a_cpu(page: str) -> dict[str, tuple[float, str]]:
    """The figures of a page, by the names of their cases, and what they were measured on."""
    machine = re.search(r"Measured on ([^,]+), (\d+) threads", page)
    where = f"{machine[1]}, {machine[2]} threads" if machine else ""
    rows = re.findall(r"^\| (mean [^|]+?) \| ([\d.]+) \|", page, re.MULTILINE)
    # The first of a name: the table of memory, further down, has the same cases.
    return {name: (float(ms), where) for name, ms in reversed(rows)}


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g}"


def table() -> str:
    """All problems, with what a CPU was measured to take beside."""
    cpu = measured_on_a_cpu(report.PAGE.read_text())
    where = next((w for _, w in cpu.values()), "")
    lines = [
        "Predicted, never measured: milliseconds at least, from data sheets, without exponentials"
        " and the cost of launches. In brackets: how much of it waits for memory. Beside them what"
        f" the CPU kernels were measured to take ({where}; docs/performance.md). Written by"
        " `python -m tools.roofline --markdown docs/triton.md`.",
        "",
        "| operation | rows | "
        + " | ".join(g.name for g in GPUS)
        + " | launches (H100) | CPU, measured |",
        "| --- | --- |" + " --- |" * (len(GPUS) + 2),
    ]
    for p in PROBLEMS:
        found = [p.on(gpu) for gpu in GPUS]
        figures = " | ".join(f"{milliseconds(f.seconds)} ({f.memory:.0%})" for f in found)
        name = f"{p.operation} B={p.b} D={p.d}"
        known = p.dtype == F32 and p.n == 50_000 and name in cpu
        beside = f"{cpu[name][0]:g}" if known else ""
        kind = str(p.dtype).removeprefix("torch.")
        lines.append(f"| {name} N={p.n:,} | {kind} | {figures} | {found[1].launches} | {beside} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tools.roofline", description=__doc__)
    marks.write_or_print(parser, lambda _: table(), BEGIN, END)
