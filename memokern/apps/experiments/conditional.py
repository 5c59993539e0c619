"""Conditions: how many rows a conditional empirical measure rests on, and how much variance it has.

The minimiser of a conditional denoising loss with a kernel of bandwidth h weighs row n by
p_n(c) ~ exp(-|c - c_n|^2 / (2 h^2)). Its flow ends at sum_n p_n(c) delta_{y_n}: n_eff = 1 / sum p^2
rows share the weight, and the law has the covariance Cov_h of the rows under p(c). As h goes to 0
one row is left, n_eff = 1 and tr Cov_h = 0: a conditional model memorises more than an
unconditional one.

Two problems: linear-Gaussian in the plane, where c is one coordinate with noise, and inpainting,
where c is the left half of an image: of digits, and of the images in a file where one is given. The
published values (KhoiTrant68/cfm-collapse; inpainting of CIFAR-10) are drawn beside them as a guide
to trend and size: their subsets and noise cannot be had.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

import memokern
from memokern import processes, samplers
from memokern.apps import figures
from memokern.apps.experiments.base import Experiment, Numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Published means: bandwidth -> tr Cov_h, n_eff; d = 2, k = 1, N = 200.
PUBLISHED = {0.01: (0.583, 3.5), 0.05: (0.921, 13.6), 0.1: (1.004, 26.0), 0.5: (1.281, 101.5)}
# The same of inpainting CIFAR-10; N = 2000, D = 3072.
PUBLISHED_INPAINTING = {4.0: (79.15, 2.4), 5.0: (222.3, 17.2), 6.0: (344.1, 77.9)}
# At this level x does not tell rows apart: |x - y|^2 / (2 sigma^2) is below 1e-6. The trace, which
# the sweep gives as a difference of numbers of the size of sigma^2, is still right to 1e-6.
UNINFORMATIVE = 1e4


@dataclasses.dataclass(frozen=True)
class Conditional:
    """points: N of the plane, in so many `seeds` sets; noise: of the condition; queries: conditions
    asked about. digits: rows; digit_bandwidths: in units of half an image, [-1, 1] per pixel.
    starts: samples of one conditional flow. data: a file of images, and key: which array of it;
    images: rows taken of it, image_bandwidths: as for digits.
    """

    points: int = 200
    seeds: int = 5
    queries: int = 48
    noise: float = 0.1
    bandwidths: tuple[float, ...] = (0.01, 0.05, 0.1, 0.5)
    digits: int = 1700
    digit_bandwidths: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0)
    starts: int = 2000
    data: str | None = None
    key: str | None = None
    images: int = 2000
    image_bandwidths: tuple[float, ...] = (3.0, 4.0, 5.0, 6.0, 8.0, 12.0)
    seed: int = 1


def kernel_bias(conditions: Tensor, c: Tensor, h: float) -> Tensor:
    """-|c - c_n|^2 / (2 h^2) [N], of conditions [N, K] and one condition [K]."""
    return -(conditions - c).square().sum(1) / (2 * h * h)


def spread(rows: Tensor, conditions: Tensor, asked: Tensor, h: float) -> tuple[Tensor, Tensor]:
    """n_eff and tr Cov_h [Q] at the conditions asked for [Q, K], from one posterior: at a level of
    noise at which only the condition tells rows apart."""
    data = memokern.TrainingSet(rows, conditions=conditions)
    center = rows.mean(0).expand(len(asked), *rows.shape[1:])
    found = memokern.posterior(center, data, UNINFORMATIVE, condition=asked, bandwidth=h)
    return found.ess, found.covariance_trace


def linear_gaussian(count: int, noise: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Standard normal rows [count, 2] and their conditions [count, 1]: the first coordinate, with
    noise."""
    rows = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    error = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    return rows, rows[:, :1] + noise * error


def end_law(p: Conditional) -> Numbers:
    """One condition: how often samples of the conditional flow end at each row, and p_n(c)."""
    generator = torch.Generator().manual_seed(p.seed)
    rows, conditions = linear_gaussian(p.points, p.noise, generator)
    bias = kernel_bias(conditions, torch.zeros(1, dtype=torch.float64), 0.1)
    flow = memokern.Denoiser(rows, processes.EDM(sigma_max=200.0))
    found = samplers.ode(flow, p.starts, 60, solver="heun", bias=bias, seed=p.seed)
    near = memokern.nearest(found.x, rows)
    counts = torch.bincount(near.index[:, 0], minlength=p.points)
    return {
        "probability": torch.softmax(bias, 0).numpy(), "count": counts.numpy(),
        "farthest": float(near.distance.max()),
    }  # fmt: skip


