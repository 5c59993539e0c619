"""`python -m bench.trajectories`: how exact whole trajectories are, for their evaluations and time.

All solvers start from the same noise on EDM's levels. The truth is Heun's method in many steps: a
sample is right if it ends at the same training image, and its error is the L2 distance between the
ends. Beside ours stands DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), written down here; RK45
is scipy's. An evaluation is one of all samples; "each" counts those that a sample took part in.

`--times` measures whole trajectories: 18 of Heun's steps, dense, pruned, and with the score of the
fastest peer, beside `--steps` of ours, which should be as many as have no less fidelity.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import memokern
from bench import machine, peers
from memokern import Denoiser, TrainingSet, processes, samplers
from memokern.util import writing

TRUTH = 160  # steps
STEPS = {
    "exponential": (6, 9, 12, 15, 18, 24, 30, 36),
    "Heun": (8, 10, 12, 14, 18, 24, 36, 50),
    "DPM-Solver++(2M)": (10, 14, 18, 26, 36, 50, 70),
}
TOLERANCES = (1e-2, 3e-3, 1e-3, 3e-4)  # of RK45
TARGET = 2.8  # times fewer evaluations than Heun's method at equal fidelity
ROUNDS = 3


class Counted(Denoiser):
    """A denoiser that counts its calls and the queries in them."""

    calls, queries = 0, 0

    def evaluate(self, x: Tensor, *asked: Any, **options: Any) -> Any:
        self.calls, self.queries = self.calls + 1, self.queries + len(x)
        return super().evaluate(x, *asked, **options)


def multistep(denoise: Callable[[Tensor, float], Tensor], x: Tensor, sigmas: list[float]) -> Tensor:
    """DPM-Solver++(2M) with alpha = 1, to sigmas[-1] = 0, where D is held."""
    old, length = None, 0.0
    for now, to in pairwise(sigmas):
        d = denoise(x, now)
        if to == 0:
            return d
        h = math.log(now / to)
        mean = d if old is None else d + h / (2 * length) * (d - old)
        x = to / now * x - math.expm1(-h) * mean
        old, length = d, h
    return x


def heun(denoise: Callable[[Tensor, float], Tensor], x: Tensor, sigmas: list[float]) -> Tensor:
    """Heun's method as people write it, for the peers' scores."""
    for now, to in pairwise(sigmas):
        slope = (x - denoise(x, now)) / now
        ahead = x + (to - now) * slope
        if to > 0:
            ahead = x + (to - now) / 2 * (slope + (ahead - denoise(ahead, to)) / to)
        x = ahead
    return x


def runs(start: Tensor) -> Iterator[tuple[str, str, Callable[[Denoiser], Tensor]]]:
    """(solver, its setting, its run)."""
    for n in STEPS["exponential"]:
        yield (
            "exponential",
            f"{n} steps",
            lambda d, n=n: samplers.ode(d, start, n, solver="exponential").x,
        )
    for n in STEPS["Heun"]:
        yield "Heun", f"{n} steps", lambda d, n=n: samplers.ode(d, start, n).x
    for n in STEPS["DPM-Solver++(2M)"]:
        sigmas = processes.EDM().times(n + 1).tolist()
        yield (
            "DPM-Solver++(2M)",
            f"{n} steps",
            lambda d, s=sigmas: multistep(lambda x, t: d.evaluate(x, t).x0, start, s),
        )
    for tol in TOLERANCES:
        yield (
            "RK45",
            f"rtol {tol:g}",
            lambda d, r=tol: samplers.ode(d, start, solver="rk45", rtol=r, atol=r).x,
        )


def fidelity(data: TrainingSet, count: int, seed: int) -> list[dict[str, Any]]:
    """Each solver's evaluations, share of right images, and mean L2 error."""
    start = processes.EDM().prior((count, *data.shape), torch.Generator().manual_seed(seed))
    truth = samplers.ode(Denoiser(data), start, TRUTH).x
    image = memokern.nearest(truth, data).index[:, 0]
    found = []
    for solver, setting, run in runs(start):
        counted = Counted(data)
        x = run(counted)
        error = (x - truth).flatten(1).norm(dim=1)
        same = memokern.nearest(x, data).index[:, 0] == image
        found.append({
            "solver": solver, "setting": setting, "evaluations": counted.calls,
            "each": counted.queries / count, "same": float(same.double().mean()),
            "error": float(error.mean()), "median": float(error.median()),
        })  # fmt: skip
        print(line(found[-1]), flush=True)
    return found


def line(entry: dict[str, Any]) -> str:
    """One run, to read."""
    return (
        f"{entry['solver']:17s} {entry['setting']:11s} evaluations {entry['evaluations']:3d}"
        f"  each {entry['each']:5.1f}  same image {entry['same']:.3f}  error {entry['error']:.3f}"
    )


