"""`make gpu-check`: on a machine with a GPU the tests, then times beside the peers'; without one, a
line that says so, and every kernel compiled ahead of time.

Correctness comes first: each result is compared with float64 on the same device, and one that is
wrong is not timed. The table says so, and goes on; the exit status tells of ours. Times are medians
over rounds in which everything takes its turn, by the device's own clock, the L2 cache flushed
before each; the share of the roofline is a prediction of bench.roofline over the time, where the
device is one whose data sheet is there.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import memokern
from bench import peers, roofline
from bench.cases import queries
from memokern.backends.reference import dense as reference
from memokern.util import writing

ROOT = Path(__file__).resolve().parent.parent
NO_GPU = "There is no GPU here: the kernels are compiled ahead of time instead."
PEERS = ("cached", "naive", "compile", "sdpa", "flex", "keops")
FLUSH = 256 << 20  # bytes, more than any L2 cache
CHECKED = 4  # queries compared with float64
TOLERANCE = 1e-5  # of memokern's mean, relative to the largest true number
WRONG = 1e-2  # of a peer's: products in tf32, which PyTorch may choose, are right to 1e-3


class Said(NamedTuple):
    """What the tests did: pytest's exit status, its last line, and a line for each that failed."""

    status: int
    summary: str
    failures: list[str]


def _flex(rows: Tensor) -> peers.Mean:
    """flex_attention, which takes up to 256 features, with the norms as a change of the scores."""
    attention = importlib.import_module("torch.nn.attention.flex_attention").flex_attention
    half, run = rows.square().sum(1) / 2, torch.compile(attention)
    keys = rows[None, None]

    def mean(x: Tensor, s: float) -> Tensor:
        def change(score: Tensor, b: Tensor, h: Tensor, i: Tensor, n: Tensor) -> Tensor:
            return score - half[n] / s**2

        return run(x[None, None], keys, keys, score_mod=change, scale=1 / s**2)[0, 0]

    return mean


def runs_of(p: roofline.Problem) -> tuple[str, ...]:
    """The peers that such a problem is for: of float32 rows, since they know no other."""
    if p.dtype != torch.float32:
        return ()
    return tuple(
        name for name in PEERS
        if not (name == "flex" and p.d > 256) and not (name == "keops" and p.d > 100)
    )  # fmt: skip


def stored(p: roofline.Problem, device: torch.device) -> memokern.TrainingSet:
    """Rows of a type, on the device."""
    torch.manual_seed(0)
    if p.dtype == torch.uint8:
        rows = torch.randint(0, 256, (p.n, p.d), dtype=torch.uint8, device=device)
    else:
        rows = torch.randn(p.n, p.d, device=device).to(p.dtype)
    return memokern.TrainingSet(rows)