def inpainting(images: Tensor, count: int, bandwidths: Sequence[float], p: Conditional) -> Numbers:
    """Means of n_eff and tr Cov_h for `count` of the images [M, ..., W], in a random order, at left
    halves of so many `queries`: of the images that follow ("n_eff", "trace"), and of the first rows
    themselves, with a little noise ("own_n_eff", "own_trace")."""
    generator = torch.Generator().manual_seed(p.seed)
    order = torch.randperm(len(images), generator=generator)
    kept, fresh = (images[i].double() for i in (order[:count], order[count:][: p.queries]))
    half = images.shape[-1] // 2
    left, others = (v[..., :half].flatten(1) for v in (kept, fresh))
    own = left[: p.queries]
    noise = torch.randn(own.shape, generator=generator, dtype=torch.float64)
    found: Numbers = {
        "bandwidths": list(bandwidths), "rows": len(kept), "noise": p.noise,
        "variance": float(kept.flatten(1).var(0, unbiased=False).sum()),
    }  # fmt: skip
    for name, asked in (("", others), ("own_", own + p.noise * noise)):
        each = [spread(kept, left, asked, h) for h in bandwidths]
        found[f"{name}n_eff"] = [float(n.mean()) for n, _ in each]
        found[f"{name}trace"] = [float(t.mean()) for _, t in each]
    return found


