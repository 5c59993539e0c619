"""`memokern completion` and `memokern help`."""

from __future__ import annotations

import argparse
import re
from typing import Any

import click
import shtab

from memokern.apps import experiments
from memokern.apps.cli import common, pages

SHELLS = ("bash", "zsh", "fish")
PLACES = {
    "bash": "~/.local/share/bash-completion/completions/memokern",
    "zsh": "a folder of $fpath, as _memokern",
    "fish": "~/.config/fish/completions/memokern.fish",
}
# Metavars of what is the name of a file, or of a folder of pictures.
FILES = re.compile(r"\[?(FILE|DATA|SAMPLES|DIR)\b")


@click.command(
    cls=pages.Command,
    short_help="Print a script that completes memokern's words in a shell.",
    epilog="\b\nWhere the script goes:\n"
    + "\n".join(f"  {shell:<5} {place}" for shell, place in PLACES.items()),
)
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a script with which the Tab key completes memokern's commands, options, their choices
    and names of files. It knows them all itself, and answers at once.

    Example: memokern completion bash > ~/.local/share/bash-completion/completions/memokern
    """
    root = context.find_root().command
    assert isinstance(root, click.Group)
    click.echo(shtab.complete(parser(root, context.find_root()), shell))


@click.command("help", cls=pages.Command, short_help="Show a command's manual page.")
@click.argument("name", metavar="[COMMAND]", required=False)
@click.pass_context
def show(context: click.Context, name: str | None) -> None:
    """Show the manual page of a command, or of memokern, page by page on a terminal.

    Example: memokern help sample
    """
    root = context.find_root()
    group = root.command
    assert isinstance(group, click.Group)
    if name is None:
        click.echo_via_pager(pages.page(root))
        return
    command = group.get_command(root, name)
    if command is None:
        known = ", ".join(group.commands)
        raise common.WrongInput(f"COMMAND: no command {name!r}; there are {known}")
    with click.Context(command, info_name=name, parent=root) as inner:
        click.echo_via_pager(pages.page(inner))


def parser(group: click.Group, context: click.Context) -> argparse.ArgumentParser:
    """The words of the command line as argparse knows them, which is what shtab reads."""
    root = argparse.ArgumentParser(prog=group.name, add_help=False)
    _options(root, group, context)
    commands = root.add_subparsers()
    for name, command in group.commands.items():
        inner = click.Context(command, info_name=name, parent=context)
        short = command.get_short_help_str(200)
        _options(commands.add_parser(name, help=short, add_help=False), command, inner)
    return root


def _options(
    parser: argparse.ArgumentParser, command: click.Command, context: click.Context
) -> None:
    for param in command.get_params(context):
        settings: dict[str, Any] = {}
        if isinstance(param, click.Option):
            names = [*param.opts, *param.secondary_opts]
            text = param.help or ""
            settings["help"] = re.sub(r"\s+", " ", text).replace("%", "%%")
            if param.is_flag or param.count:
                settings["action"] = "store_true"
        else:
            names = [param.name or ""]
        choices = _choices(param, context)
        if choices:
            settings["choices"] = choices
        made: Any = parser.add_argument(*names, **settings)
        if "action" not in settings and FILES.match(str(param.metavar or "")):
            made.complete = shtab.DIRECTORY if "DIR" in str(param.metavar) else shtab.FILE


def _choices(param: click.Parameter, context: click.Context) -> list[str]:
    """The words that a parameter may be; none where there is no end of them."""
    if isinstance(param.type, click.Choice):
        return [str(choice) for choice in param.type.choices]
    if param.metavar == "NAME|all":
        return [*experiments.EXPERIMENTS, "all"]
    root = context.find_root().command
    if param.metavar == "[COMMAND]" and isinstance(root, click.Group):
        return list(root.commands)
    return []
