"""The directive `commands`: the help of each command, as a terminal prints it."""

from __future__ import annotations

from pathlib import Path

import click
from docutils import nodes
from sphinx.util.docutils import SphinxDirective

COLUMNS = 80


class Commands(SphinxDirective):
    """A section for each command, in the order of `memokern --help`."""

    def run(self):
        from memokern.apps import cli

        for path in [Path(__file__), *Path(cli.__file__).parent.glob("*.py")]:
            self.env.note_dependency(str(path))  # the page is made anew when help changes
        main = cli.main
        settings = main.context_settings | {"terminal_width": COLUMNS}
        whole = click.Context(main, info_name="memokern", **settings)
        sections = []
        for name in main.list_commands(whole):
            context = click.Context(main.commands[name], info_name=name, parent=whole)
            title = f"memokern {name}"
            section = nodes.section("", nodes.title(title, title), ids=[nodes.make_id(title)])
            help_text = main.commands[name].get_help(context)
            section += nodes.literal_block(help_text, help_text, language="text")
            sections.append(section)
        return sections


def setup(app):
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True}
