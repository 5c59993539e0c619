"""The demonstration: the 8 x 8 handwritten digits sampled three ways, and what became of them.

All three start from the same noise and run the same solver (exponential, 18 steps): not
regularised, Tikhonov, and empirical Bayes. The noise starts on the sphere of radius sigma_max
sqrt(D), where Gaussian noise of large D lives: at D = 64 its length still varies by 9 %, and
empirical Bayes, whose gate looks at exp(-|noise|^2/2), would freeze some samples at once.

What the figures can and cannot show: the closed-form score knows nothing but the training rows.
Tikhonov returns a training image plus noise of standard deviation sqrt(c). Empirical Bayes stops
where the density meets its floor, and the posterior mean there is a blend of several images.
Neither draws new digits as a trained network does.
"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path

import torch

import memokern
from memokern import Denoiser, TrainingSet, memorization, processes, regularizers, samplers
from memokern.apps import figures

SAMPLES = 64
STEPS = 18
TOLERANCE = 1e-2
RATIO = 1 / 3
# Both were chosen by experiment on these digits, whose nearest rows are 2.0 apart (median). With a
# smaller c, ratios below 1/3 appear (in a quarter of the samples at 0.01); with a larger one, noise
# hides the digit. With a higher tau, ever more images are blended; with a lower one, copies return.
TIKHONOV_C = 0.03
LOG_TAU = -28.5
SHOWN = 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What one way of sampling gave.

    Attributes:
        name, remark: for the table. file: the stem of the picture's name.
        shown: [S, 8, 8] float32, the images that are judged. raw: [S, 8, 8] float32, the solver's
            output, which is the same except for empirical Bayes.
        collapse, ratio: how many of `shown` are copies, by these criteria.
        seconds: of the solver, over `evaluations` score evaluations of S queries.
        rows: N, how many training images there are.
    """

    name: str
    file: str
    remark: str
    shown: torch.Tensor
    raw: torch.Tensor
    collapse: memorization.Memorization
    ratio: memorization.Memorization
    seconds: float
    evaluations: int
    rows: int

    @property
    def seconds_per_evaluation(self) -> float:
        """The time of one score evaluation of S queries."""
        return self.seconds / self.evaluations

    @property
    def pairs_per_second(self) -> float:
        """Query-row pairs per second, a speed that can be compared between sizes."""
        return len(self.raw) * self.rows / self.seconds_per_evaluation


