"""Help: options by what they are for, examples, and pages as `man` shows them."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

import click

# What the parameters of each name are for, in the order of a page; the others come before "Output".
SECTIONS = {
    "Data": (
        "data", "key", "shape", "layout", "labels_file", "labels_key", "samples_key", "data_key",
        "data_shape", "data_layout",
    ),
    "What is sampled or learned": (
        "process", "regularizer_texts", "count", "label", "condition", "bandwidth", "guidance",
        "seed",
    ),
    "Network and loss": (
        "kind", "width", "depth", "tikhonov", "regularizer_text",
    ),
    "Training": (
        "steps", "epochs", "batch", "lr", "ema", "every", "samples", "held_out", "patience",
        "stop_memorised", "checkpoint", "resume",
    ),
    "What counts as a copy": (
        "tolerance", "ratio_threshold", "neighbours", "binary", "merge_radius",
    ),
    "How it is computed": (
        "solver", "sigma_min", "device_name", "method", "nproc", "basis", "quick",
    ),
    "Output": (
        "output", "out", "suffix", "picture", "page", "report", "table", "log_file", "show",
        "verbose", "force",
    ),
}  # fmt: skip
LAST = ("Output", "Options")
CODES = [
    ("0", "Done."),
    ("1", "Failed while computing or writing."),
    ("2", "Wrong input; one line says what was expected."),
    ("130", "Interrupted. Files are written whole or not at all."),
]
EXAMPLE = "Example: "
# A bound that click adds to a description, and that nobody's number comes near to.
UNREACHED = re.compile(r";? ?0<=x<=\d{10,}")


class Command(click.Command):
    """A click command whose help has its options by what they are for.

    Paragraphs of its docstring that begin with "Example: " become a section of their own.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        for option in self.params:
            if isinstance(option, click.Option) and not option.is_flag and option.metavar is None:
                option.metavar = _metavar(option.type)

    def format_help_text(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """What the command does, without the examples."""
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text("\n\n".join(self.described()[0]))

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """The options by section, then the examples."""
        for title, records in self.sections(context):
            with formatter.section(title):
                formatter.write_dl(records)
        self.format_examples(formatter)

    def format_examples(self, formatter: click.HelpFormatter) -> None:
        """The section of examples, each as it is typed."""
        examples = self.described()[1]
        if examples:
            with formatter.section("Examples"):
                for line in examples:
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")

    def described(self) -> tuple[list[str], list[str]]:
        """The paragraphs of the docstring, and its examples, each on one line."""
        paragraphs = [
            " ".join(p.split()) for p in inspect.cleandoc(self.help or "").split("\n\n") if p
        ]
        examples = [p.removeprefix(EXAMPLE) for p in paragraphs if p.startswith(EXAMPLE)]
        return [p for p in paragraphs if not p.startswith(EXAMPLE)], examples

    def sections(self, context: click.Context) -> list[tuple[str, list[tuple[str, str]]]]:
        """(title, records) of the options, and of arguments that have a help of their own."""
        places = {name: title for title, names in SECTIONS.items() for name in names}
        if not any(p.name == "lr" for p in self.params):  # it does not train
            places |= {"steps": "How it is computed", "resume": "Output"}
            places["samples"] = "What is sampled or learned"
        found: dict[str, list[tuple[str, str]]] = {
            title: [] for title in (*[t for t in SECTIONS if t not in LAST], "Options", "Output")
        }
        for param in self.get_params(context):
            record = param.get_help_record(context)
            if record is not None and record[1]:
                described = UNREACHED.sub("", record[1])
                found[places.get(param.name or "", "Options")].append((record[0], described))
        others = found.pop("Options")
        found["Output" if found["Output"] else "Options"] = found["Output"] + others
        return [(title, records) for title, records in found.items() if records]


def _metavar(kind: click.ParamType) -> str | None:
    """N for integers, X for numbers; click's own for the others."""
    if kind.name.startswith("integer"):
        return "N"
    return "X" if kind.name.startswith("float") else None


def page(context: click.Context) -> str:
    """The manual page of the command of a context: sections with heads in capitals, as `man` has
    them."""
    command = context.command
    name = context.command_path
    formatter = context.make_formatter()
    short = command.get_short_help_str(200)
    _section(formatter, "NAME", [f"{name} - {short[:1].lower()}{short[1:].rstrip('.')}"])
    _section(formatter, "SYNOPSIS", [f"{name} {' '.join(command.collect_usage_pieces(context))}"])
    if isinstance(command, Command):
        paragraphs, examples = command.described()
        _section(formatter, "DESCRIPTION", paragraphs)
        for title, records in command.sections(context):
            head = "OPTIONS" if title == "Options" else f"OPTIONS: {title.upper()}"
            _records(formatter, head, records)
        if examples:
            with _headed(formatter, "EXAMPLES"):
                for line in examples:
                    formatter.write(f"    {line}\n")
    elif isinstance(command, click.Group):
        _section(formatter, "DESCRIPTION", [" ".join((command.help or "").split())])
        commands = [(n, c.get_short_help_str(200)) for n, c in command.commands.items()]
        _records(formatter, "COMMANDS", commands)
    if command.epilog:
        with _headed(formatter, "NOTES"):
            formatter.write_text(command.epilog)
    _records(formatter, "EXIT STATUS", CODES)
    return f"{formatter.getvalue().rstrip()}\n"


def _section(formatter: click.HelpFormatter, title: str, paragraphs: Iterable[str]) -> None:
    with _headed(formatter, title):
        formatter.write_text("\n\n".join(paragraphs))


def _records(formatter: click.HelpFormatter, title: str, records: list[tuple[str, str]]) -> None:
    with _headed(formatter, title):
        formatter.write_dl(records, col_max=24)


@contextlib.contextmanager
def _headed(formatter: click.HelpFormatter, title: str) -> Iterator[None]:
    formatter.write(f"{title}\n")
    with formatter.indentation(), formatter.indentation():
        yield
    formatter.write("\n")
