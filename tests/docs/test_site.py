"""The site: what its pages link to in every run, the whole of it built in long ones."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.check_site import check

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "csrc").rglob("*.md")]
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(?:#[^)\s]*)?\)")
FENCED = re.compile(r"^( *)```.*?^\1```", re.S | re.M)


def is_there(page, link):
    target = (page.parent / link).resolve()
    if target.parent.name == "auto_gallery":  # made of the scripts
        return target.stem == "index" or (ROOT / "examples" / f"{target.stem}.py").is_file()
    return target.exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page):
    text = FENCED.sub("", page.read_text())
    assert [link for link in LINK.findall(text) if not is_there(page, link)] == []


def test_figures_are_those_that_the_script_draws():
    drawn = re.search(
        r"^FIGURES = .* in \((.*)\)\}$", (ROOT / "docs/figures/draw.py").read_text(), re.M
    )
    names = set(drawn[1].split(", "))
    assert {p.stem for p in (ROOT / "docs" / "figures").glob("*.svg")} == names
    shown = {
        m
        for p in (ROOT / "docs" / "how").glob("*.md")
        for m in re.findall(r"figures/(\w+)\.svg", p.read_text())
    }
    assert shown == names


@pytest.mark.long
def test_the_site_builds_without_a_warning(tmp_path):
    missing = [
        m for m in ("furo", "myst_parser", "sphinx_gallery") if not importlib.util.find_spec(m)
    ]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; make docs installs them")
    # Of a copy: the gallery's pages are made beside the others, here without their pictures.
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("auto_gallery"))
    for folder in ("examples", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for file in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / file, tmp_path)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    command += ["-D", "sphinx_gallery_conf.plot_gallery=False", "docs", "site"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    faults, _ = check(tmp_path / "site")
    assert faults == []
