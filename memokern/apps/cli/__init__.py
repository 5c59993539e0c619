"""The command line, `memokern`. Each command is a thin layer: it reads inputs, calls the library,
and writes results.
"""

from __future__ import annotations

import click

import memokern
from memokern.apps.cli.common import Group
from memokern.apps.cli.metrics import memorization
from memokern.apps.cli.other import demo, index, info, reproduce
from memokern.apps.cli.sample import sample
from memokern.apps.cli.shell import completion, show
from memokern.apps.cli.train import train

__all__ = ["main"]


@click.group(
    name="memokern",
    cls=Group,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(memokern.__version__, prog_name="memokern")
@click.pass_context
def main(context: click.Context) -> None:
    """Closed-form diffusion scores of a training set: sample, measure memorisation, and reproduce
    the analysis.

    `memokern help COMMAND` shows a command's manual page, `memokern COMMAND --help` the short of
    it.

    Exit codes: 0 done, 1 failed while computing or writing, 2 wrong input, 130 interrupted. Files
    are written whole or not at all.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (sample, train, memorization, index, reproduce, demo, info, show, completion):
    main.add_command(command)
