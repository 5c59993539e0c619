"""The record that `memokern sample` keeps of its evaluations: lines to read, and a file."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from memokern.apps.cli import common
from memokern.samplers import Evaluation
from memokern.util import writing

FORMATS = (".json", ".csv")
COLUMNS = (
    f"{'step':>5} {'eval':>5} {'sigma':>9} {'rows kept':>9} {'at most':>8} {'dense':>5} "
    f"{'dims':>5} {'mean error':>11} {'time':>9} {'queries':>7} part"
)


class Log:
    """A record of every evaluation, as a sampler's `watch`.

    Args:
        dims: how many coordinates each level of the index uses; empty without an index.
        show: whether to print each evaluation on stderr.
    """

    def __init__(self, dims: Sequence[int], show: bool) -> None:
        self.dims, self.show = dims, show
        self.records: list[dict[str, Any]] = []

    def __call__(self, done: Evaluation) -> None:
        bounds = done.certificate
        level = int(bounds.levels.max())
        self.records.append(
            {
                "step": done.step,
                "phase": done.phase,
                "evaluation": done.count,
                "t": done.t,
                "alpha": done.alpha,
                "sigma": done.sigma,
                # A smoothing regulariser makes several queries of one sample.
                "queries": bounds.levels.numel(),
                "queries_dense": int((bounds.levels == 0).sum()),
                "rows_kept_mean": float(bounds.rows_kept.double().mean()),
                "rows_kept_max": int(bounds.rows_kept.max()),
                "dims": self.dims[level - 1] if level > 0 else None,
                "weight_dropped_max": float(bounds.weight.max()),
                "mean_error_max": float(bounds.mean_error.max()),
                "score_error_max": float(bounds.score_error.max()),
                "log_z_error_max": float(bounds.log_z_error.max()),
                "seconds": done.seconds,
            }
        )
        if self.show:
            if len(self.records) == 1:
                click.echo(COLUMNS, err=True)
            click.echo(line(self.records[-1]), err=True)

    def write(self, path: Path) -> None:
        """All evaluations: a list of objects in JSON, or a table with a header in CSV."""
        if path.suffix.lower() == ".json":
            writing.write_json(path, self.records)
            return
        text = io.StringIO()
        table = csv.DictWriter(text, list(self.records[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(self.records)
        writing.write_bytes(path, text.getvalue().encode())


def line(record: dict[str, Any]) -> str:
    """One evaluation under the heads of `COLUMNS`, with '-' for what does not apply."""
    step, dims = (record[name] if record[name] is not None else "-" for name in ("step", "dims"))
    return (
        f"{step:>5} {record['evaluation']:>5} {record['sigma']:>9.4g} "
        f"{record['rows_kept_mean']:>9.1f} {record['rows_kept_max']:>8} "
        f"{record['queries_dense']:>5} {dims:>5} {record['mean_error_max']:>11.2g} "
        f"{common.seconds(record['seconds']):>9} {record['queries']:>7} {record['phase'] or '-'}"
    )
