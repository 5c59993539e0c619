"""The command of a module that makes a table: prints it, or puts it between a page's marks."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def write_or_print(
    parser: argparse.ArgumentParser,
    table: Callable[[argparse.Namespace], str],
    begin: str,
    end: str,
) -> None:
    """table: of the arguments, which the parser reads beside its own --markdown."""
    parser.add_argument("--markdown", type=Path, help="write the table between the page's marks")
    args = parser.parse_args()
    if args.markdown is None:
        print(table(args))
        return
    before, rest = args.markdown.read_text().split(begin)
    after = rest.split(end)[1]
    args.markdown.write_text(f"{before}{begin}\n{table(args)}\n{end}{after}")
