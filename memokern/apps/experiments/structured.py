"""Two and four points in symmetric places: starts on a hyperplane of symmetry stay on it, and all
others find a point.

The paper changes time by sigma = e^{-r}, which gives dx/dr = -(x - mu(x, e^{-r})). At sigma = 1 the
starts lie on the border of the square of half side 2.1, the corners and the middles included.
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
from memokern.apps.experiments.planar import TOLERANCE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAYOUTS: dict[str, list[list[float]]] = {
    "two": [[-1.0, 0.0], [1.0, 0.0]],
    "four": [[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]],
}


@dataclasses.dataclass(frozen=True)
class Structured:
    """half_side: of the square of starts; per_side: starts on a side (odd, so that the middles are
    among them).
    """

    half_side: float = 2.1
    per_side: int = 21
    sigma_start: float = 1.0
    sigma_min: float = 1e-4
    seed: int = 0  # not used, since nothing is drawn; every experiment takes one


def square(half_side: float, per_side: int) -> torch.Tensor:
    """[4 (per_side - 1), 2] float64 points on the border of a square, corners once."""
    # This is exactly antisymmetric: the middle is 0, and starts on a diagonal have |x_1| = |x_2| to
    # the last bit.
    right = torch.arange(per_side, dtype=torch.float64)
    side = half_side * (2 * right - (per_side - 1)) / (per_side - 1)
    edge, inner = torch.full_like(side, half_side), side[1:-1]
    return torch.cat(
        [
            torch.stack([side, edge], 1),
            torch.stack([side, -edge], 1),
            torch.stack([edge[1:-1], inner], 1),
            torch.stack([-edge[1:-1], inner], 1),
        ]
    )


def off_symmetry(layout: str, x: torch.Tensor) -> torch.Tensor:
    """Distance [..., S] from the nearest hyperplane of symmetry that separates cells (two: x_1 = 0;
    four: |x_1| = |x_2|).
    """
    if layout == "two":
        return x[..., 0].abs()
    return (x[..., 0].abs() - x[..., 1].abs()).abs() / 2**0.5


def run_structured(p: Structured) -> Numbers:
    """For each layout: trajectories, which starts are on a hyperplane, how far those leave it,
    where the others end.
    """
    numbers: Numbers = {"sigma_start": p.sigma_start, "sigma_min": p.sigma_min}
    flow = processes.EDM(sigma_min=p.sigma_min, sigma_max=p.sigma_start)
    for layout, points in LAYOUTS.items():
        data = torch.tensor(points, dtype=torch.float64)
        denoiser = memokern.Denoiser(memokern.TrainingSet(data), process=flow)
        start = square(p.half_side, p.per_side)
        path = samplers.ode(denoiser, start, solver="rk45", sigma_min=p.sigma_min, trajectory=True)
        assert path.trajectory is not None
        symmetric = off_symmetry(layout, start) == 0
        if layout == "four":
            # By symmetry the trajectory of a start on an axis ends at a point; only the diagonals
            # separate cells.
            assert int(symmetric.sum()) == 4
        end = memokern.nearest(path.x, data)
        numbers[layout] = {
            "data": data.numpy(),
            "sigmas": path.sigmas.numpy(),
            "states": path.trajectory.numpy(),
            "symmetric": symmetric.numpy(),
            "off_hyperplane": off_symmetry(layout, path.trajectory)[:, symmetric].amax(0).numpy(),
            "end": path.x.numpy(),
            "end_distance": end.distance[:, 0].numpy(),
        }
    return numbers


def conclude_structured(n: Numbers) -> list[str]:
    lines = []
    for layout in LAYOUTS:
        found = n[layout]
        symmetric = found["symmetric"]
        others = found["end_distance"][~symmetric]
        lines.append(
            f"{layout} points: {int(symmetric.sum())} symmetric starts leave their hyperplane by "
            f"at most "
            f"{found['off_hyperplane'].max():.1e} and end "
            f"{found['end_distance'][symmetric].min():.3f} or more from every "
            f"training point; of the {len(others)} others {np.mean(others < TOLERANCE):.1%} end "
            f"at one"
        )
    return lines


def draw_structured(n: Numbers) -> Figure:
    with figures.style():
        figure, axes = figures.new(2 * figures.COLUMN, figures.COLUMN + 0.2, 1, 2)
        for axis, layout in zip(axes[0], LAYOUTS, strict=True):
            found = n[layout]
            axis.set(
                xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), aspect="equal", xlabel="$x_1$", ylabel="$x_2$"
            )
            axis.set_title(f"{layout} points")
            for symmetric, color, label in (
                (False, figures.BLUE, "trajectory"),
                (True, figures.VERMILION, "trajectory from a symmetric start"),
            ):
                for k, i in enumerate(np.flatnonzero(found["symmetric"] == symmetric)):
                    first = k == 0 and layout == "two"
                    axis.plot(
                        *found["states"][:, i].T,
                        "-",
                        color=color,
                        lw=1.6 if symmetric else 0.8,
                        label=label if first else None,
                    )
            axis.plot(
                *found["data"].T,
                ".",
                color=figures.BLACK,
                markersize=9,
                zorder=5,
                label="training point" if layout == "two" else None,
            )
        figure.legend(loc="outside lower center", ncols=3)
    return figure


EXPERIMENTS = (
    Experiment(
        "structured",
        "two and four symmetric points: starts on a hyperplane of symmetry stay on it",
        Structured,
        run_structured,
        draw_structured,
        conclude_structured,
        {"per_side": 11},
    ),
)
