"""--json: what programs read of a command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from memokern.apps.cli import common, ranks
from memokern.util import writing


def json_option(command: Any) -> Any:
    """--json, of a command that says its results as text too."""
    return click.option(
        "--json",
        "report",
        is_flag=False,
        flag_value=str(common.STDOUT),
        type=click.Path(path_type=Path, allow_dash=True),
        metavar="[FILE.json]",
        help="Write the results as JSON too; without a name (or to -) instead of the text.",
    )(command)


def say(text: str, report: Path | None) -> None:
    """Prints text for people, once for all processes, unless JSON takes its place."""
    if report != common.STDOUT:
        ranks.say(text)


def write(report: Path | None, facts: Any) -> None:
    """Writes the results where --json says; the first of several processes does."""
    report = ranks.written_here(report)
    if report == common.STDOUT:
        click.echo(writing.json_text(facts))
    elif report is not None:
        with common.failure("cannot write"):
            writing.write_json(report, facts)


def written(report: Path | None, *others: Path | None) -> list[Path]:
    """Those of the outputs that are files."""
    return [path for path in (report, *others) if path is not None and path != common.STDOUT]
