"""Two binary images of squares in opposite corners, sampled with the exact score: copies, and no
copies with Tikhonov.

The images have 64 x 64 pixels (D = 4096, N = 2); the sampler is EDM's stochastic Heun in 40 steps.
A sample is memorised where, thresholded at one half, it equals a training image in every pixel.
Tikhonov leaves y + z sqrt(c): with c = 0.05, 1 to 2 % of the pixels cross the threshold, so that no
sample matches. It only stops the copying; the exact score cannot make a third square.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch

import memokern
from memokern import memorization, processes, regularizers, samplers
from memokern.apps import figures
from memokern.apps.experiments.base import Experiment, Numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Squares:
    """c: Tikhonov's strength; churn, churn_min, churn_max, churn_noise: EDM's S_churn, S_min,
    S_max, S_noise.
    """

    size: int = 64
    samples: int = 64
    steps: int = 40
    c: float = 0.05
    churn: float = 40.0
    churn_min: float = 0.05
    churn_max: float = 50.0
    churn_noise: float = 1.003
    threshold: float = 0.5
    seed: int = 0


def images(size: int) -> torch.Tensor:
    """[2, size, size] float32, 0 and 1: a square near the upper left corner and a slightly larger
    one near the lower right.

    At size 64 they cover rows and columns 6..17 and 40..53, as in the paper's released code.
    """
    if size < 16:
        raise ValueError(f"size must be at least 16, got {size}")
    pictures = torch.zeros(2, size, size)
    for picture, (low, high) in zip(pictures, ((6, 18), (40, 54)), strict=True):
        low, high = low * size // 64, high * size // 64
        picture[low:high, low:high] = 1
    return pictures


def run_squares(p: Squares) -> Numbers:
    """Samples without and with Tikhonov from the same noise, their matched images, and the
    memorised fractions.
    """
    data = memokern.TrainingSet(images(p.size))
    numbers: Numbers = {"data": images(p.size).numpy(), "c": p.c}
    for name, regularizer in (("unregularised", None), ("tikhonov", regularizers.Tikhonov(p.c))):
        denoiser = memokern.Denoiser(data, process=processes.EDM(), regularizer=regularizer)
        found = samplers.ode(
            denoiser,
            p.samples,
            p.steps,
            solver="heun",
            seed=p.seed,
            churn=p.churn,
            churn_min=p.churn_min,
            churn_max=p.churn_max,
            churn_noise=p.churn_noise,
        )
        match = memorization.exact_match(found.x, data, p.threshold)
        binary = (found.x > p.threshold).float()
        wrong = (binary - images(p.size)[match.index]).abs().flatten(1).mean(1)
        numbers[name] = {
            "fraction": float(match.fraction),
            "memorised": match.memorized.numpy(),
            "index": match.index.numpy(),
            "wrong_pixels": wrong.numpy(),
            "distance": match.distance.numpy(),
            "residual": float((found.x - images(p.size)[match.index]).square().mean().sqrt()),
            "shown": found.x[:6].numpy(),
            "score_evaluations": found.nfe,
        }
    return numbers


def conclude_squares(n: Numbers) -> list[str]:
    lines = []
    for name, label in (
        ("unregularised", "without regularisation"),
        ("tikhonov", f"with Tikhonov, c = {n['c']:g},"),
    ):
        found = n[name]
        lines.append(
            f"{label} {found['fraction']:.1%} of {len(found['index'])} samples equal a training "
            f"image after thresholding "
            f"({np.mean(found['wrong_pixels']):.2%} of the pixels differ on average; rms residual "
            f"{found['residual']:.4f}; "
            f"{int(np.sum(found['index'] == 0))} near the first image)"
        )
    return lines


def draw_squares(n: Numbers) -> Figure:
    with figures.style():
        figure, axes = figures.new(2 * figures.COLUMN, 2.3, 2, 8, layout=None)
        # A heading reaches over several pictures. A layout engine would make room for it in one
        # column.
        figure.set_layout_engine("none")
        figure.subplots_adjust(0.01, 0.01, 0.99, 0.9, wspace=0.06, hspace=0.3)
        for row, (name, label) in enumerate(
            (("unregularised", "no regularisation"), ("tikhonov", f"Tikhonov, c = {n['c']:g}"))
        ):
            found = n[name]
            for column, axis in enumerate(axes[row]):
                axis.set(xticks=[], yticks=[])
                if column < 2:
                    axis.imshow(
                        n["data"][column], cmap="gray", vmin=-0.3, vmax=1.3, interpolation="nearest"
                    )
                    color = figures.GREY
                else:
                    sample = column - 2
                    axis.imshow(
                        found["shown"][sample],
                        cmap="gray",
                        vmin=-0.3,
                        vmax=1.3,
                        interpolation="nearest",
                    )
                    color = figures.VERMILION if found["memorised"][sample] else figures.BLUE
                for spine in axis.spines.values():
                    spine.set(visible=True, color=color, linewidth=1.6 if column >= 2 else 0.8)
            heading = f"samples, {label}: {found['fraction']:.0%} memorised"
            for column, text in ((0, "training"), (2, heading)):
                axes[row, column].set_title(text, loc="left")
    return figure


EXPERIMENTS = (
    Experiment(
        "squares",
        "64 x 64 images of squares with the exact score: copies, and none with Tikhonov",
        Squares,
        run_squares,
        draw_squares,
        conclude_squares,
        {"samples": 8},
    ),
)