def gains(found: list[dict[str, Any]], than: str, ours: str = "exponential") -> dict[str, float]:
    """For each run of another solver, how many times the evaluations it takes that our cheapest run
    of at least its fidelity does: both the same image as often, and no larger an error."""
    out = {}
    for other in found:
        if other["solver"] != than or other["same"] < 0.7:
            continue
        enough = [
            e["evaluations"] for e in found
            if e["solver"] == ours and e["same"] >= other["same"] and e["error"] <= other["error"]
        ]  # fmt: skip
        if enough:
            out[other["setting"]] = other["evaluations"] / min(enough)
    return out


def times(data: TrainingSet, count: int, seed: int, steps: int) -> dict[str, float]:
    """Seconds of whole trajectories, 18 of Heun's steps and so many of ours: the best of a few, in
    turns."""
    start = processes.EDM().prior((count, *data.shape), torch.Generator().manual_seed(seed))
    ways: dict[str, Callable[[], object]] = {}
    for method in ("dense", "auto"):
        if method == "auto" and data.index is None:
            continue
        name = "dense" if method == "dense" else "pruned where it pays"
        d = Denoiser(data, method=method)
        ways[f"Heun, {name}"] = lambda d=d: samplers.ode(d, start, 18)
        ways[f"exponential, {name}"] = lambda d=d: samplers.ode(
            d, start, steps, solver="exponential"
        )
    rows = data.gather(torch.arange(data.n)).flatten(1).float()
    sdpa, sigmas = peers.MEAN["sdpa"](rows), processes.EDM().times(19).tolist()
    ways["Heun, PyTorch's attention (sdpa)"] = lambda: heun(sdpa, start.flatten(1), sigmas)
    out = dict.fromkeys(ways, math.inf)
    for turn in range(ROUNDS + 1):  # the first is not counted: what is kept of the rows is made
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if turn > 0:
                out[name] = min(out[name], time.perf_counter() - began)
    for name, seconds in out.items():
        print(f"{name:40s} {1e3 * seconds:8.0f} ms", flush=True)
    return out


def draw(found: list[dict[str, Any]], name: str, out: Path) -> None:
    """Both measures of fidelity against the evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4), layout="constrained")
    for solver, style in zip(
        ("exponential", "Heun", "DPM-Solver++(2M)", "RK45"), ("o-", "s-", "d-", "^-"), strict=True
    ):
        mine = [e for e in found if e["solver"] == solver]
        x = [e["evaluations"] for e in mine]
        left.plot(x, [max(e["error"], 1e-3) for e in mine], style, ms=4)
        right.plot(x, [e["same"] for e in mine], style, ms=4, label=solver)
    left.set(xscale="log", yscale="log", xlabel="evaluations", ylabel="mean L2 error of the end")
    right.set(xscale="log", xlabel="evaluations", ylabel="share at the right image")
    right.legend(frameon=False)
    figure.suptitle(name, fontsize=9)
    figure.savefig(out, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench.trajectories", description=__doc__)
    parser.add_argument("--data", help="a file of rows (.npy, .npz, .safetensors); else the digits")
    parser.add_argument("--key", help="which array of the file")
    parser.add_argument("--rows", type=int, help="so many of them, from the first")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--times", action="store_true", help="times instead of fidelity")
    parser.add_argument("--steps", type=int, default=18, help="of ours, with --times")
    parser.add_argument("--json", type=Path, help="write the figures")
    parser.add_argument("--plot", type=Path, help="draw them")
    asked = parser.parse_args()
    data = TrainingSet(asked.data, key=asked.key) if asked.data else TrainingSet.digits()
    if asked.rows:
        data = TrainingSet(data.rows[: asked.rows].reshape(-1, *data.shape))
    if data.dim > 16:
        data.build_index(progress=False)
    print(f"{data!r}; {asked.samples} samples; {machine.describe()}", flush=True)
    if asked.times:
        result: Any = times(data, asked.samples, asked.seed, asked.steps)
    else:
        result = fidelity(data, asked.samples, asked.seed)
        for than in ("Heun", "DPM-Solver++(2M)", "RK45"):
            said = ", ".join(f"{k} {v:.1f}x" for k, v in gains(result, than).items())
            print(f"fewer evaluations than {than} at no less fidelity: {said}")
        print(f"target: {TARGET:g}x fewer than Heun")
        if asked.plot:
            draw(result, f"{data.n} rows {list(data.shape)}, {asked.samples} samples", asked.plot)
    if asked.json:
        writing.write_json(asked.json, {"machine": machine.describe(), "figures": result})
    return 0


if __name__ == "__main__":
    sys.exit(main())
