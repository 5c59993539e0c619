"""The table of what every kernel takes on every target, as a page: written, read and checked.

The page names the Triton that compiled it and a digest of the kernels' code, so that a test can
tell whether it is that of the kernels as they are: `make kernels` writes it anew.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import re
from pathlib import Path
from typing import Any, NamedTuple

from memokern.backends import triton

PAGE = Path(__file__).resolve().parent.parent / "docs" / "triton-kernels.md"
SOURCES = Path(triton.__file__).parent
_CELL = re.compile(r"(\d+) r, ([\d.]+) K, ([\d.]+) %(?:, (\S+))?")


class Cell(NamedTuple):
    """One variant on one target. Spilled bytes are not kept: a variant has none."""

    registers: int
    shared: float  # KiB
    occupancy: float  # per cent
    matrix: str


def digest(variants: list[Any]) -> str:
    """Of all that the machine code of these depends on, but for Triton itself: the functions that
    it compiles, the constants that they read, and what each variant is compiled with. What is said
    about the functions doesn't count."""
    import triton.language as tl

    text = []
    for path in sorted(SOURCES.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d)
                                                         for d in node.decorator_list):  # fmt: skip
                if ast.get_docstring(node) is not None:
                    node.body = node.body[1:]
                text.append(ast.unparse(node))
        # By value: a constant may be made of a number that is defined elsewhere.
        parts = path.relative_to(SOURCES).with_suffix("").parts
        module = importlib.import_module(".".join([triton.__name__, *parts]))
        for name, value in vars(module).items():
            if isinstance(value, tl.constexpr):
                text.append(repr((path.stem, name, value.value)))
    for v in variants:
        kernel = getattr(v.kernel, "fn", v.kernel).__name__
        # What a vendor's compiler is given is not all in the fields.
        given = [(v.options(vendor), v.on(vendor).constexprs) for vendor in ("cuda", "hip")]
        text.append(repr((kernel, v._replace(kernel=None, unaligned_fields=None), given)))
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


def page(rows: list[dict[str, Any]], variants: list[Any], triton: str) -> str:
    """rows: of tools.aot.table, without errors, for these variants."""
    options = {v.name: words(v) for v in variants}
    targets = list(dict.fromkeys(row["target"] for row in rows))
    lines = [
        "# What the Triton kernels take",
        "",
        "Every kernel that a launcher can ask for, compiled ahead of time: registers of a thread"
        " (r), shared memory of a block (K: KiB), share of a multiprocessor's warps that are"
        " resident, and the instruction of its matrix products. None spills. Written by"
        " `make kernels`; no GPU was there. –: not for this target.",
        "",
        f"Triton {triton}, kernels {digest(variants)}.",
        "",
        "| kernel | launched with | " + " | ".join(targets) + " |",
        "| --- | --- |" + " --- |" * len(targets),
    ]
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        matrix = f", {row['matrix'].split('.')[0]}" if row["matrix"] else ""
        cells.setdefault(row["variant"], {})[row["target"]] = (
            f"{row['registers']} r, {row['shared'] / 1024:.1f} K, {row['occupancy']:.0%}{matrix}"
        ).replace("%", " %")
    for name, found in cells.items():
        columns = " | ".join(found.get(t, "–") for t in targets)
        lines.append(f"| {name} | {options[name]} | {columns} |")
    return "\n".join(lines) + "\n"


class Page(NamedTuple):
    """What a page says. cells: by variant and target; options: by variant."""

    triton: str
    digest: str
    cells: dict[tuple[str, str], Cell]
    options: dict[str, str]


def read(text: str) -> Page:
    """The page, from its text."""
    head = re.search(r"^Triton (\S+), kernels (\w+)\.$", text, re.MULTILINE)
    table = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert head is not None and table[0][:2] == ["kernel", "launched with"]
    cells, options = {}, {}
    for name, how, *columns in table[2:]:
        options[name] = how
        for target, column in zip(table[0][2:], columns, strict=True):
            if column == "–":
                continue
            found = _CELL.fullmatch(column)
            assert found is not None, column
            cells[name, target] = Cell(
                int(found[1]), float(found[2]), float(found[3]), found[4] or ""
            )
    return Page(head[1], head[2], cells, options)


def words(variant: Any) -> str:
    """How a variant is launched: `4 warps, 2 stages`, and its registers where they are given."""
    text = f"{variant.num_warps} warps, {variant.num_stages} stages"
    return text + (f", at most {variant.registers} r" if variant.registers else "")
