"""Unregularised dynamics in the plane: trajectories over the Voronoi diagram, weights against time,
and the rate of convergence.

There are 20 standard normal points and 30 starts. Adaptive Runge-Kutta solves the probability-flow
ODE of the paper's variance-exploding (VE) and variance-preserving (VP) processes. Without
regularisation every trajectory ends at a training point.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch

import memokern
from memokern import processes, samplers
from memokern.apps import figures
from memokern.apps.experiments.base import Experiment, Numbers
from memokern.regularizers import Regularizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# In the paper, a sample closer than this to a training point has collapsed onto it.
TOLERANCE = 1e-2


@dataclasses.dataclass(frozen=True)
class Planar:
    """points: training points; starts: trajectories; process: "ve" or "vp"; sigma_min: where the
    solver stops.
    """

    points: int = 20
    starts: int = 30
    process: str = "ve"
    sigma_min: float = 1e-4
    seed: int = 1


@dataclasses.dataclass(frozen=True)
class PlanarVP(Planar):
    process: str = "vp"


def training_points(count: int, seed: int) -> torch.Tensor:
    """[count, 2] float64 standard normal points. With seed 1 the first 20 are the paper's own, so
    that figures can be laid over its figures: it draws them from numpy's RandomState(1).
    """
    return torch.from_numpy(np.random.RandomState(seed).randn(count, 2))


def integrate(
    data: torch.Tensor,
    process: str,
    starts: int,
    sigma_min: float,
    seed: int,
    regularizer: Regularizer | None = None,
    trajectory: bool = False,
) -> samplers.Samples:
    """Samples of the probability-flow ODE from `starts` draws of the process' prior, in float64."""
    flow = processes.get(process)
    denoiser = memokern.Denoiser(memokern.TrainingSet(data), process=flow, regularizer=regularizer)
    generator = torch.Generator().manual_seed(seed + 1)
    start = flow.prior((starts, data.shape[1]), generator=generator, dtype=torch.float64)
    return samplers.ode(denoiser, start, solver="rk45", sigma_min=sigma_min, trajectory=trajectory)


def run_trajectories(p: Planar) -> Numbers:
    """Trajectories, the Voronoi cell that each is in along the way, and where it ends.

    The cell at noise level sigma is that of the nearest alpha * y_n. `settled_sigma` [starts] is
    the level below which a trajectory never again changes its cell.
    """
    data = training_points(p.points, p.seed)
    path = integrate(data, p.process, p.starts, p.sigma_min, p.seed, trajectory=True)
    flow = processes.get(p.process)
    assert path.trajectory is not None
    states, times, sigmas = path.trajectory, path.times, path.sigmas
    alphas = flow.alpha(times)
    cells = torch.stack(
        [memokern.nearest(x, a * data).index[:, 0] for x, a in zip(states, alphas, strict=True)]
    )
    end = memokern.nearest(path.x, data)
    moved = (cells != cells[-1]).int()
    # The last step at which the cell was another one. Its sigma is an upper bound on the level
    # below which the cell stays the same.
    last = torch.where(moved.any(0), len(cells) - 1 - moved.flip(0).argmax(0), 0)
    return {
        "process": p.process,
        "data": data.numpy(),
        "times": times.numpy(),
        "sigmas": sigmas.numpy(),
        "states": states.numpy(),
        "cells": cells.numpy(),
        "end_cell": end.index[:, 0].numpy(),
        "end_distance": end.distance[:, 0].numpy(),
        "settled_sigma": sigmas[last].numpy(),
        "collapsed_fraction": float((end.distance[:, 0] < TOLERANCE).double().mean()),
        "score_evaluations": path.nfe,
    }


def conclude_trajectories(n: Numbers) -> list[str]:
    same = float(np.mean(n["cells"][-1] == n["end_cell"]))
    return [
        f"{n['collapsed_fraction']:.1%} of {len(n['end_cell'])} trajectories end at a training "
        f"point "
        f"(closer than {TOLERANCE:g}; the farthest: {n['end_distance'].max():.1e})",
        f"{same:.1%} end at the training point of the Voronoi cell that they are in; "
        f"no cell changes below sigma = {n['settled_sigma'].min():.3g} (median "
        f"{np.median(n['settled_sigma']):.3g})",
    ]


