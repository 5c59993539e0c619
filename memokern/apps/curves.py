"""Pictures of what was measured: a training run against its steps, a report's criteria."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from memokern.apps import figures
from memokern.memorization import Memorization
from memokern.training import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def training(history: History, title: str | None = None) -> Figure:
    """The losses above and the fractions (every other column) below, on one axis of steps.

    Raises: ValueError for a history without rows.
    """
    if not history.rows:
        raise ValueError("the history has no rows: nothing was evaluated yet")
    losses = [n for n in ("loss", "held_out") if n in history.names]
    fractions = [n for n in history.names if n not in ("step", "epoch", *losses)]
    steps = np.array(history.column("step"))
    labels = {"loss": "training loss", "held_out": "held-out loss"}
    with figures.style():
        rows = 1 + bool(fractions)
        figure, axes = figures.new(figures.COLUMN, 1.7 * rows + 0.5, rows, 1)
        colours = itertools.cycle(figures.PALETTE)
        for row, names in enumerate((losses, fractions)[:rows]):
            axis = axes[row, 0]
            for name in names:
                axis.plot(steps, history.column(name), "o-", color=next(colours),
                          label=labels.get(name, name), markersize=3)  # fmt: skip
            axis.legend()
        axes[0, 0].set(ylabel="loss", title=title)
        if fractions:
            axes[1, 0].set(ylabel="fraction", ylim=(-0.03, 1.03))
        axes[-1, 0].set_xlabel("step")
    return figure


# What each criterion's statistic is, as an axis says it.
STATISTICS = {
    "collapse": "distance to the nearest row",
    "ratio": "nearest / second nearest",
    "merged": "nearest / next distinct row",
    "neighbourhood": "nearest / mean of the next rows",
    "carlini": "nearest / mean of the nearest rows",
    "exact": "differing features",
}


def criteria(found: Mapping[str, Memorization], title: str | None = None) -> Figure:
    """A histogram of each criterion's statistic, memorised samples in their own colour, the
    threshold as a line.

    Raises: ValueError for no criteria.
    """
    if not found:
        raise ValueError("expected at least one criterion, got none")
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    with figures.style():
        figure, axes = figures.new(2.2 * columns + 0.3, 1.7 * rows + 0.5, rows, columns)
        for axis in axes.flat[len(found) :]:
            axis.set_axis_off()
        for axis, (name, one) in zip(axes.flat, found.items(), strict=False):
            value = one.value.cpu().numpy()
            finite = np.isfinite(value)
            copied = one.memorized.cpu().numpy()[finite]
            value = value[finite]
            top = max(float(value.max(initial=0.0)), 1.2 * one.threshold)
            bins = np.linspace(0.0, top, 31).tolist()
            parts = [value[copied], value[~copied]]
            axis.hist(parts, bins, stacked=True, color=[figures.VERMILION, figures.BLUE],
                      label=["memorised", "new"])  # fmt: skip
            axis.axvline(one.threshold, color=figures.GREY, lw=0.9, ls="--")
            axis.set(xlabel=STATISTICS.get(name, name), xlim=(0, top))
            axis.locator_params("x", nbins=4)  # 0.0025, 0.0050, ... would run into one another
            axis.set_title(f"{name}: {one.fraction:.1%}")
        for row in axes:
            row[0].set_ylabel("samples")
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        if title:
            figure.suptitle(title, fontsize=9)
    return figure
