"""Networks that are too small, or stopped early: the paper's third kind of regularisation.

Perceptrons of several widths on 20 points of the plane (VP), trained by the paper's loss with
several c, and sampled along the probability flow; the collapsed fraction against width, epochs and
c. A network of infinite capacity would end at the closed form, where every sample collapses; the
closed form with Tikhonov's c is drawn as a guide.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

import memokern
from memokern import memorization, processes, regularizers, samplers
from memokern.apps import figures
from memokern.apps.experiments import planar
from memokern.apps.experiments.base import Experiment, Numbers
from memokern.training import MLP, History, LearnedDenoiser, Trainer, losses
from memokern.training.monitors import judged
from memokern.training.networks import parameter_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Network = TypeVar("Network", bound=torch.nn.Module)


@dataclasses.dataclass(frozen=True)
class NetworkSweep:
    """widths: trained with c = 0; strengths: c, trained at `width`. steps: of Adam, with `batch`
    rows each (an epoch is `points` rows); evaluations: at steps / 2^k, k = 0, 1, ...
    tolerance: of a collapse, within the paper's 1e-2 to 5e-1 for networks. held_out: fresh points
    of the same law, whose loss says where early stopping would stop.
    """

    points: int = 20
    widths: tuple[int, ...] = (8, 32, 128, 256, 512)
    strengths: tuple[float, ...] = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
    width: int = 256
    depth: int = 2
    steps: int = 100_000
    batch: int = 128
    evaluations: int = 9
    lr: float = 1e-3
    ema: float = 0.9999
    starts: int = 1000
    sampler_steps: int = 60
    tolerance: float = 0.1
    held_out: int = 512
    process: str = "vp"
    seed: int = 1


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread for networks as small as these, which take longer with two: the threads wait for
    each other. It also makes the numbers those of any number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def levels(steps: int, evaluations: int) -> list[int]:
    """The steps at which a run is evaluated: steps, half of it, and so on, ascending."""
    return sorted({max(1, steps >> k) for k in range(evaluations)})


def fit(trainer: Trainer, steps: list[int]) -> History:
    """Train, with an evaluation at each of these steps."""
    for step in steps:
        trainer.fit(step, every=step)
    return trainer.history


def made(network: Callable[..., Network], seed: int, *sizes: Any) -> Network:
    """A network whose first weights are those of the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return network(*sizes)


def ends_of(p: NetworkSweep, denoiser: Any) -> torch.Tensor:
    """Where the probability flow takes the same draws of the prior, [starts, 2] float32."""
    generator = torch.Generator().manual_seed(p.seed + 1)
    start = denoiser.process.prior((p.starts, 2), generator=generator)
    return samplers.ode(denoiser, start, p.sampler_steps, solver="heun").x


def collapse_of(p: NetworkSweep, ends: torch.Tensor, data: torch.Tensor) -> float:
    rows = memokern.TrainingSet(data)
    return judged(ends, rows, lambda x, y: memorization.collapse(x, y, p.tolerance)).fraction


def run_one(p: NetworkSweep, width: int, c: float, data: torch.Tensor) -> Numbers:
    """The history of one network, and where its samples end."""
    flow = processes.get(p.process)
    fresh = torch.randn(p.held_out, 2, generator=torch.Generator().manual_seed(p.seed + 2))
    ends: list[torch.Tensor] = []

    def collapsed(model: LearnedDenoiser) -> float:
        ends[:] = [ends_of(p, model)]
        return collapse_of(p, ends[0], data)

    model = LearnedDenoiser(
        made(MLP, p.seed, (2,), width, p.depth), flow, output="eps", sigma_data=1.0
    )
    trainer = Trainer(
        model, losses.ScoreMatching(c), data, batch_size=p.batch, lr=p.lr, ema=p.ema, seed=p.seed,
        held_out=fresh, metrics={"collapsed": collapsed},
    )  # fmt: skip
    history = fit(trainer, levels(p.steps, p.evaluations))
    distance = memokern.nearest(ends[0], data).distance[:, 0]
    return {
        "width": width, "c": c, "parameters": parameter_count(model),
        "steps": history.column("step"), "epochs": history.column("epoch"),
        "loss": history.column("loss"), "held_out": history.column("held_out"),
        "fraction": history.column("collapsed"), "median_distance": float(distance.median()),
        "ends": ends[0].numpy(),
    }  # fmt: skip


@one_thread()
def run_sweep(p: NetworkSweep) -> Numbers:
    """The runs of all widths and strengths, and the collapsed fractions of the closed forms."""
    data = planar.training_points(p.points, p.seed)
    wanted = [(width, 0.0) for width in p.widths] + [(p.width, c) for c in p.strengths]
    runs = {each: run_one(p, *each, data.float()) for each in dict.fromkeys(wanted)}
    by_width, by_c = ([runs[each] for each in part] for part in (
        wanted[: len(p.widths)], wanted[len(p.widths) :],
    ))  # fmt: skip
    flow, rows = processes.get(p.process), data.float()
    closed = []
    for c in p.strengths:
        exact = memokern.Denoiser(rows, flow, regularizers.Tikhonov(c))
        closed.append(collapse_of(p, ends_of(p, exact), rows))
    return {
        "data": data.numpy(), "tolerance": p.tolerance, "starts": p.starts, "process": p.process,
        "by_width": by_width, "by_c": by_c, "closed_form": closed,
    }  # fmt: skip


