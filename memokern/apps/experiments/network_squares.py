"""Networks that copy two images: three U-Nets on the two squares (EDM's preconditioning, 40
stochastic steps); the fraction of exact copies against the epochs.

Larger networks memorise sooner, and all of these do in the end. A much smaller one does not: see
docs/training.md.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch

import memokern
from memokern import memorization, processes, samplers
from memokern.apps import figures
from memokern.apps.experiments import squares
from memokern.apps.experiments.base import Experiment, Numbers
from memokern.apps.experiments.networks import made, one_thread, shown
from memokern.training import LearnedDenoiser, Trainer, UNet, losses
from memokern.training.losses import edm_weight
from memokern.training.monitors import judged
from memokern.training.networks import parameter_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class NetworkSquares:
    """widths: of three U-Nets on patches of patch x patch pixels; steps: of Adam, with `batch`
    images each, an image with other noise every time (an epoch is two images); evaluations: evenly
    spaced. The sampler is that of Squares.
    """

    size: int = 64
    widths: tuple[int, ...] = (16, 24, 32)
    patch: int = 4
    depth: int = 3
    steps: int = 2000
    batch: int = 16
    evaluations: int = 16
    lr: float = 2e-3
    ema: float = 0.9999
    sigma_data: float = 0.2
    samples: int = 32
    sampler_steps: int = 40
    threshold: float = 0.5
    seed: int = 0


@one_thread()
def run_network_squares(p: NetworkSquares) -> Numbers:
    """The fraction of exact copies of each network along its training, and some samples."""
    data = memokern.TrainingSet(squares.images(p.size))
    sampler = squares.Squares()
    numbers: Numbers = {"data": squares.images(p.size).numpy(), "samples": p.samples, "runs": []}
    for width in p.widths:
        seen: list[torch.Tensor] = []
        wrong: list[float] = []

        def copies(
            model: LearnedDenoiser,
            seen: list[torch.Tensor] = seen,
            wrong: list[float] = wrong,
        ) -> float:
            x = samplers.ode(
                model, p.samples, p.sampler_steps, solver="heun", seed=p.seed, churn=sampler.churn,
                churn_min=sampler.churn_min, churn_max=sampler.churn_max,
                churn_noise=sampler.churn_noise,
            ).x  # fmt: skip
            found = judged(x, data, lambda x, y: memorization.exact_match(x, y, p.threshold))
            seen.append(x[:4])
            wrong.append(float(found.value.median()))
            return found.fraction

        network = made(UNet, p.seed, (p.size, p.size), width, p.depth, p.patch)
        model = LearnedDenoiser(network, processes.EDM(), output="edm", sigma_data=p.sigma_data)
        trainer = Trainer(
            model, losses.Denoising("x0", edm_weight(p.sigma_data)), data, batch_size=p.batch,
            lr=p.lr, ema=p.ema, seed=p.seed, metrics={"copies": copies},
        )  # fmt: skip
        history = trainer.fit(p.steps, every=max(1, p.steps // p.evaluations))
        numbers["runs"].append({
            "width": width, "parameters": parameter_count(network),
            "epochs": history.column("epoch"), "loss": history.column("loss"),
            "fraction": history.column("copies"), "differing_pixels": wrong,
            "shown": torch.stack(seen).numpy(),
        })  # fmt: skip
    return numbers


def memorised_from(run: Numbers, least: float = 0.5) -> float:
    """The epoch at which so large a fraction are copies for the first time, between the evaluations
    by a straight line; infinite if there is none."""
    epochs, fractions = [0.0, *run["epochs"]], [0.0, *run["fraction"]]
    for i in range(1, len(epochs)):
        a, b = fractions[i - 1 : i + 1]
        if b >= least:
            return float(epochs[i - 1] + (epochs[i] - epochs[i - 1]) * (least - a) / (b - a))
    return np.inf


def conclude_network_squares(n: Numbers) -> list[str]:
    """Statements; one that these numbers do not bear out says so."""
    runs = n["runs"]
    lines = []
    for run in runs:
        first = memorised_from(run)
        since = f"half of them from epoch {first:.0f} on" if np.isfinite(first) else "never half"
        lines.append(
            f"width {run['width']} ({run['parameters']:,} numbers): {run['fraction'][-1]:.1%} of"
            f" {n['samples']} samples are exact copies after {run['epochs'][-1]:.0f} epochs,"
            f" {since}; median of {run['differing_pixels'][-1]:.0f} differing pixels"
        )
    when = [memorised_from(run) for run in runs]
    every = all(run["fraction"][-1] >= 0.9 for run in runs)
    sooner = when == sorted(when, reverse=True) and when[-1] < when[0]
    early_stop = all(run["fraction"][0] < 0.1 for run in runs)
    return [
        *lines,
        shown("all sizes memorise in the end", every),
        shown("larger networks memorise sooner", sooner),
        shown("early stopping prevents it: at the first evaluation no size has copies", early_stop),
    ]


def draw_network_squares(n: Numbers) -> Figure:
    """The fraction of copies and the differing pixels against the epochs, and samples of the
    largest network on the way."""
    runs = n["runs"]
    with figures.style():
        figure, axes = figures.new(2 * figures.COLUMN, 2.6, 1, 2)
        for run, colour in zip(runs, figures.PALETTE, strict=False):
            thousands = np.array(run["epochs"]) / 1000
            pixels = np.maximum(run["differing_pixels"], 0.5)
            for axis, values in zip(axes[0], (run["fraction"], pixels), strict=True):
                axis.plot(thousands, values, "o-", color=colour, markersize=3,
                          label=f"width {run['width']}")  # fmt: skip
        axes[0, 0].set(xlabel="thousand epochs", ylabel="fraction of exact copies")
        axes[0, 0].set(ylim=(-0.03, 1.03))
        axes[0, 1].set(xlabel="thousand epochs", yscale="log")
        axes[0, 1].set(ylabel="differing pixels (median)", title="0 drawn at 0.5")
        axes[0, 0].legend()
        largest = runs[-1]
        moments = np.linspace(0, len(largest["epochs"]) - 1, 3).round().astype(int)
        for k, moment in enumerate(moments):
            inset = axes[0, 1].inset_axes((0.4 + 0.2 * k, 0.6, 0.19, 0.28))
            inset.imshow(largest["shown"][moment][0], cmap="gray", vmin=-0.3, vmax=1.3)
            inset.set(xticks=[], yticks=[])
            inset.set_title(f"epoch {largest['epochs'][moment]:.0f}", fontsize=6, pad=2)
    return figure


EXPERIMENTS = (
    Experiment(
        "network-squares",
        "U-Nets on images of two squares: exact copies against epochs, for three sizes",
        NetworkSquares,
        run_network_squares,
        draw_network_squares,
        conclude_network_squares,
        {"size": 32, "depth": 2, "steps": 720, "evaluations": 6, "samples": 16},
    ),
)
