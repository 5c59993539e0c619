"""The options --labels and --labels-key of the commands that use labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from memokern import TrainingSet
from memokern.apps.cli import common
from memokern.data import files
from memokern.data.storage import checked_labels


def labels_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """A file of labels for the rows, instead of those that the data bring."""
    for option in (
        click.option(
            "--labels-key", metavar="NAME", help="Which array of the labels' file; 'labels' if any."
        ),
        click.option(
            "--labels",
            "labels_file",
            metavar="FILE",
            help="An integer for each row, as .npy, .npz or .safetensors, instead of the data's.",
        ),
    ):
        command = option(command)
    return command


def give_labels(data: TrainingSet, source: str | None, key: str | None) -> None:
    """Gives the rows the labels in a file, if there is one."""
    if source is None:
        if key is not None:
            raise common.WrongInput(f"--labels-key: {key!r} needs a file: give --labels")
        return
    with common.wrong_input("--labels", "--labels-"):
        with files.pinned(source) as file:
            if key is None and "labels" in files.keys(file):
                key = "labels"
            labels = files.read_tensor(file, key)
        data.labels = checked_labels(labels, data.n, data.device)
