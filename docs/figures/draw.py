"""Draws the figures of "How it works": python docs/figures/draw.py [NAME ...]

Two are sketches, two show numbers that are computed here. The SVG files are kept in the repository.
"""

import itertools
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyArrowPatch, Rectangle

import memokern

HERE = Path(__file__).parent
BLUE, ORANGE, GREEN, GREY, INK = "#0072b2", "#d55e00", "#009e73", "#9aa0a6", "#222222"


def sketch(width, height):
    figure, axis = plt.subplots(figsize=(width, height))
    axis.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axis.set_axis_off()
    figure.subplots_adjust(0, 0, 1, 1)
    return figure, axis


def box(axis, x, y, w, h, text="", colour=BLUE, fill=0.12, size=9):
    axis.add_patch(Rectangle((x, y), w, h, fc=(*matplotlib.colors.to_rgb(colour), fill), ec=colour))
    if text:
        axis.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size, color=INK)


def arrow(axis, start, end, colour=INK, bend=0.0):
    style = f"arc3,rad={bend}"
    axis.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=colour,
                        connectionstyle=style, linewidth=1.2)
    )  # fmt: skip


def sweep():
    """Rows pass in tiles, and a state per query is all that is kept."""
    figure, axis = sketch(9, 4.1)
    axis.text(1.05, 3.85, "N rows of D features", ha="center", fontsize=9)
    for i in range(9):
        box(
            axis,
            0.2,
            3.3 - 0.36 * i,
            1.7,
            0.34,
            colour=ORANGE if i == 3 else GREY,
            fill=0.1 + 0.25 * (i == 3),
        )
    axis.text(1.05, 2.39, "tile", ha="center", va="center", fontsize=9)
    box(axis, 3.0, 3.2, 1.9, 0.5, "B queries x", BLUE)
    box(axis, 3.0, 2.0, 1.9, 0.75, "P = X Yᵀ of the tile:\nlogits, then weights", ORANGE)
    axis.text(3.95, 1.72, "never N x B", ha="center", fontsize=8, color=ORANGE, style="italic")
    arrow(axis, (1.95, 2.39), (2.97, 2.39), ORANGE)
    arrow(axis, (3.95, 3.18), (3.95, 2.78), BLUE)
    box(axis, 6.0, 1.35, 2.8, 2.35, "", GREEN)
    axis.text(7.4, 3.5, "state of each query", ha="center", va="center", fontsize=9, weight="bold")
    lines = ("m   largest logit so far", "s   sum of exp(l - m)", "acc   sum of exp(l - m) y",
             "sum of exp(l - m) l", "sum of exp(2 (l - m))")  # fmt: skip
    for i, line in enumerate(lines):
        axis.text(6.15, 3.13 - 0.36 * i, line, fontsize=8.5, va="center")
    arrow(axis, (4.93, 2.39), (5.97, 2.39), GREEN)
    arrow(axis, (1.95, 2.2), (5.97, 1.5), GREY, 0.16)
    axis.text(3.3, 1.15, "the same tile again: acc += weights Y", fontsize=8, color=INK)
    axis.text(
        7.4, 1.05, "states of threads, chunks and machines merge exactly", ha="center", fontsize=8
    )
    names = ("mean", "score", "log density", "divergence", "ess", "entropy")
    for i, name in enumerate(names):
        box(axis, 2.2 + 1.12 * i, 0.15, 1.07, 0.42, name, GREY, size=8)
    arrow(axis, (7.4, 0.98), (7.4, 0.6), GREEN)
    return figure