def sphere_start(count: int, data: TrainingSet, sigma: float, seed: int) -> torch.Tensor:
    """[count, *shape] float32: noise of level sigma, scaled to its typical length sigma sqrt(D)."""
    noise = torch.randn(
        count, data.dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    noise *= sigma * math.sqrt(data.dim) / noise.norm(dim=1, keepdim=True)
    return noise.float().reshape(count, *data.shape)


def mean_at_floor(x: torch.Tensor, data: TrainingSet, log_tau: float) -> torch.Tensor:
    """The posterior mean of each x at the largest noise level whose evidence Z is at most tau:
    which is where empirical Bayes stopped.

    log Z grows with sigma (d log Z / d log sigma = -2 E_w[l] >= 0), so that bisection finds the
    level. A sample on a training point has Z >= 1 > tau at every level, and stays that point.
    """
    low = torch.full((len(x),), math.log(1e-4), dtype=torch.float64)
    high = torch.full((len(x),), math.log(1e3), dtype=torch.float64)
    for _ in range(40):
        middle = (low + high) / 2
        above = memokern.posterior(x, data, middle.exp()).log_z > log_tau
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return memokern.denoise(x, data, low.exp())


def run(count: int = SAMPLES, seed: int = 0, progress: bool = False) -> list[Result]:
    """Sample `count` digits in each of the three ways. All but the times is deterministic."""
    data = TrainingSet.digits()
    process = processes.EDM()
    start = sphere_start(count, data, process.sigma_max, seed)
    ways = (
        ("not regularised", "unregularised", None, "copies of training images"),
        (
            f"Tikhonov c={TIKHONOV_C:g}",
            "tikhonov",
            regularizers.Tikhonov(TIKHONOV_C),
            f"an image plus noise of std {math.sqrt(TIKHONOV_C):.2f}",
        ),
        (
            f"empirical Bayes log tau={LOG_TAU:g}",
            "empirical-bayes",
            regularizers.EmpiricalBayes(LOG_TAU),
            "blends; posterior mean where the flow stopped",
        ),
    )
    results = []
    with torch.no_grad():
        for name, file, regularizer, remark in ways:
            denoiser = Denoiser(data, process=process, regularizer=regularizer)
            # A first run, before the clock starts, fills the caches of the training set.
            samplers.ode(denoiser, start[:2], 2, solver="exponential")
            began = time.perf_counter()
            found = samplers.ode(denoiser, start, STEPS, solver="exponential", progress=progress)
            seconds = time.perf_counter() - began
            shown = mean_at_floor(found.x, data, LOG_TAU) if file == "empirical-bayes" else found.x
            # One search serves both criteria; the ratio needs the two nearest rows.
            criteria = memorization.report(shown, data, tol=TOLERANCE, threshold=RATIO, k=2)
            results.append(
                Result(
                    name=name,
                    file=file,
                    remark=remark,
                    shown=shown,
                    raw=found.x,
                    collapse=criteria["collapse"],
                    ratio=criteria["ratio"],
                    seconds=seconds,
                    evaluations=found.nfe,
                    rows=data.n,
                )
            )
    return results


def introduction(count: int) -> str:
    """What the demo is about to do."""
    data = TrainingSet.digits()
    return (
        f"{data.n} handwritten digits of {data.shape[0]} x {data.shape[1]} pixels; {count} "
        f"samples each way from the same noise, "
        f"EDM levels, exponential, {STEPS} steps"
    )


def render(results: list[Result]) -> str:
    """The table of results, and how to read it."""
    header = (
        "",
        "memorised",
        "(ratio)",
        "per score evaluation",
        "query-row pairs/s",
        "what the samples are",
    )
    lines = [
        (
            r.name,
            f"{float(r.collapse.fraction):.1%}",
            f"{float(r.ratio.fraction):.1%}",
            f"{1e3 * r.seconds_per_evaluation:.2f} ms",
            f"{r.pairs_per_second / 1e6:.1f} M",
            r.remark,
        )
        for r in results
    ]
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    table = "\n".join(
        "  ".join(
            cell.rjust(w) if 0 < i < 5 else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (header, *lines)
    )
    return (
        f"{table}\n\n"
        f"memorised: within {TOLERANCE:g} of a training image; ratio: nearer than {RATIO:.2f} of "
        f"the second nearest.\n"
        f"A score evaluation takes {len(results[0].raw)} queries through all {results[0].rows} "
        f"images. "
        "Regularising stops the copying; it does not\n"
        "make new digits: these scores know nothing but the training images, and the pictures "
        "show what is left of them."
    )


def write_pictures(results: list[Result], folder: Path) -> list[Path]:
    """One picture per way into an existing folder, each written whole or not at all."""
    data = TrainingSet.digits()
    paths = []
    for r in results:
        shown = r.shown[:SHOWN]
        memorised = (r.collapse.memorized | r.ratio.memorized)[:SHOWN]
        figure = figures.pairs(
            shown.numpy(),
            data.gather(r.collapse.index[:SHOWN]).numpy(),
            memorised.numpy(),
            limits=(-1.0, 1.0),
            title=f"{r.name}: {float(r.collapse.fraction):.0%} memorised "
            f"({float(r.ratio.fraction):.0%} by the ratio)",
        )
        paths.append(figures.save(figure, folder / f"{r.file}.png"))
    return paths
