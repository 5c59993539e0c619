"""The options of what samples are asked for: labels, a condition, guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor

from memokern import Denoiser, Given, TrainingSet
from memokern.apps.cli import common


def asked_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What the samples are given."""
    for option in (
        click.option(
            "--guidance",
            type=float,
            metavar="W",
            help="Classifier-free guidance to the label or condition: 1 is none, more exaggerates.",
        ),
        click.option(
            "--bandwidth",
            type=click.FloatRange(min=0),
            metavar="H",
            help="How near conditions count: rows weigh exp(-|c - c_n|^2 / (2 H^2)); 0: exactly.",
        ),
        click.option(
            "--condition",
            metavar="C[,C...]",
            help="Sample given this condition, numbers in the units of the data's array "
            "'conditions'; needs --bandwidth.",
        ),
        click.option(
            "--label",
            metavar="INT[,INT...]",
            help="Sample from the rows of this class only: an integer of the data's array "
            "'labels'; of several, samples take one after the other. "
            "Memorisation is still measured against all rows.",
        ),
    ):
        command = option(command)
    return command


class Asked(NamedTuple):
    """What all samples are given. labels: [count] or None; rows: seen by one sample, on average."""

    labels: Tensor | None
    condition: Tensor | None
    bandwidth: float | None
    guidance: float | None
    rows: float

    def given(self, denoiser: Denoiser) -> Denoiser | Given:
        """The denoiser for these samples."""
        if self.labels is None and self.condition is None:
            return denoiser
        labels = None if self.labels is None else self.labels.to(denoiser.device)
        return Given(denoiser, labels, self.condition, self.bandwidth, self.guidance)

    def try_one(self, denoiser: Denoiser, x: Tensor, t: Tensor) -> None:
        """One query [1, *shape] for each kind of sample."""
        each = [None] if self.labels is None else self.labels.unique().tolist()
        for label in each:
            denoiser(x, t, label, condition=self.condition, bandwidth=self.bandwidth)

    def facts(self) -> dict[str, Any]:
        """For the report."""
        labels = None if self.labels is None else sorted(set(self.labels.tolist()))
        return {
            "label": labels[0] if labels and len(labels) == 1 else labels,
            "condition": None if self.condition is None else self.condition.tolist(),
            "bandwidth": self.bandwidth,
            "guidance": self.guidance,
            "rows_swept": self.rows if self.rows % 1 else int(self.rows),
        }


def read(
    data: TrainingSet,
    count: int,
    label: str | None,
    condition: str | None,
    bandwidth: float | None,
    guidance: float | None,
) -> Asked:
    """The options' values, checked against the data; wrong input where they do not fit."""
    labels, rows = None, float(data.n)
    if label is not None:
        numbers = [_integer(part) for part in label.split(",")]
        sizes = [of_label(data, number).n for number in numbers]
        labels = torch.tensor([numbers[i % len(numbers)] for i in range(count)])
        rows = sum(sizes[i % len(sizes)] for i in range(count)) / count
    wanted = None
    if condition is not None:
        if data.conditions is None:
            raise common.WrongInput(
                "--condition: the data have no conditions; a .npz or .safetensors file brings them "
                "as an array 'conditions' of numbers for each row"
            )
        if bandwidth is None:
            raise common.WrongInput("--condition: needs --bandwidth, how near conditions count")
        wanted = torch.tensor([_number(part) for part in condition.split(",")], dtype=torch.float64)
        k = data.conditions.shape[1]
        if len(wanted) != k:
            raise common.WrongInput(f"--condition: expected {k} numbers, got {len(wanted)}")
    elif bandwidth is not None:
        raise common.WrongInput("--bandwidth: is that of a --condition, which is missing")
    if guidance is not None and label is None and condition is None:
        raise common.WrongInput("--guidance: needs a --label or a --condition to guide to")
    return Asked(labels, wanted, bandwidth, guidance, rows)


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise common.WrongInput(f"--label: {text!r} is not a valid integer") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise common.WrongInput(f"--condition: {text!r} is not a number") from None


def of_label(data: TrainingSet, label: int) -> TrainingSet:
    """The rows of this label; wrong input if none has it, or none can."""
    if data.labels is None:
        raise common.WrongInput(
            "--label: the data have no labels; a .npz or .safetensors file brings them as an "
            "array 'labels' of one integer for each row, another file by --labels"
        )
    with common.wrong_input("--label"):
        return data.where(label)


def described(facts: dict[str, Any]) -> str:
    """Which rows a report's samples are from."""
    label, found = facts["label"], "all rows"
    if label is not None:
        one = not isinstance(label, list)
        names = label if one else ", ".join(map(str, label))
        found = f"the {facts['rows_swept']:g} rows of label{'' if one else 's'} {names}"
        found += "" if one else " (on average)"
    if facts["condition"] is not None:
        near = ", ".join(f"{c:g}" for c in facts["condition"])
        found += f", given a condition within {facts['bandwidth']:g} of {near}"
    return found + ("" if facts["guidance"] is None else f", guidance {facts['guidance']:g}")
