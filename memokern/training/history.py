"""What a training run has measured, and when to stop it."""

from __future__ import annotations

import csv
import io
import math
import os
from dataclasses import dataclass
from typing import Any

from memokern.util import checks, writing


class History:
    """The rows of a run's evaluations, each {"step": ..., "epoch": ..., "loss": ..., ...}.

    Example:
        >>> from memokern.training import History
        >>> h = History([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "memorised": 0.5}])
        >>> h.column("memorised")
        [nan, 0.5]
        >>> h.first_step("memorised", 0.3)
        2
    """

    def __init__(self, rows: list[dict[str, Any]] | None = None) -> None:
        self.rows = [] if rows is None else list(rows)

    @property
    def names(self) -> list[str]:
        """The columns, in the order in which they appeared."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def column(self, name: str) -> list[float]:
        """One column, NaN where a row lacks it. KeyError for a name that no row has."""
        if self.rows and name not in self.names:
            raise KeyError(f"no column {name!r}; there are {', '.join(self.names)}")
        return [row.get(name, math.nan) for row in self.rows]

    def first_step(self, name: str, least: float) -> int | None:
        """The first step at which a column is at least `least`; None if it never is."""
        return next((row["step"] for row in self.rows if row.get(name, -math.inf) >= least), None)

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the rows under a line of names, whole or not at all."""
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, self.names, restval="", lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows)
        writing.write_bytes(path, text.getvalue().encode())


@dataclass(frozen=True)
class EarlyStopping:
    """When a run ends before its steps: `monitor` is a column of the history, "held_out" or a
    metric.

    Exactly one of:

    patience: the run stops when the column has had no new minimum for so many evaluations, and
        keeps the weights of the minimum.
    above: it stops when the column is larger than this, as a memorised fraction, and keeps the
        weights of the last evaluation at which it was not.

    Example:
        >>> from memokern.training import EarlyStopping
        >>> stop = EarlyStopping("memorised", above=0.1)
        >>> stop.after([0.0, 0.05, 0.3])  # keep the second, and stop
        (1, True)
        >>> EarlyStopping("held_out", patience=2).after([3.0, 2.0, 2.5])
        (1, False)
    """

    monitor: str
    patience: int | None = None
    above: float | None = None

    def __post_init__(self) -> None:
        if (self.patience is None) == (self.above is None):
            raise ValueError("give either patience or above")
        if self.patience is not None:
            checks.integer("patience", self.patience, 1)
        if self.above is not None:
            checks.number("above", self.above)

    def after(self, values: list[float]) -> tuple[int, bool]:
        """Which evaluation's weights to keep, and whether to stop, given the column so far (NaN
        counts as worse than any number)."""
        if self.above is not None:
            over = [not value <= self.above for value in values]
            if not over[-1]:
                return len(values) - 1, False
            kept = max((i for i, bad in enumerate(over) if not bad), default=0)
            return kept, True
        known = [math.inf if math.isnan(value) else value for value in values]
        best = known.index(min(known))
        assert self.patience is not None
        return best, len(values) - 1 - best >= self.patience
