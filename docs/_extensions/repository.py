"""Links from pages to files of the repository that are no pages."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
# Files outside of docs that are shown as pages, from the root of the repository.
SHOWN = {
    "CONTRIBUTING.md": "developers/contributing.md",
    "CHANGELOG.md": "changelog.md",
    "csrc/README.md": "developers/csrc.md",
    "csrc/cuda/README.md": "developers/csrc-cuda.md",
}


def source_read(app, docname, source):
    """In a page that shows a file from elsewhere, links are relative to that file."""
    shown = {page.removesuffix(".md"): file for file, page in SHOWN.items()}
    page = Path(app.env.doc2path(docname))
    folder = (ROOT / shown[docname]).parent if docname in shown else page.parent
    if docname in shown:
        source[0] = (ROOT / shown[docname]).read_text()
        app.env.note_dependency(str(ROOT / shown[docname]))

    def target(match):
        path, _, anchor = match[2].partition("#")
        file = (folder / path).resolve()
        if not path or not file.exists() or not file.is_relative_to(ROOT):
            return match[0]
        name = str(file.relative_to(ROOT))
        if name in SHOWN:
            file = ROOT / "docs" / SHOWN[name]
        elif not name.startswith("docs/"):
            return f"`{name}`" if match[1] in (name, Path(name).name) else f"{match[1]} (`{name}`)"
        up = Path(*[".."] * len(page.parent.relative_to(app.srcdir).parts))
        href = (up / file.relative_to(app.srcdir)).as_posix()
        return f"[{match[1]}]({href}{'#' + anchor if anchor else ''})"

    source[0] = re.sub(r"(?<!!)\[([^\]\[]+)\]\((?!https?:)([^)\s]+)\)", target, source[0])


def setup(app):
    app.connect("source-read", source_read)
    return {"parallel_read_safe": True}
