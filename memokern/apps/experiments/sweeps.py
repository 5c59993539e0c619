"""The fraction of samples that collapse onto a training point, against the strength of the
regularisation.

With Tikhonov, s = (alpha mu - x)/(sigma^2 + c). Once one weight dominates, VE leaves x - y = z
sqrt(c) of the initial noise (z standard normal, up to the factor sigma_max / sqrt(sigma_max^2 +
c)), so that in the plane a fraction 1 - exp(-tol^2 / (2 c)) lies within the tolerance. Empirical
Bayes multiplies s by min(1, Z/tau). With one weight, k = |x - y|/sigma obeys d log k / d log sigma
= min(1, e^{-k^2/2}/tau) - 1: samples with k^2/2 < -log tau collapse and the others freeze. That is
a fraction 1 - tau of planar Gaussian noise, for tau < 1. Both fractions are drawn as guides beside
the measured ones.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

import memokern
from memokern import memorization, regularizers
from memokern.apps import figures
from memokern.apps.experiments.base import Experiment, Numbers
from memokern.apps.experiments.planar import TOLERANCE, integrate, training_points

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class TikhonovSweep:
    """strengths: c, from strong to weak; sigma_min: where the solver stops; the rest as in the
    planar experiments.
    """

    strengths: tuple[float, ...] = tuple(float(c) for c in np.logspace(-1, -5, 9))
    points: int = 20
    starts: int = 1000
    process: str = "ve"
    sigma_min: float = 1e-4
    seed: int = 1


@dataclasses.dataclass(frozen=True)
class EmpiricalBayesSweep:
    """strengths: tau, from weak to strong; the rest as in TikhonovSweep."""

    strengths: tuple[float, ...] = tuple(float(t) for t in np.logspace(-2, 1, 7))
    points: int = 20
    starts: int = 1000
    process: str = "ve"
    sigma_min: float = 1e-4
    seed: int = 1


def _sweep(p: TikhonovSweep | EmpiricalBayesSweep, made: list[regularizers.Regularizer]) -> Numbers:
    data = training_points(p.points, p.seed)
    plain = integrate(data, p.process, p.starts, p.sigma_min, p.seed)
    ends, fractions, distances = [], [], []
    for regularizer in made:
        samples = integrate(data, p.process, p.starts, p.sigma_min, p.seed, regularizer)
        found = memorization.collapse(samples.x, memokern.TrainingSet(data), TOLERANCE)
        ends.append(samples.x.numpy())
        fractions.append(float(found.fraction))
        distances.append(float(found.distance.median()))
    baseline = memorization.collapse(plain.x, memokern.TrainingSet(data), TOLERANCE)
    return {
        "process": p.process,
        "tolerance": TOLERANCE,
        "starts": p.starts,
        "strengths": list(p.strengths),
        "fractions": fractions,
        "median_distances": distances,
        "unregularised_fraction": float(baseline.fraction),
        "data": data.numpy(),
        "ends": np.stack(ends),
    }


def run_tikhonov(p: TikhonovSweep) -> Numbers:
    """The collapsed fraction for each c, from the same starts, and without regularisation."""
    numbers = _sweep(p, [regularizers.Tikhonov(c) for c in p.strengths])
    return numbers | {"guide": [-math.expm1(-(TOLERANCE**2) / (2 * c)) for c in p.strengths]}


def run_empirical_bayes(p: EmpiricalBayesSweep) -> Numbers:
    """The collapsed fraction for each tau, from the same starts, and without regularisation."""
    numbers = _sweep(p, [regularizers.EmpiricalBayes(math.log(tau)) for tau in p.strengths])
    # There is no guide near tau = 1 and above, where samples drift off slowly and some stop within
    # the tolerance.
    return numbers | {"guide": [1 - tau if tau <= 0.5 else math.nan for tau in p.strengths]}


def falling(fractions: Sequence[float], samples: int) -> bool:
    """Whether none of these fractions, of so many samples each, is larger than the one before it by
    more than three standard errors of their difference."""
    return all(
        b - a <= 3 * math.sqrt((a * (1 - a) + b * (1 - b)) / samples)
        for a, b in itertools.pairwise(fractions)
    )


def _conclude(n: Numbers, symbol: str) -> list[str]:
    pairs = sorted(zip(n["strengths"], n["fractions"], strict=True))
    falls = falling([fraction for _, fraction in pairs], n["starts"])
    return [
        f"without regularisation {n['unregularised_fraction']:.1%} of {n['starts']} samples "
        f"collapse",
        f"collapsed fraction by {symbol}: " + ", ".join(f"{s:.2g}: {f:.3f}" for s, f in pairs),
        f"the fraction {'falls' if falls else 'does NOT fall'} as {symbol} grows; "
        f"largest difference from the guide "
        f"{np.nanmax(np.abs(np.subtract(n['fractions'], n['guide']))):.3f}",
    ]


def conclude_tikhonov(n: Numbers) -> list[str]:
    return _conclude(n, "c")


def conclude_empirical_bayes(n: Numbers) -> list[str]:
    return _conclude(n, "tau")


def _draw(
    n: Numbers, xlabel: str, guide: np.ndarray, curve: np.ndarray, guide_label: str, symbol: str
) -> Figure:
    """Left: the fraction against the strength. Right: where samples end, for a strong and a weak
    regularisation.
    """
    order = np.argsort(n["strengths"])
    strengths, fractions = np.asarray(n["strengths"])[order], np.asarray(n["fractions"])[order]
    with figures.style():
        figure, axes = figures.new(2.1 * figures.COLUMN, 2.85, 1, 3)
        axis = axes[0, 0]
        axis.semilogx(guide, curve, "--", color=figures.GREY, label=guide_label)
        axis.semilogx(strengths, fractions, "o-", color=figures.BLUE, label="measured")
        axis.set(xlabel=xlabel, ylabel="fraction of collapsed samples", ylim=(-0.04, 1.04))
        axis.legend(loc="center left" if fractions[len(order) // 2] > 0.5 else "upper right")
        for axis, which in zip(axes[0, 1:], (order[-1], order[len(order) // 2]), strict=True):
            data, ends = n["data"], n["ends"][which]
            low, high = data.min(0) - 0.7, data.max(0) + 0.7
            axis.set(
                xlim=(low[0], high[0]),
                ylim=(low[1], high[1]),
                aspect="equal",
                xlabel="$x_1$",
                ylabel="$x_2$",
            )
            figures.voronoi(axis, data)
            axis.plot(*ends[:300].T, "o", color=figures.VERMILION, markersize=2.5, alpha=0.5, mew=0,
                      label="sample")  # fmt: skip
            figures.training_points(axis, data)
            axis.set_title(f"{symbol} = {n['strengths'][which]:.2g}")
        figures.legend_below(figure, axis)
    return figure


def draw_tikhonov(n: Numbers) -> Figure:
    grid = np.geomspace(min(n["strengths"]), max(n["strengths"]), 200)
    curve = -np.expm1(-(n["tolerance"] ** 2) / (2 * grid))
    return _draw(n, "regularisation $c$", grid, curve, r"$1 - e^{-tol^2 / 2c}$", "$c$")


def draw_empirical_bayes(n: Numbers) -> Figure:
    grid = np.geomspace(min(n["strengths"]), 1.0, 200)
    return _draw(n, r"regularisation $\tau$", grid, 1 - grid, r"$1 - \tau$", r"$\tau$")


EXPERIMENTS = (
    Experiment(
        "tikhonov-sweep",
        "collapsed fraction against the strength c of Tikhonov regularisation",
        TikhonovSweep,
        run_tikhonov,
        draw_tikhonov,
        conclude_tikhonov,
        {"starts": 200, "strengths": (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)},
    ),
    Experiment(
        "empirical-bayes-sweep",
        "collapsed fraction against the threshold tau of empirical Bayes",
        EmpiricalBayesSweep,
        run_empirical_bayes,
        draw_empirical_bayes,
        conclude_empirical_bayes,
        {"starts": 200, "strengths": (1e-2, 1e-1, 1.0, 10.0)},
    ),
)
