"""What the commands share: errors in one line, loading of data, and checks of outputs before the
long work.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from memokern import TrainingSet, sweep
from memokern.apps import figures, info
from memokern.data import layout as layouts
from memokern.data import sources
from memokern.index.index import REBUILD_HINT

MOST_NAME_BYTES = 255  # of a file, with all common file systems

STDOUT = Path("-")  # stands for the standard output where a file is expected
DIGITS = "digits"  # stands for the embedded data set where a file is expected


class Group(click.Group):
    """A click group whose errors are one line on stderr.

    Exit codes: 0 done, 1 a failure while computing or writing, 2 wrong input, 130 interrupted. A
    bug keeps its traceback.
    """

    given: Sequence[str] = ()  # the arguments as they came

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        run: Any = super().main
        given = args[0] if args else extra.get("args")
        self.given = list(sys.argv[1:] if given is None else given)
        if not standalone_mode:
            return run(*args, standalone_mode=False, **extra)
        try:
            code = run(*args, standalone_mode=False, **extra)
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            name = context.command_path if context is not None else self.name or "memokern"
            help_line = f" (see {name} --help)" if isinstance(error, click.UsageError) else ""
            click.echo(
                f"{name}: error: {' '.join(error.format_message().split())}{help_line}", err=True
            )
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            click.echo("memokern: interrupted; no output was left half written", err=True)
            sys.exit(130)
        sys.exit(code if isinstance(code, int) else 0)


class WrongInput(click.ClickException):
    """An input that cannot be used: one line, exit code 2."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.ctx = click.get_current_context(silent=True)  # names the command in the message


# How the library's arguments about a file are named in its messages, as options: the prefix of the
# file's options comes before them.
ARGUMENT = re.compile(r"\b(key|shape|layout)=(\([^)]*\)|'[^']*')?")


def _as_option(match: re.Match[str], prefix: str) -> str:
    value = (match[2] or "").strip("'()").replace(" ", "").rstrip(",")
    return f"{prefix}{match[1]} {value}".rstrip()


@contextlib.contextmanager
def wrong_input(about: str | None = None, prefix: str = "--") -> Iterator[None]:
    """Turn the library's errors about an input into one line and exit code 2. The line starts with
    `about`, such as the option that gave the input, whose other options start with `prefix`.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError) as error:
        # Arguments and methods of the library are options and commands here.
        message = str(error) or type(error).__name__
        message = ARGUMENT.sub(functools.partial(_as_option, prefix=prefix), message)
        message = message.replace(
            REBUILD_HINT, "'memokern index' makes a new one, --method dense needs none"
        )
        raise WrongInput(f"{about}: {message}" if about else message) from error


def check_machine(device: torch.device | None = None) -> None:
    """Refuse a wrong MEMOKERN_ environment variable, and a backend that cannot run here, before
    anything is computed or written.
    """
    with wrong_input():
        info.check_backend("cpu" if device is None else device.type)


def device(name: str) -> torch.device:
    """The device of that name, if PyTorch has it on this machine."""
    known = {"cpu": torch.device("cpu")}
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        for i in range(torch.accelerator.device_count()):
            known[f"{accelerator.type}:{i}"] = torch.device(accelerator.type, i)
        known[accelerator.type] = torch.device(
            accelerator.type, torch.accelerator.current_device_index()
        )
    if name not in known:
        raise WrongInput(f"--device: no {name!r} on this machine; there is {', '.join(known)}")
    return known[name]


@contextlib.contextmanager
def failure(
    about: str, kinds: tuple[type[Exception], ...] = (OSError, MemoryError)
) -> Iterator[None]:
    """Turn a failure of the machine (a full disk, too little memory), or of other `kinds`, into one
    line and exit code 1.
    """
    try:
        yield
    except kinds as error:
        raise click.ClickException(f"{about}: {error or type(error).__name__}") from error


def load(
    source: str,
    key: str | None,
    about: str,
    prefix: str = "--",
    *,
    shape: tuple[int, ...] | None = None,
    layout: str | None = None,
    index: bool = True,
    check: bool = True,
) -> TrainingSet:
    """The training set in a file (.npy, .npz, .safetensors), with the file's index if `index`, in a
    folder of pictures, or the embedded digits for the word "digits". `prefix` starts the options
    about the data.
    """
    with wrong_input(about, prefix):
        if source == DIGITS and not Path(source).exists():
            if key is not None:
                raise ValueError(
                    f"a key needs a data file, got {key!r} with the embedded digits: leave it out"
                )
            if shape is not None or layout is not None:
                raise ValueError("shape and layout are for data files, not the embedded digits")
            return TrainingSet.digits()
        return TrainingSet(source, key=key, shape=shape, layout=layout, index=index, check=check)


def load_samples(
    source: str,
    key: str | None,
    data: TrainingSet,
    *,
    shape: tuple[int, ...] | None = None,
    layout: str | None = None,
) -> torch.Tensor:
    """Samples [S, *data.shape] of a file or folder, floating point, in the data's units. Only axes
    of one entry may differ from the data's shape, since they change the order of nothing.
    """
    with wrong_input("SAMPLES", "--samples-"):
        rows = layouts.arranged(sources.read(source, key)["rows"], shape, layout, "samples")
        long = [k for k in data.shape if k != 1]
        if rows.ndim == 0 or [k for k in rows.shape[1:] if k != 1] != long:
            layouts.require_same_shape(rows, data.shape, "samples of shape")
        if len(rows) == 0:
            raise ValueError("expected at least one sample, got none")
        if rows.dtype == torch.uint8 and data.rows.dtype == torch.uint8:
            rows = data.dequantize(rows)
        elif not rows.is_floating_point():
            raise TypeError(
                f"expected samples of a floating type (or uint8 like the data), got {rows.dtype} "
                f"for {data.rows.dtype} data"
            )
        rows = rows.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
        if not rows.isfinite().all():
            raise ValueError("samples hold NaN or infinite values")
        return rows.reshape(len(rows), *data.shape)


class Shape(click.ParamType):
    """The shape of a row on the command line: 3,32,32."""

    name = "shape"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(int(part) for part in value.split(","))
        except ValueError:
            found = ()
        if not found or any(not 1 <= k < 2**31 for k in found):
            self.fail(f"{value!r} is not a shape such as 3,32,32", param, ctx)
        return found


def arrangement(about: str, *prefixes: str) -> Callable[..., Any]:
    """The options --shape and --layout about a file, each with all these prefixes; the parameter is
    named by the last."""

    def named(option: str) -> list[str]:
        names = [f"{prefix}{option}" for prefix in prefixes]
        return [*names, names[-1].strip("-").replace("-", "_")]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in (
            click.option(
                *named("layout"),
                type=click.Choice(layouts.LAYOUTS),
                help=f"hwc: {about} are images [N, H, W, C], channels last, to be taken as "
                "[N, C, H, W].",
            ),
            click.option(
                *named("shape"),
                type=Shape(),
                metavar="C,H,W",
                help=f"The shape of each of {about} in the file, where they are flat.",
            ),
        ):
            command = option(command)
        return command

    return decorate


@contextlib.contextmanager
def warnings_in_lines() -> Iterator[None]:
    """Show the library's warnings as one line each on stderr."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    name = click.get_current_context().command_path
    for warning in caught:
        click.echo(f"{name}: warning: {' '.join(str(warning.message).split())}", err=True)


