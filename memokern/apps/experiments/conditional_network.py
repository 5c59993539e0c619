"""A conditional network stopped early: what it keeps of a conditional law.

Rows y of the plane have a condition c each, one coordinate with noise (the linear-Gaussian problem
of `conditional`). Every condition occurs once, so that the minimiser of the conditional loss gives
for c_n the row y_n and nothing else: n_eff = 1 and no variance, where the law of y given c_n has
the variance 1 + noise^2 / (1 + noise^2). A network reaches that late. On the way the variance of
its samples falls, and the loss of held-out rows says when to stop (arXiv 2603.14135 finds the same
on data of science).

At the conditions of the training rows, as a function of the epochs: the variance of the samples
and the effective number of rows that they are nearest to, 1 / sum p^2 with its bias for few samples
taken off; the fraction that lie near their condition's own row; the losses.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

import memokern
from memokern import processes, samplers
from memokern.apps import figures
from memokern.apps.experiments.base import Experiment, Numbers
from memokern.apps.experiments.conditional import linear_gaussian
from memokern.apps.experiments.networks import early, fit, levels, made, one_thread, shown
from memokern.training import MLP, LearnedDenoiser, Trainer, losses
from memokern.training.losses import edm_weight

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIGMA_DATA = 1.0
LOSSES = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)  # marks of a logarithmic axis


@dataclasses.dataclass(frozen=True)
class NetworkConditional:
    """points, noise: of the problem; held_out: fresh rows of it. asked: training conditions, each
    with so many `starts`. tolerance: of a copy of the condition's own row. The rest as in
    NetworkSweep.
    """

    points: int = 40
    noise: float = 0.1
    held_out: int = 512
    width: int = 256
    depth: int = 2
    steps: int = 20_000
    batch: int = 128
    evaluations: int = 10
    lr: float = 1e-3
    ema: float = 0.999
    asked: int = 20
    starts: int = 100
    sampler_steps: int = 18
    tolerance: float = 0.1
    seed: int = 1


class WithCondition(nn.Module):
    """A perceptron of rows (y, c) [B, 3], c given with its Fourier features, as networks are given
    times; of its output y counts."""

    def __init__(self, width: int, depth: int, frequencies: int = 4) -> None:
        super().__init__()
        self.shape = (3,)
        self.frequencies = 2.0 ** torch.arange(frequencies)
        self.network = MLP((3 + 2 * frequencies,), width, depth)

    def forward(self, x: Tensor, number: Tensor) -> Tensor:
        phase = x[:, 2:] * self.frequencies
        features = torch.cat([x, torch.sin(phase), torch.cos(phase)], 1)
        out: Tensor = self.network(features, number)
        return out[:, :3]


class Fixed(nn.Module):
    """A network of rows (y, c) at given conditions c [B, 1], as one of y [B, 2]."""

    shape = (2,)

    def __init__(self, network: nn.Module, conditions: Tensor) -> None:
        super().__init__()
        self.network, self.conditions = network, conditions

    def forward(self, x: Tensor, number: Tensor) -> Tensor:
        out: Tensor = self.network(torch.cat([x, self.conditions.to(x.dtype)], 1), number)
        return out[:, :2]


def at_conditions(model: LearnedDenoiser, conditions: Tensor) -> LearnedDenoiser:
    """The denoiser of y at these conditions, from the network of (y, c) that is trained."""
    return LearnedDenoiser(
        Fixed(model.network, conditions), model.process, output="edm", sigma_data=SIGMA_DATA
    )


class ConditionalDenoising(losses.Denoising):
    """Of rows (y, c): the denoising loss of y at its condition, to which no noise is added."""

    def at(
        self, model: LearnedDenoiser, y: Tensor, noise: Tensor, t: Tensor, *unused: Any
    ) -> Tensor:
        return super().at(at_conditions(model, y[:, 2:]), y[:, :2], noise[:, :2], t)


def samples_of(p: NetworkConditional, model: LearnedDenoiser, conditions: Tensor) -> Tensor:
    """Ends of the flow [Q, starts, 2] at conditions [Q, 1], from the same draws each time."""
    each = conditions.repeat_interleave(p.starts, 0)
    generator = torch.Generator().manual_seed(p.seed + 1)
    start = model.process.prior((len(each), 2), generator=generator)
    found = samplers.ode(at_conditions(model, each), start, p.sampler_steps, solver="heun").x
    return found.reshape(len(conditions), p.starts, 2)


def effective_rows(nearest: Tensor) -> Tensor:
    """1 / sum p^2 [Q] of the rows that samples are nearest to [Q, S]. The sum is estimated by the
    pairs of samples that agree, which is right in the mean for few samples too."""
    count = nearest.shape[1]
    same = (nearest[:, :, None] == nearest[:, None, :]).double().sum((1, 2)) - count
    return count * (count - 1) / same.clamp(min=1.0)


@one_thread()
def run_network_conditional(p: NetworkConditional) -> Numbers:
    """The measures along the training, and samples at one condition."""
    generator = torch.Generator().manual_seed(p.seed)
    rows, conditions = linear_gaussian(p.points, p.noise, generator)
    fresh = torch.cat(linear_gaussian(p.held_out, p.noise, generator), 1).float()
    data, asked = rows.float(), conditions[: p.asked].float()
    seen: dict[str, list[float]] = {"variance": [], "n_eff": [], "copies": []}
    shown_at: list[np.ndarray] = []
    order = asked[:, 0].argsort()
    picked = order[torch.linspace(0, p.asked - 1, min(5, p.asked)).round().long()]

    def measure(model: LearnedDenoiser) -> float:
        found = samples_of(p, model, asked)
        near = memokern.nearest(found.reshape(-1, 2), data)
        index = near.index[:, 0].reshape(found.shape[:2])
        own = (found - data[: p.asked, None]).square().sum(2).sqrt()
        seen["variance"].append(float(found.var(1).sum(1).mean()))
        seen["n_eff"].append(float(effective_rows(index).mean()))
        seen["copies"].append(float((own < p.tolerance).double().mean()))
        shown_at.append(found[picked].numpy())
        return seen["variance"][-1]

    network = made(WithCondition, p.seed, p.width, p.depth)
    model = LearnedDenoiser(network, processes.EDM(), output="edm", sigma_data=SIGMA_DATA)
    trainer = Trainer(
        model, ConditionalDenoising("x0", edm_weight(SIGMA_DATA)),
        torch.cat([rows, conditions], 1).float(), batch_size=p.batch, lr=p.lr, ema=p.ema,
        seed=p.seed, held_out=fresh, metrics={"variance": measure},
    )  # fmt: skip
    history = fit(trainer, levels(p.steps, p.evaluations))
    return {
        "data": rows.numpy(), "conditions": conditions.numpy(), "tolerance": p.tolerance,
        "noise": p.noise, "law_variance": 1 + p.noise**2 / (1 + p.noise**2),
        "epochs": history.column("epoch"), "loss": history.column("loss"),
        "held_out": history.column("held_out"), **seen, "samples": np.stack(shown_at),
        "picked": picked.numpy(),
    }  # fmt: skip


def conclude_network_conditional(n: Numbers) -> list[str]:
    """Statements; one that these numbers do not bear out says so."""
    stop = early(n)

    def at(k: int) -> str:
        return (
            f"epoch {n['epochs'][k]:.0f}: variance {n['variance'][k]:.2f}, n_eff"
            f" {n['n_eff'][k]:.1f}, {n['copies'][k]:.1%} near the condition's own row"
        )

    copies, variance, rows = (n[name] for name in ("copies", "variance", "n_eff"))
    return [
        f"{len(n['data'])} rows, at the conditions of some; the law's variance is"
        f" {n['law_variance']:.2f}",
        shown(
            "trained on, the network memorises each condition's row",
            copies[-1] > 0.5 and variance[-1] < 0.5 * n["law_variance"],
        )
        + f": {at(-1)}",
        shown(
            "stopped early it does not, and keeps the variance",
            copies[stop] < 0.2 and variance[stop] > 0.5 * n["law_variance"]
            and rows[stop] > 2 * rows[-1],
        )
        + f": at the least held-out loss, {at(stop)}",
    ]  # fmt: skip


def draw_network_conditional(n: Numbers) -> Figure:
    """Above: the losses, the variance with the copies, and n_eff, by epochs. Below: samples of some
    conditions early, at the stop and in the end, and the conditions' own rows."""
    stop, epochs = early(n), n["epochs"]
    with figures.style():
        figure, axes = figures.new(2.1 * figures.COLUMN, 5.1, 2, 3)
        loss, variance, rows = axes[0]
        for axis, values, colour, label in (
            (loss, n["held_out"], figures.VERMILION, "held out"),
            (loss, n["loss"], figures.BLUE, "training"),
            (variance, n["variance"], figures.BLUE, "variance"),
            (variance, n["copies"], figures.VERMILION, "fraction of copies"),
            (rows, n["n_eff"], figures.BLUE, r"$n_\mathrm{eff}$"),
        ):
            axis.semilogx(epochs, values, "o-", color=colour, markersize=3, label=label)
        loss.set(yscale="log", title="loss; dotted: early stop")
        whole = [*n["loss"], *n["held_out"]]
        marks = [m for m in LOSSES if min(whole) <= m <= max(whole)]
        loss.set_yticks(marks, [f"{m:g}" for m in marks])
        variance.axhline(n["law_variance"], color=figures.GREY, ls="--", lw=0.9,
                         label="variance of the law")  # fmt: skip
        top = max(*n["variance"], n["law_variance"])
        variance.set(title="samples at a condition", ylim=(-0.04, 1.5 * top))  # with a legend
        rows.set(yscale="log", title="rows that share the samples")
        rows.set_yticks([1, 2, 5, 10, 20, 40], ["1", "2", "5", "10", "20", "40"])
        for axis in (loss, rows):
            axis.yaxis.set_minor_formatter("")
        for axis in axes[0]:
            axis.axvline(epochs[stop], color=figures.GREY, ls=":", lw=1.0)
            axis.set_xlabel("epochs")
            axis.legend(fontsize=7)
        low, high = n["data"].min(0) - 0.7, n["data"].max(0) + 0.7
        for axis, k in zip(axes[1], (0, stop, len(epochs) - 1), strict=True):
            axis.plot(*n["data"].T, ".", color=figures.GREY, markersize=4, label="row")
            each = zip(n["samples"][k], n["data"][n["picked"]], figures.PALETTE, strict=False)
            for i, (cloud, own, colour) in enumerate(each):
                axis.plot(*cloud[:40].T, "o", color=colour, markersize=2.5, alpha=0.6, mew=0,
                          label=None if i else "sample, coloured by its condition")  # fmt: skip
                axis.plot(*own, "x", color=colour, markersize=8, mew=2, zorder=6,
                          label=None if i else "row of that condition")  # fmt: skip
            axis.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
            axis.set(xlabel="$x_1$", ylabel="$x_2$", title=f"epoch {epochs[k]:.0f}")
        figures.legend_below(figure, axis)
    return figure


EXPERIMENTS = (
    Experiment(
        "network-conditional",
        "a conditional network stopped early: variance and effective rows against epochs",
        NetworkConditional,
        run_network_conditional,
        draw_network_conditional,
        conclude_network_conditional,
        {"steps": 1600, "lr": 4e-3, "evaluations": 9, "asked": 16, "starts": 40},
    ),
)