def _frame(axis: Axes, data: np.ndarray, margin: float = 0.7) -> None:
    """Equal scales and limits a little outside the training points."""
    low, high = data.min(0) - margin, data.max(0) + margin
    axis.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    axis.set(xlabel="$x_1$", ylabel="$x_2$")


def draw_trajectories(n: Numbers) -> Figure:
    with figures.style():
        figure, axes = figures.new(figures.COLUMN, figures.COLUMN + 0.2)
        axis, states = axes[0, 0], n["states"]
        _frame(axis, n["data"])
        figures.voronoi(axis, n["data"])
        for i in range(states.shape[1]):
            label = "trajectory" if i == 0 else None
            axis.plot(*states[:, i].T, "-", color=figures.BLUE, lw=0.9, alpha=0.8, label=label)
        axis.plot(*states[-1].T, "o", mfc="none", mec=figures.VERMILION, label="end")
        figures.training_points(axis, n["data"])
        axis.set_title(f"{n['process'].upper()}: probability-flow ODE, no regularisation")
        figure.legend(loc="outside lower center", ncols=3, handletextpad=0.4, columnspacing=1.0)
    return figure


# --- weights against time ---


@dataclasses.dataclass(frozen=True)
class Weights:
    """points, process, sigma_min, seed as in Planar; starts: trajectories shown, one panel each."""

    points: int = 20
    starts: int = 4
    process: str = "ve"
    sigma_min: float = 1e-3
    seed: int = 1


def run_weights(p: Weights) -> Numbers:
    """The normalised weights w_n(t) [T, starts, points] along trajectories, and when one of them
    exceeds 0.99 for good.
    """
    data = training_points(p.points, p.seed)
    path = integrate(data, p.process, p.starts, p.sigma_min, p.seed, trajectory=True)
    flow = processes.get(p.process)
    assert path.trajectory is not None
    alphas = flow.alpha(path.times)
    weights = torch.stack(
        [
            memokern.weights(x, data, float(sigma), float(alpha))
            for x, sigma, alpha in zip(path.trajectory, path.sigmas, alphas, strict=True)
        ]
    )
    undecided = (weights.amax(2) <= 0.99).int()
    last = torch.where(undecided.any(0), len(weights) - 1 - undecided.flip(0).argmax(0), 0)
    return {
        "process": p.process,
        "data": data.numpy(),
        "times": path.times.numpy(),
        "sigmas": path.sigmas.numpy(),
        "weights": weights.numpy(),
        "decided_time": path.times[last].numpy(),
        "decided_sigma": path.sigmas[last].numpy(),
        "end_weight": weights[-1].amax(1).numpy(),
    }


def conclude_weights(n: Numbers) -> list[str]:
    return [
        f"at the end the largest weight is at least {n['end_weight'].min():.6f} in all "
        f"{len(n['end_weight'])} trajectories",
        f"one weight exceeds 0.99 for good at sigma = "
        f"{', '.join(f'{s:.2g}' for s in n['decided_sigma'])} "
        f"(time {', '.join(f'{t:.2g}' for t in n['decided_time'])})",
    ]