def method_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """--method, of the commands that sweep over the rows."""
    return click.option(
        "--method",
        default="auto",
        show_default=True,
        type=click.Choice(sweep.METHODS),
        help="dense: sweep over all rows. pruned: over those that an index cannot prove to have "
        "no weight; the index is the data file's ('memokern index' makes such files), or is "
        "built. auto: what is faster, and an index is built only where that pays.",
    )(command)


def criteria(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of the criteria that `sample` and `memorization` share."""
    for option in (
        click.option(
            "--ratio",
            "ratio_threshold",
            default=1 / 3,
            show_default="1/3",
            type=float,
            help="Ratio criterion: nearest over second nearest distance below this.",
        ),
        click.option(
            "--tolerance",
            default=1e-2,
            show_default=True,
            type=float,
            help="Collapse criterion: L2 distance to the nearest row below this.",
        ),
    ):
        command = option(command)
    return command


def check_positive(options: Mapping[str, float | None]) -> None:
    """Refuse option values that are not finite and > 0; None is an option left out."""
    for option, value in options.items():
        if value is not None and not 0 < value < float("inf"):
            raise WrongInput(f"{option}: expected a positive number, got {value}")


def check_two_rows(data: TrainingSet, about: str) -> None:
    """Refuse data in which no row is the second nearest."""
    if data.n < 2:
        raise WrongInput(f"{about}: the ratio criterion needs at least 2 rows, got {data.n}")


def picture_folder(out: Path) -> None:
    """Make the folder of a command that draws, once what it needs is known to be there."""
    with wrong_input():
        figures.require()
    check_machine()
    with wrong_input("--out"):
        if out.exists() and not out.is_dir():
            raise ValueError(f"{str(out)!r} is a file, not a folder")
        out.mkdir(parents=True, exist_ok=True)


def check_outputs(outputs: Sequence[tuple[str, Path | None, tuple[str, ...]]], force: bool) -> None:
    """Refuse, before the long work, outputs that could not be written.

    Args:
        outputs: (option, path or None, suffixes allowed).
        force: an existing file may be replaced.
    """
    seen: dict[Path, str] = {}
    for option, path, suffixes in outputs:
        if path is None or path == STDOUT:
            continue
        with wrong_input(option):  # the system may refuse the name or the folder
            _check_output(path, suffixes, force)
            whole = path.resolve()
            if whole in seen:
                raise ValueError(f"{str(path)!r} is also what {seen[whole]} would write")
            seen[whole] = option


def _check_output(path: Path, suffixes: tuple[str, ...], force: bool) -> None:
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"the name must end in {', '.join(suffixes)}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"no such folder: {str(path.parent)!r}; make it first")
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder")
    if path.exists() and not force:
        raise ValueError(f"{str(path)!r} exists; give --force to replace it")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write into the folder {str(path.parent)!r}")
    if len(os.fsencode(path.name)) > MOST_NAME_BYTES:
        raise ValueError(f"the name is too long: {len(os.fsencode(path.name))} bytes")


def progress_wanted() -> bool:
    """Progress bars only where somebody watches."""
    return sys.stderr.isatty()


def seconds(value: float) -> str:
    """A duration with the unit that suits it.

    Example:
        >>> from memokern.apps.cli.common import seconds
        >>> [seconds(v) for v in (0.0000123, 0.0123, 1.23, 123.4)]
        ['12.3 us', '12.3 ms', '1.23 s', '123 s']
    """
    for unit, scale in (("us", 1e-6), ("ms", 1e-3)):
        if value < 1000 * scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g} s"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Rows of text under a header, in columns; the columns with numbers in `right` align to the
    right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for row in (header, ["-" * w for w in widths], *rows):
        cells = [
            c.rjust(w) if i in right else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
