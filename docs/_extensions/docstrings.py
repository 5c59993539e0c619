"""Docstrings of memokern as reStructuredText.

They are written to be read as text, by help() too: `|x|` is a norm, `[*batch, *shape]` a shape.
What reStructuredText would take for its own is escaped here, and formulas are set.
"""

from __future__ import annotations

import re

from formulas import replaced

# Code, roles and the names of arguments stay as they are.
KEPT = re.compile(r"(:\w+:`[^`]*`|``[^`]*``|`[^`]*`|^\s*[\w*]+(?:, [\w*]+)*:(?=\s)|^ *- )", re.M)
LABELS = ("Args", "Buffers", "Cost", "Errors", "Gradients", "Numerics", "Raises", "Replaces")
LABELS += ("Returns", "Source", "Sources")


def escaped(text: str) -> str:
    """Plain text with what means something to reStructuredText escaped, where it is not yet."""
    text = re.sub(r"(?<!\\)([|*])", r"\\\1", text)
    return re.sub(r"(?<=\w)_(?=\W|$)", r"\\_", text)


def written(text: str) -> str:
    """Text between code and roles, with its formulas as roles."""
    roles: list[str] = []

    def role(tex: str) -> str:
        roles.append(f":math:`{tex}`")
        return "\0"

    text = replaced(text, role)
    # A role has no letters next to it.
    text = re.sub(r"(?<=\w)\0", r"\\ \0", re.sub(r"\0(?=\w)", "\0\\\\ ", escaped(text)))
    return re.sub("\0", lambda _: roles.pop(0), text)


def lists(lines: list[str]) -> list[str]:
    """With an empty line before and after a list, which reStructuredText wants."""
    out: list[str] = []
    inside = None
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if line.lstrip().startswith("- ") and inside is None:
            out.append("")
            inside = indent
        elif inside is not None and indent <= inside and not line.lstrip().startswith("- "):
            out.append("")
            inside = None
        out.append(line)
    return out


def paragraph(lines: list[str]) -> list[str]:
    """One paragraph, without its doctests."""
    parts = KEPT.split("\n".join(lines))
    text = "".join(part if i % 2 else written(part) for i, part in enumerate(parts))
    text = re.sub(rf"^(\s*)({'|'.join(LABELS)}): (?=\S)", r"\1**\2:** ", text)
    return lists(text.split("\n"))


def rewrite(lines: list[str]) -> list[str]:
    out: list[str] = []
    block: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line)
            continue
        code = any(b.lstrip().startswith(">>>") for b in block)
        out += [*(block if code else paragraph(block)), line]
        block = []
    return out


def process(app, what, name, obj, options, lines):
    lines[:] = rewrite(lines)


def setup(app):
    # Before napoleon, which reads the sections.
    app.connect("autodoc-process-docstring", process, priority=400)
    return {"parallel_read_safe": True}