def draw_weights(n: Numbers) -> Figure:
    starts = n["weights"].shape[1]
    columns = 2 if starts > 1 else 1
    rows = -(-starts // columns)
    with figures.style():
        figure, axes = figures.new(figures.COLUMN * columns, 1.75 * rows + 0.3, rows, columns)
        for i, axis in enumerate(axes.flat):
            if i >= starts:
                axis.set_axis_off()
                continue
            weights = n["weights"][:, i]
            winner = int(weights[-1].argmax())
            # The winner is drawn last, on top. The points that had most weight get a colour of
            # their own.
            order = [k for k in np.argsort(weights.max(0)) if k != winner]
            colours = dict(zip(order[::-1], figures.PALETTE[1:], strict=False))
            for k in order:
                axis.semilogx(n["times"], weights[:, k], color=colours.get(k, figures.GREY), lw=0.9)
            axis.semilogx(n["times"], weights[:, winner], color=figures.BLUE, lw=2.0)
            axis.set(ylim=(-0.03, 1.03), xlim=(max(n["times"].min(), 1e-3), n["times"].max()))
            axis.set_title(f"trajectory {i + 1}")
            if i % columns == 0:
                axis.set_ylabel("weight $w_n(t)$")
            if i >= starts - columns:
                axis.set_xlabel("time $t$")
    return figure


# --- rate of convergence ---


@dataclasses.dataclass(frozen=True)
class Rate:
    """As Planar; the slope is fitted over the levels of noise between sigma_min * 10 and
    sigma_fit.
    """

    points: int = 20
    starts: int = 30
    sigma_min: float = 1e-5
    sigma_fit: float = 1e-2
    seed: int = 1


def run_rate(p: Rate) -> Numbers:
    """|x(t) - x*| against sigma(t) for VE and VP, x* the training point at the end; slopes in
    log-log per trajectory.
    """
    data = training_points(p.points, p.seed)
    numbers: Numbers = {"sigma_fit": p.sigma_fit, "sigma_min": p.sigma_min}
    for process in ("ve", "vp"):
        path = integrate(data, process, p.starts, p.sigma_min, p.seed, trajectory=True)
        assert path.trajectory is not None
        target = data[memokern.nearest(path.x, data).index[:, 0]]
        distance = (path.trajectory - target).norm(dim=2)
        keep = (path.sigmas <= p.sigma_fit) & (path.sigmas >= 10 * p.sigma_min)
        design = path.sigmas[keep].log()
        design = design - design.mean()
        slope = (design[:, None] * distance[keep].log()).sum(0) / design.square().sum()
        numbers[process] = {
            "sigmas": path.sigmas.numpy(),
            "distance": distance.numpy(),
            "slope": slope.numpy(),
            "constant": (distance[keep] / path.sigmas[keep, None]).amax(0).numpy(),
        }
    return numbers


def conclude_rate(n: Numbers) -> list[str]:
    return [
        f"{process.upper()}: slope of log |x(t) - x*| against log sigma between "
        f"{n[process]['slope'].min():.4f} and "
        f"{n[process]['slope'].max():.4f} (median {np.median(n[process]['slope']):.4f}) over "
        f"{len(n[process]['slope'])} "
        f"trajectories; |x(t) - x*| <= {n[process]['constant'].max():.2f} sigma there"
        for process in ("ve", "vp")
    ]


def draw_rate(n: Numbers) -> Figure:
    with figures.style():
        figure, axes = figures.new(2 * figures.COLUMN, 2.7, 1, 2)
        for axis, process in zip(axes[0], ("ve", "vp"), strict=True):
            found = n[process]
            lines = axis.loglog(
                found["sigmas"], found["distance"], color=figures.BLUE, lw=0.7, alpha=0.5
            )
            lines[0].set_label("trajectories")
            axis.loglog(
                found["sigmas"],
                2 * found["sigmas"],
                "--",
                color=figures.VERMILION,
                lw=1.6,
                label=r"$2\,\sigma(t)$",
            )
            axis.set(xlabel=r"noise level $\sigma(t)$", ylabel="$|x(t) - x^*|$")
            axis.set_title(f"{process.upper()}: median slope {np.median(found['slope']):.3f}")
            axis.legend(loc="lower right")
    return figure


EXPERIMENTS = (
    Experiment(
        "trajectories-ve",
        "variance-exploding trajectories over the Voronoi diagram of the training points",
        Planar,
        run_trajectories,
        draw_trajectories,
        conclude_trajectories,
        {"starts": 10},
    ),
    Experiment(
        "trajectories-vp",
        "variance-preserving trajectories over the Voronoi diagram of the training points",
        PlanarVP,
        run_trajectories,
        draw_trajectories,
        conclude_trajectories,
        {"starts": 10},
    ),
    Experiment(
        "weights",
        "the weights of the training points against time: one takes all",
        Weights,
        run_weights,
        draw_weights,
        conclude_weights,
        {"starts": 2},
    ),
    Experiment(
        "rate",
        "convergence to the training point at the rate of the noise level",
        Rate,
        run_rate,
        draw_rate,
        conclude_rate,
        {"starts": 8},
    ),
)