def certificates():
    """Bounds on the logits of rows from a few of their coordinates, and which rows are dropped."""
    data = memokern.TrainingSet.digits()
    rows = data[:].flatten(1).double()
    sigma, eps = 0.35, 1e-6
    noise = torch.randn(64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = rows[20] + sigma * noise
    center = rows.mean(0)
    basis = torch.linalg.eigh((rows - center).T @ (rows - center)).eigenvectors.flip(1)
    z, zx = (rows - center) @ basis, (x - center) @ basis
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    true = -(rows - x).square().sum(1) / (2 * sigma**2)
    order = true.argsort(descending=True)[::26]
    for axis, k in zip(axes, (8, 16), strict=True):
        edges = [k, 24, 40, 64]
        near = (zx[:k] - z[:, :k]).square().sum(1)
        rest, cross = 0.0, 0.0
        for a, b in itertools.pairwise(edges):
            n, nx = z[:, a:b].norm(dim=1), zx[a:b].norm()
            rest, cross = rest + n**2 + nx**2, cross + 2 * n * nx
        upper = -(near + rest - cross) / (2 * sigma**2)
        lower = -(near + rest + cross) / (2 * sigma**2)
        best = true[lower.argmax()]  # evaluated in full: a lower bound on the largest logit
        tau = best - torch.log(torch.tensor(len(rows) / eps))
        kept = upper > tau
        assert (upper >= true - 1e-9).all() and (lower <= true + 1e-9).all()
        for place, row in enumerate(order.tolist()):
            colour = ORANGE if kept[row] else GREY
            axis.plot(
                [place, place], [lower[row], upper[row]], color=colour, linewidth=2.2, alpha=0.6
            )
        axis.scatter(range(len(order)), true[order], s=7, color=INK, zorder=3)
        axis.axhline(tau, color=BLUE, linestyle="--", label="tau = L - log(N / eps)")
        axis.set(xlabel="every 26th row, the nearest first", ylim=(-330, 5))
        axis.set_title(
            f"{k} of 64 coordinates: {int(kept.sum())} of {len(rows)} rows are kept", fontsize=9
        )
    axes[0].set_ylabel("logit of the row")
    axes[0].plot([], [], color=ORANGE, linewidth=2.2, label="bounds of a row that is kept")
    axes[0].plot([], [], color=GREY, linewidth=2.2, label="bounds of a row that is dropped")
    axes[0].scatter([], [], s=7, color=INK, label="true logit")
    axes[0].legend(fontsize=7, loc="lower left")
    return figure


def cluster():
    """A tile of rows in the shared memory of a cluster's blocks."""
    figure, axis = sketch(9, 4.3)
    title = (
        "a tile of rows, D features: one bulk copy each, so that a row crosses device memory once"
    )
    axis.text(4.5, 4.08, title, ha="center", fontsize=9)
    for rank in range(4):
        x = 0.3 + 2.15 * rank
        box(axis, x, 3.3, 1.95, 0.45, f"D / 4 features, rank {rank}", ORANGE, size=8)
        box(axis, x, 0.45, 1.95, 2.45, "", BLUE)
        axis.text(x + 0.08, 2.7, f"block {rank}", fontsize=8.5, weight="bold")
        box(axis, x + 0.12, 2.12, 1.71, 0.46, "tile in shared memory", ORANGE, size=7.5)
        box(axis, x + 0.12, 1.36, 1.3, 0.46, "part of X Yᵀ", GREEN, size=8)
        box(axis, x + 0.12, 0.6, 1.71, 0.46, "acc: D / 4 features", GREY, size=8)
        arrow(axis, (x + 1.4, 3.28), (x + 1.4, 2.6), ORANGE)
        arrow(axis, (x + 0.75, 2.1), (x + 0.75, 1.84), INK)
        arrow(axis, (x + 0.75, 1.34), (x + 0.75, 1.08), INK)
        arrow(axis, (x + 1.62, 2.1), (x + 1.62, 1.08), INK)
        if rank < 3:
            arrow(axis, (x + 1.44, 1.68), (x + 2.25, 1.68), GREEN)
            arrow(axis, (x + 2.25, 1.5), (x + 1.44, 1.5), GREEN)
    note = "parts are added through distributed shared memory, in the order of ranks"
    axis.text(8.7, 0.18, note, fontsize=8, color=GREEN, ha="right")
    return figure


def numerics():
    """The error of the score against float64 where rows have near-duplicates: the expanded square,
    cdist, and memokern."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(1, 30, 3072).reciprocal() * 4
    half = torch.randn(400, 3072, generator=generator) * scale
    aside = torch.nn.functional.normalize(torch.randn(400, 3072, generator=generator), dim=1)
    sigmas = torch.logspace(-3, 1, 17).tolist()
    errors = {name: [] for name in ("expanded square", "torch.cdist", "memokern")}
    for sigma in sigmas:
        rows = torch.cat([half, half + 2 * sigma * aside])
        x = half[:32] + sigma * torch.randn(32, 3072, generator=generator)
        exact = memokern.posterior(x.double(), rows.double(), sigma).score
        expanded = x.square().sum(1)[:, None] + rows.square().sum(1) - 2 * x @ rows.T
        scores = {"memokern": memokern.posterior(x, rows, sigma).score}
        squares = {"expanded square": expanded, "torch.cdist": torch.cdist(x, rows).square()}
        for name, square in squares.items():
            w = torch.softmax(-square / (2 * sigma**2), dim=1)
            scores[name] = (w @ rows - x) / sigma**2
        for name, score in scores.items():
            error = (score - exact).norm(dim=1) / exact.norm(dim=1)
            errors[name].append(error.max().item())
    figure, axis = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
    for (name, values), colour in zip(errors.items(), (ORANGE, GREY, BLUE), strict=True):
        axis.loglog(sigmas, values, marker="o", markersize=3, color=colour, label=name)
    axis.set(xlabel="sigma", ylabel="relative error of the score")
    axis.legend(fontsize=8)
    return figure


FIGURES = {f.__name__: f for f in (sweep, certificates, cluster, numerics)}

if __name__ == "__main__":
    torch.set_num_threads(2)
    plt.rcParams.update({"svg.hashsalt": "memokern", "font.family": "DejaVu Sans", "font.size": 9})
    for name in sys.argv[1:] or FIGURES:
        figure = FIGURES[name]()
        figure.savefig(HERE / f"{name}.svg", facecolor="white", metadata={"Date": None})
        print(HERE / f"{name}.svg")
