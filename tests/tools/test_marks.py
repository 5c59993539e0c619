"""Tables go between the marks of a page, and nothing else changes."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from tools import marks


def test_a_table_replaces_what_is_between_the_marks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<a>\nold\n<b>\nafter\n")

    def command(*words: str) -> None:
        monkeypatch.setattr("sys.argv", ["tool", *words])
        parser = argparse.ArgumentParser()
        parser.add_argument("--n", type=int, default=1)
        marks.write_or_print(parser, lambda args: f"new {args.n}", "<a>", "<b>")

    command()
    assert capsys.readouterr().out == "new 1\n" and "old" in page.read_text()
    command("--n", "2", "--markdown", str(page))
    assert page.read_text() == "before\n<a>\nnew 2\n<b>\nafter\n"