def of_file(p: Conditional) -> Numbers | None:
    """Inpainting of the images in the file.

    Raises: ValueError for rows of one axis, or too few of them; else as TrainingSet.
    """
    if p.data is None:
        return None
    data = memokern.TrainingSet(p.data, key=p.key)
    if len(data.shape) < 2 or data.shape[-1] < 2 or data.n < 2:
        raise ValueError(
            f"expected at least two images [..., H, W] to take halves of, got {data.n} rows"
            f" {list(data.shape)}"
        )
    count = min(p.images, data.n - min(p.queries, data.n // 2))
    taken = torch.randperm(data.n, generator=torch.Generator().manual_seed(p.seed))
    some = data.gather(taken[: count + p.queries])
    found = inpainting(some, count, p.image_bandwidths, p)
    return found | {"name": Path(p.data).name, "shape": list(data.shape)}


def run_conditional(p: Conditional) -> Numbers:
    """n_eff and tr Cov_h of the problems, and the end law of one flow."""
    images = of_file(p)  # first, because a file may be wrong
    numbers: Numbers = {"bandwidths": list(p.bandwidths), "end_law": end_law(p)}
    plane = np.zeros((2, p.seeds, len(p.bandwidths)))
    for seed in range(p.seeds):
        generator = torch.Generator().manual_seed(p.seed + seed)
        rows, conditions = linear_gaussian(p.points, p.noise, generator)
        _, asked = linear_gaussian(p.queries, p.noise, generator)
        for k, h in enumerate(p.bandwidths):
            n_eff, trace = spread(rows, conditions, asked, h)
            plane[:, seed, k] = float(n_eff.mean()), float(trace.mean())
    numbers["n_eff"], numbers["trace"] = plane
    digits = memokern.TrainingSet.digits()[:]
    numbers["digits"] = inpainting(digits, p.digits, p.digit_bandwidths, p)
    return numbers | {"images": images}


def deviation(law: Numbers) -> tuple[float, int]:
    """The chi-square of the counts against p_n(c), rows that are expected less than five times
    taken as one, and its degrees of freedom."""
    total = law["count"].sum()
    expected = total * law["probability"]
    often = expected >= 5
    seen = np.append(law["count"][often], law["count"][~often].sum())
    wanted = np.append(expected[often], expected[~often].sum())
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    return float(((seen - wanted) ** 2 / wanted).sum()), len(seen) - 1


def said(name: str, n: Numbers, published: Mapping[float, tuple[float, float]]) -> list[str]:
    """What inpainting of these images gave."""
    lines = []
    for whose, prefix in (("other images", ""), ("the rows themselves", "own_")):
        each = zip(n["bandwidths"], n[f"{prefix}n_eff"], n[f"{prefix}trace"], strict=True)
        parts = [f"h = {h:g}: n_eff {e:.1f}, tr Cov {t:.2f}" for h, e, t in each]
        lines.append(
            f"{name}, {n['rows']} rows, the left half of {whose} given: {'; '.join(parts)}"
            f"; all rows {n['variance']:.2f}"
        )
    if published:
        parts = [f"h = {h:g}: {e:g}, {t:g}" for h, (t, e) in published.items()]
        lines.append(f"published for inpainting of CIFAR-10: {'; '.join(parts)}")
    return lines


def conclude_conditional(n: Numbers) -> list[str]:
    chi, freedom = deviation(n["end_law"])
    fair = chi < freedom + 4 * math.sqrt(2 * freedom)
    lines = [
        "linear-Gaussian, mean over seeds: "
        + "; ".join(
            f"h = {h:g}: n_eff {e:.1f}, tr Cov {t:.3f}"
            + (
                f" (published {PUBLISHED[h][1]:.1f}, {PUBLISHED[h][0]:.3f})"
                if h in PUBLISHED
                else ""
            )
            for h, e, t in zip(n["bandwidths"], n["n_eff"].mean(0), n["trace"].mean(0), strict=True)
        ),
        *said("digits", n["digits"], {}),
        *(said(n["images"]["name"], n["images"], PUBLISHED_INPAINTING) if n["images"] else ()),
        f"the conditional flow ends at rows (farthest {n['end_law']['farthest']:.1e}) as often as"
        f" p(c) says: chi-square {chi:.0f} at {freedom} degrees of freedom"
        + ("" if fair else " (does NOT hold here)"),
    ]
    return lines


def _draw_inpainting(axis: Axes, n: Numbers, name: str) -> None:
    own = "halves of rows"
    for values, colour, label in (
        ("n_eff", figures.BLUE, r"$n_\mathrm{eff}$"),
        ("trace", figures.VERMILION, r"tr Cov$_h$"),
    ):
        axis.loglog(n["bandwidths"], n[values], "o-", color=colour, label=label, markersize=3.5)
        axis.loglog(n["bandwidths"], n[f"own_{values}"], "o--", color=colour, markersize=3.5,
                    mfc="white", label=own if values == "trace" else None)  # fmt: skip
    axis.axhline(n["variance"], color=figures.GREY, ls="--", lw=0.9, label="all rows")
    axis.set(xlabel="bandwidth $h$", title=f"{name}, left half given")
    low, high = min(n["bandwidths"]), max(n["bandwidths"])
    ticks = [t for t in (0.2, 0.5, 1, 2, 3, 5, 10, 20) if low <= t <= high]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.xaxis.set_minor_formatter("")
    axis.legend(fontsize=7)


def draw_conditional(n: Numbers) -> Figure:
    """n_eff and tr Cov_h against h for the plane and for images, and the end law."""
    count = 4 if n["images"] else 3
    with figures.style():
        figure, axes = figures.new(0.7 * count * figures.COLUMN, 2.6, 1, count)
        plane, digits, law = axes[0, :3]
        guide = np.array([[h, *PUBLISHED[h]] for h in PUBLISHED]).T
        for values, published, colour, label in (
            (n["n_eff"], guide[2], figures.BLUE, r"$n_\mathrm{eff}$"),
            (n["trace"], guide[1], figures.VERMILION, r"tr Cov$_h$"),
        ):
            mean, spread = values.mean(0), values.std(0)
            plane.errorbar(n["bandwidths"], mean, spread, fmt="o-", color=colour, label=label,
                           markersize=3.5)  # fmt: skip
            plane.plot(guide[0], published, "x", color=figures.BLACK, markersize=5,
                       label="published" if label.startswith("tr") else None)  # fmt: skip
        plane.set(xscale="log", yscale="log", xlabel="bandwidth $h$", title="linear-Gaussian",
                  ylabel=r"$n_\mathrm{eff}$, tr Cov$_h$")  # fmt: skip
        plane.legend(fontsize=7)
        _draw_inpainting(digits, n["digits"], "digits")
        if n["images"]:
            axis = axes[0, 3]
            _draw_inpainting(axis, n["images"], n["images"]["name"])
            guide = np.array([[h, *values] for h, values in PUBLISHED_INPAINTING.items()]).T
            for values in guide[1:]:
                axis.plot(guide[0], values, "x", color=figures.BLACK, markersize=5)
        share = n["end_law"]["count"] / n["end_law"]["count"].sum()
        top = float(max(share.max(), n["end_law"]["probability"].max())) * 1.1
        law.plot([0, top], [0, top], "-", color=figures.GREY, lw=0.9)
        law.plot(n["end_law"]["probability"], share, "o", color=figures.BLUE, markersize=3)
        law.set(xlabel="$p_n(c)$", ylabel="share of samples", title="end of the flow",
                xlim=(0, top), ylim=(0, top))  # fmt: skip
    return figure


EXPERIMENTS = (
    Experiment(
        "conditional",
        "conditions: the rows and the variance that a conditional law rests on",
        Conditional,
        run_conditional,
        draw_conditional,
        conclude_conditional,
        {"seeds": 2, "queries": 12, "starts": 500},
    ),
)