def clock(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """Seconds of a call, by events on a GPU's stream, with nothing of it in the L2 cache."""
    if device.type != "cuda":

        def by_the_wall(call: Callable[[], object]) -> float:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return by_the_wall
    flush = torch.empty(FLUSH, dtype=torch.uint8, device=device)

    def by_events(call: Callable[[], object]) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        first.record()
        call()
        last.record()
        torch.cuda.synchronize(device)
        return first.elapsed_time(last) / 1000

    return by_events


def peak(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call takes beyond what is there, at most at a time."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _error(got: Tensor, truth: Tensor) -> float:
    off = float((got[: len(truth)].double() - truth).abs().max() / truth.abs().max())
    return off if math.isfinite(off) else math.inf


def _truth(x: Tensor, data: memokern.TrainingSet, sigma: float) -> Tensor:
    """The mean of a few queries in float64, by the reference, on their device."""
    some = x[:CHECKED].double()
    one = torch.ones(len(some), dtype=torch.float64, device=x.device)
    return reference.posterior(
        some, data.rows, sigma * one, one, one, None, data.center, data.sq_norms, data.scale,
        data.shift, "gaussian",
    )[0]  # fmt: skip


def measure(p: roofline.Problem, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """A row for memokern and for each peer; "skipped" says why one was not timed."""
    torch._dynamo.reset()  # else what was compiled for another shape is compiled for any
    data = stored(p, device)
    values = data.dequantize(data.rows[: p.b]).float()
    sigma = math.sqrt(p.d) / 2
    x = queries(values, p.b, sigma).to(device)
    truth = _truth(x, data, sigma)
    calls: dict[str, Callable[[], Tensor]] = {"memokern": lambda: memokern.denoise(x, data, sigma)}
    lines: list[dict[str, Any]] = []
    for name in runs_of(p):
        try:
            mean = (peers.MEAN[name] if name != "flex" else _flex)(data.rows)
            calls[name] = lambda mean=mean: mean(x, sigma)  # type: ignore[misc]
            calls[name]()
        except Exception as error:  # a peer's failure is a finding, ours is not
            calls.pop(name, None)
            lines.append({"run": name, "skipped": peers.reason(error)})
    errors = {name: _error(call(), truth) for name, call in calls.items()}
    if not errors["memokern"] <= TOLERANCE:
        raise RuntimeError(f"an error of {errors['memokern']:.1e}; nothing was timed")
    for name in [name for name, error in errors.items() if not error <= WRONG]:
        del calls[name]
        lines.append({"run": name, "skipped": f"wrong: an error of {errors[name]:.1e}"})
    timed = clock(device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed(call))
    size = data.rows.numel() * data.rows.element_size()
    best = _roof(p, device)
    for name, call in calls.items():
        seconds = statistics.median(times[name])
        lines.append({
            "run": name, "seconds": seconds, "error": errors[name], "gb_s": size / seconds / 1e9,
            "tflop_s": 4 * p.b * p.n * p.d / seconds / 1e12, "peak": peak(call, device),
            "share": None if best is None or name != "memokern" else best / seconds,
        })  # fmt: skip
    return lines


def _roof(p: roofline.Problem, device: torch.device) -> float | None:
    """The predicted bound for this device, None where its data sheet is not there."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    gpu = next((g for g in roofline.GPUS if g.name in name), None)
    return None if gpu is None else p.on(gpu).seconds


def heading(result: dict[str, Any]) -> list[str]:
    """What the tests said, the device's name, and the first lines of the table."""
    return [
        f"Tests of the kernels: {result['tests']}.",
        "",
        *(f"- {line}" for line in result["failures"]),
        *([""] if result["failures"] else []),
        f"Measured on {result['device']}, torch {result['torch']}, Triton {result['triton']}.",
        "",
        "| operation | rows | run | ms | GB/s | TFLOP/s | of the roofline | peak MiB | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]


def lines_of(case: dict[str, Any]) -> list[str]:
    """A problem's lines of the table."""
    lines = []
    for row in case["runs"]:
        head = f"| {case['name']} | {case['rows']} | {row['run']} |"
        if "skipped" in row:
            lines.append(f"{head} {row['skipped'].replace('|', '/')} | | | | | |")
            continue
        share = "" if row["share"] is None else f"{row['share']:.0%}"
        lines.append(
            f"{head} {1000 * row['seconds']:.3g} | {row['gb_s']:.0f} | {row['tflop_s']:.1f} |"
            f" {share} | {row['peak'] / 2**20:.0f} | {row['error']:.1e} |"
        )
    return lines


def render(result: dict[str, Any]) -> str:
    """The page, in Markdown."""
    return "\n".join([*heading(result), *(s for case in result["cases"] for s in lines_of(case))])


def collect(
    problems: list[roofline.Problem], device: torch.device, rounds: int, said: Said,
    tell: Callable[[dict[str, Any]], object] = lambda result: None,
) -> dict[str, Any]:  # fmt: skip
    """All problems, each for itself: one of ours that fails has a line that says so. tell: is told
    what there is after each."""
    import triton

    on_gpu = device.type == "cuda"
    result: dict[str, Any] = {
        "tests": said.summary, "failures": said.failures, "wrong": 0,
        "device": torch.cuda.get_device_name(device) if on_gpu else "a CPU",
        "torch": torch.__version__, "triton": triton.__version__, "cases": [],
    }  # fmt: skip
    for p in problems:
        try:
            runs = measure(p, device, rounds)
        except Exception as error:  # the others are wanted too; the exit status tells of it
            runs = [{"run": "memokern", "skipped": f"FAILED: {peers.reason(error)}"}]
            result["wrong"] += 1
        result["cases"].append({
            "name": f"{p.operation} B={p.b} N={p.n:,} D={p.d}",
            "rows": str(p.dtype).removeprefix("torch."), "runs": runs,
        })  # fmt: skip
        tell(result)
    return result


def tested(tests: list[str]) -> Said:
    """Runs these tests, whose output is shown as it comes."""
    command = [sys.executable, "-u", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    failures, summary = [], "they printed nothing"
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            print(line, end="", flush=True)
            if line.startswith(("FAILED ", "ERROR ")):
                failures.append(line.strip())
            summary = line.strip("= \n") or summary
    return Said(run.returncode, summary, failures)


def check(rounds: int, out: Path, device: torch.device) -> int:
    """With a GPU: the tests, compiled; then times, whatever the tests said. A page with both is
    written anew after each problem. Returns the tests' status, or 1 where a result of ours is
    wrong."""

    def tell(result: dict[str, Any]) -> None:
        writing.write_json(out.with_suffix(".json"), result)
        writing.write_bytes(out, f"{render(result)}\n".encode())
        first = heading(result) if len(result["cases"]) == 1 else []
        print(*first, *lines_of(result["cases"][-1]), sep="\n", flush=True)

    said = tested(sorted(str(p) for p in (ROOT / "tests").glob("test_triton_*.py")))
    problems = [p for p in roofline.PROBLEMS if p.operation == "mean"]
    result = collect(problems, device, rounds, said, tell)
    return said.status or int(result["wrong"] > 0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-check.md")
    parser.add_argument("words", nargs="*", help="without a GPU: only kernels named with these")
    args = parser.parse_args()
    if torch.cuda.is_available():
        sys.exit(check(args.rounds, args.out, torch.device("cuda")))
    print(NO_GPU, flush=True)
    # Triton, which is imported here, may be interpreting.
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.aot", *args.words]
    sys.exit(subprocess.run(command, cwd=ROOT, env=env).returncode)


if __name__ == "__main__":
    main()
