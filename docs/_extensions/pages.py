"""Formulas of the Markdown pages, which are written as text too, set as those of docstrings are.

Sentences, table cells, and indented blocks of which every line is a formula. Code and links stay.
"""

from __future__ import annotations

import re
from pathlib import Path

from formulas import latex, replaced

# Pages with formulas of vectors; in others a run of symbols may be of code.
SET = re.compile(
    r"index|(tasks|how)/.*|conditional|densities|samplers|pruning|memorization|training"
)
KEPT = re.compile(r"(\{[\w:]+\}`[^`]*`|`[^`]*`|!?\[[^\]]*\]\([^)]*\)|<!--.*?-->|https?:\S+)", re.S)


def inline(text: str) -> str:
    parts = KEPT.split(text)
    return "".join(p if i % 2 else replaced(p, "${}$".format) for i, p in enumerate(parts))


def cells(line: str) -> str:
    """A row of a table: its cells one by one, at bars that are not escaped and not in code."""
    parts = re.split(r"((?<!\\)\|)", line)
    return "".join(p if p == "|" else inline(p) for p in parts)


def display(lines: list[str]) -> list[str]:
    """An indented block as a displayed formula, or as it is."""
    try:
        texts = [latex(line.strip()) for line in lines]
    except ValueError:
        return lines
    if not all(re.search(r"=|\\le|\\ge", t) for t in texts):
        return lines
    body = r" \\ ".join(re.sub(r"\s+", " ", t) for t in texts)
    return ["$$", rf"\begin{{gathered}} {body} \end{{gathered}}", "$$"]


def rewrite(text: str) -> str:
    out: list[str] = []
    for block in re.split(r"(\n\s*\n|^```.*?^```[^\n]*$|^:::+[^\n]*$)", text, flags=re.S | re.M):
        lines = block.split("\n")
        if block.startswith(("```", ":::", "#", "<!--", ">>>")) or not block.strip():
            out.append(block)
        elif all(line.startswith("    ") for line in lines if line):
            whole = block.rstrip("\n")
            out.append("\n".join(display(whole.split("\n"))) + block[len(whole) :])
        elif any(line.startswith("|") for line in lines):
            out.append("\n".join(cells(x) if x.startswith("|") else x for x in lines))
        else:
            out.append(inline(block))
    return "".join(out)


def source_read(app, docname, source):
    if SET.fullmatch(docname) and Path(app.env.doc2path(docname)).suffix == ".md":
        source[0] = rewrite(source[0])


def setup(app):
    app.connect("source-read", source_read)
    return {"parallel_read_safe": True}