def grows(fractions: list[float], samples: int) -> bool:
    """Whether the last fraction is larger than the first one by more than three standard errors of
    their difference."""
    a, b = fractions[0], fractions[-1]
    return b - a > 3 * ((a * (1 - a) + b * (1 - b)) / samples) ** 0.5


def shown(statement: str, holds: bool) -> str:
    """The statement, or that these numbers do not bear it out."""
    return statement if holds else f"{statement} (does NOT hold here)"


def early(run: Numbers) -> int:
    """The evaluation with the least held-out loss."""
    return int(np.argmin(run["held_out"]))


def conclude_sweep(n: Numbers) -> list[str]:
    """Statements; one that these numbers do not bear out says so."""
    count, widths, strong = n["starts"], n["by_width"], n["by_c"]
    last = [run["fraction"][-1] for run in widths]
    over_c = [run["fraction"][-1] for run in strong][::-1]
    whole = strong[0]
    stop = early(whole)
    stopped, end = whole["fraction"][stop], whole["fraction"][-1]
    return [
        f"the closed form: {n['closed_form'][0]:.1%} of {count} samples collapse (closer than"
        f" {n['tolerance']:g})",
        shown("a small width reduces it", grows(last, count))
        + f": after {widths[0]['epochs'][-1]:.0f} epochs "
        + ", ".join(f"width {r['width']}: {f:.3f}" for r, f in zip(widths, last, strict=True)),
        shown("fewer epochs do", grows(whole["fraction"], count))
        + f": width {whole['width']} "
        + ", ".join(
            f"{e:.0f}: {f:.3f}" for e, f in zip(whole["epochs"], whole["fraction"], strict=True)
        ),
        shown("early stopping does", grows([stopped, end], count))
        + f": at the least held-out loss (epoch {whole['epochs'][stop]:.0f}) it is {stopped:.3f},"
        f" at the end {end:.3f}",
        shown("c does", grows(over_c, count))
        + ": "
        + ", ".join(
            f"c = {r['c']:g}: {r['fraction'][-1]:.3f} (closed form {g:.3f})"
            for r, g in zip(strong, n["closed_form"], strict=True)
        ),
    ]


def _frame(axis: Axes, data: np.ndarray, ends: np.ndarray, title: str) -> None:
    low, high = data.min(0) - 0.7, data.max(0) + 0.7
    axis.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    axis.set(xlabel="$x_1$", ylabel="$x_2$", title=title)
    figures.voronoi(axis, data)
    axis.plot(*ends[:400].T, "o", color=figures.VERMILION, markersize=2.2, alpha=0.5, mew=0,
              label="sample")  # fmt: skip
    figures.training_points(axis, data)


def draw_sweep(n: Numbers) -> Figure:
    """Above: the fraction against epochs for the widths and for c, and against c at the end. Below:
    where samples end for the smallest and the largest network, and the largest c."""
    with figures.style():
        figure, axes = figures.new(2.1 * figures.COLUMN, 5.1, 2, 3)
        for axis, runs, label in (
            (axes[0, 0], n["by_width"], "width {width}"),
            (axes[0, 1], n["by_c"], "$c$ = {c:g}"),
        ):
            colours = [*figures.PALETTE[:4], figures.BLACK]
            for run, colour in zip(runs, colours, strict=False):
                axis.semilogx(run["epochs"], run["fraction"], "o-", color=colour, markersize=3,
                              label=label.format(**run))  # fmt: skip
            axis.set(xlabel="epochs", ylim=(-0.03, 1.03))
            axis.legend(fontsize=7)
        whole, stop = n["by_c"][0], early(n["by_c"][0])
        axes[0, 1].axvline(whole["epochs"][stop], color=figures.GREY, ls=":", lw=1.0)
        axes[0, 0].set_ylabel("collapsed fraction")
        axes[0, 0].set_title("$c$ = 0")
        axes[0, 1].set_title(f"width {whole['width']}; dotted: early stop")
        axis = axes[0, 2]
        positions = np.arange(len(n["by_c"]))
        axis.plot(positions, n["closed_form"], "s--", color=figures.GREY, label="closed form")
        last = [run["fraction"][-1] for run in n["by_c"]]
        axis.plot(positions, last, "o-", color=figures.BLUE, label=f"width {whole['width']}")
        axis.set_xticks(positions, [f"{run['c']:g}" for run in n["by_c"]])
        axis.set(xlabel="$c$", ylim=(-0.03, 1.03), title="at the end")
        axis.legend(fontsize=7)
        picked = (
            (n["by_width"][0], f"width {n['by_width'][0]['width']}"),
            (n["by_width"][-1], f"width {n['by_width'][-1]['width']}"),
            (n["by_c"][-1], f"width {whole['width']}, $c$ = {n['by_c'][-1]['c']:g}"),
        )
        for axis, (run, title) in zip(axes[1], picked, strict=True):
            _frame(axis, n["data"], run["ends"], title)
        figures.legend_below(figure, axis)
    return figure


EXPERIMENTS = (
    Experiment(
        "network-sweep",
        "networks in the plane: collapsed fraction against width, epochs and c",
        NetworkSweep,
        run_sweep,
        draw_sweep,
        conclude_sweep,
        {
            "widths": (8, 64, 256),
            "strengths": (0.0, 1e-2, 1e-1),
            "steps": 2400,
            "lr": 5e-3,
            "evaluations": 6,
            "starts": 400,
        },
    ),
)
