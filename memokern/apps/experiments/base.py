"""What an experiment is: parameters with the paper's defaults, a pure function that computes
numbers, a figure of them, and conclusions.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memokern.apps import figures
from memokern.util import writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER = "arXiv:2501.15785"
Numbers = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One of the paper's experiments.

    Attributes:
        name: what `memokern reproduce` calls it.
        title: one line on what it shows.
        parameters: a frozen dataclass; its defaults are the paper's (with the seed that the paper
            leaves open).
        run: takes parameters to numbers (plain values and arrays). It is deterministic for a seed,
            writes nothing and prints nothing.
        figure: takes numbers to a figure.
        conclude: takes numbers to statements, one line each, with the numbers that support them.
        quick: parameters with which it takes seconds, for a first look.
    """

    name: str
    title: str
    parameters: type
    run: Callable[[Any], Numbers]
    figure: Callable[[Numbers], Figure]
    conclude: Callable[[Numbers], list[str]]
    quick: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def takes_data(self) -> bool:
        """Whether its parameters have a file of the user's."""
        return "data" in {field.name for field in dataclasses.fields(self.parameters)}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What `reproduce` did.

    Attributes:
        numbers: what was computed. conclusions: what it shows. paths: the files that were written.
        seconds: how long the computation took.
    """

    numbers: Numbers
    conclusions: list[str]
    paths: list[Path]
    seconds: float


def output_paths(experiment: Experiment, folder: Path, suffix: str) -> list[Path]:
    """The figure and the JSON that `reproduce` writes."""
    return [folder / f"{experiment.name}{suffix}", folder / f"{experiment.name}.json"]


def reproduce(
    experiment: Experiment,
    folder: Path,
    *,
    suffix: str = ".pdf",
    quick: bool = False,
    seed: int | None = None,
    data: tuple[str, str | None] | None = None,
) -> Outcome:
    """Run an experiment and write its figure and numbers into `folder` (made if missing), each
    whole or not at all.

    Args:
        suffix: ".pdf", ".png" or ".svg".
        quick: smaller sizes (`Experiment.quick`); the JSON says so in its parameters.
        seed: what replaces the experiment's own seed.
        data: a file of the user's and which array of it, for experiments that `takes_data`.

    Raises:
        RuntimeError: matplotlib is missing (before the computation).
        ValueError: unknown suffix.
    """
    picture, table = output_paths(experiment, folder, suffix)
    figures.check_path(picture)
    folder.mkdir(parents=True, exist_ok=True)
    changes = dict(experiment.quick) if quick else {}
    if seed is not None:
        changes["seed"] = seed
    if data is not None:
        changes |= {"data": data[0], "key": data[1]}
    parameters = experiment.parameters(**changes)
    started = time.perf_counter()
    numbers = experiment.run(parameters)
    seconds = time.perf_counter() - started
    conclusions = experiment.conclude(numbers)
    figures.save(experiment.figure(numbers), picture)
    writing.write_json(
        table,
        {
            "experiment": experiment.name,
            "title": experiment.title,
            "source": PAPER,
            "parameters": dataclasses.asdict(parameters),
            "conclusions": conclusions,
            "numbers": numbers,
        },
    )
    return Outcome(numbers, conclusions, [picture, table], seconds)
