"""The gallery's scripts: what they are made of in every run, their execution in long ones."""

import ast
import importlib
import re
import runpy
import time
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
SECONDS = 30.0  # on two cores; a busy machine may take three times as long


def imported(tree):
    """(module, name or None) of each import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((a.name, None) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, a.name) for a in node.names)


def test_there_are_eight_in_their_order():
    assert [p.name.split("_")[:2] for p in SCRIPTS] == [["plot", str(i)] for i in range(1, 9)]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_a_script_is_a_page(path):
    text = path.read_text()
    tree = ast.parse(text)
    title, line, empty = ast.get_docstring(tree).split("\n")[:3]
    assert line == "=" * len(title)
    assert not empty
    assert text.count("\n# %%\n") >= 2
    assert "plt.show()" in text
    assert len(text.splitlines()) <= 90
    for module, name in imported(tree):
        assert module.split(".")[0] in {"memokern", "torch", "matplotlib", "itertools"}
        if module.startswith("memokern"):
            found = importlib.import_module(module)
            if name is not None and not hasattr(found, name):
                importlib.import_module(f"{module}.{name}")


@pytest.mark.long
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_a_script_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    began = time.process_time()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plt, "show", lambda: None)
            runpy.run_path(str(path))
        assert plt.get_fignums()
    finally:
        plt.close("all")
    said = capsys.readouterr().out  # what it counted or measured is there
    assert not re.search(r"\b(nan|inf|None)\b", said)
    print(f"{path.stem}: {time.process_time() - began:.1f} s of the processor")
    assert not list(tmp_path.iterdir())
