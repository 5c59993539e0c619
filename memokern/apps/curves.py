"""The picture of a training run: losses and the memorised fraction against the step."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from memokern.apps import figures
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
