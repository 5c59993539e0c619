"""The HTML report of `memokern memorization`."""

from __future__ import annotations

import base64
import importlib.resources
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from memokern import TrainingSet, memorization
from memokern.apps import report
from tests.apps.cli_calls import call

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("one_thread")

EVIL = "<script>alert('1')&.png"


class Page(HTMLParser):
    """What a browser would make of the page: elements, their attributes, the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Twelve grey pictures as rows, two of which are samples beside one that is new."""
    Image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (13, 8, 8), dtype=np.uint8)
    for name in ("rows", "samples"):
        (tmp_path / name).mkdir()
    for i in range(12):
        Image.fromarray(pixels[i]).save(tmp_path / "rows" / f"{i:02}{EVIL}")
    for i in (0, 1, 12):
        Image.fromarray(pixels[i]).save(tmp_path / "samples" / f"{i:02}{EVIL}")
    return tmp_path


def test_the_page_is_one_file_and_shows_what_was_measured(folders) -> None:
    done = call("memorization", "samples", "rows", "--report", "r.html", "--json", "r.json")
    assert done.exit_code == 0 and "wrote r.html" in done.output, done.output
    assert f"00{EVIL}" in done.output  # names of pictures are in the table as well
    text = (folders / "r.html").read_text()
    page = Page(text)
    tags = [tag for tag, _ in page.elements]
    # Names are text, never elements, and nothing is loaded from elsewhere.
    assert "script" not in tags and "link" not in tags and f"00{EVIL}" in page.text
    sources = [a["src"] for _, a in page.elements if "src" in a]
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"url\(|@import|https?://", text)
    assert all(a.get("alt") for tag, a in page.elements if tag == "img")
    assert "2 of 3 samples are copies" in page.text
    for definition in report.DEFINITIONS.values():
        assert definition.title in page.text and definition.sentence in page.text
    assert "--merge-radius asks for it" in page.text
    marks = [a["class"] for _, a in page.elements if "pair" in a.get("class", "").split()]
    assert marks == ["tile pair copy", "tile pair copy", "tile pair"]
    facts = json.loads((folders / "r.json").read_text())
    assert facts["nearest_files"][:2] == [f"0{i}{EVIL}" for i in range(2)]
    assert {p.name for p in folders.iterdir()} == {"rows", "samples", "r.html", "r.json"}
    refused = call("memorization", "samples", "rows", "--report", "r.html")
    assert refused.exit_code == 2 and "--force" in refused.stderr
    assert call("memorization", "samples", "rows", "--report", "r.pdf").exit_code == 2
    before = text
    again = call("memorization", "samples", "rows", "--report", "r.html", "--force")
    assert again.exit_code == 0 and (folders / "r.html").read_text() == before


def test_what_the_style_is_for_is_there() -> None:
    """A class that no element has is a colour that nobody sees."""
    text = (importlib.resources.files("memokern.apps") / "report.html.j2").read_text("utf-8")
    style, body = text.split("</style>")
    styled = set(re.findall(r"\.([a-z]+)(?=[ .,:{])", style.split("<style>")[1]))
    classes = " ".join(re.findall(r'class="([^"]*)"', body))
    there = set(re.sub(r"\{%.*?%\}", " ", classes).split())
    assert styled == there


def test_a_picture_holds_the_pixels() -> None:
    Image = pytest.importorskip("PIL.Image")
    import io

    row = torch.linspace(-1, 1, 3 * 4 * 5).reshape(3, 4, 5)
    uri = report.picture(row, (-1.0, 1.0))
    drawn = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    wanted = (255 * (row + 1) / 2).round().to(torch.uint8).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(np.array(drawn), wanted)
    large = report.picture(torch.zeros(400, 200), (0.0, 1.0))
    assert Image.open(io.BytesIO(base64.b64decode(large.split(",")[1]))).size == (80, 160)
    assert report.picture(torch.zeros(7), (0.0, 1.0)) is None


@pytest.mark.parametrize("dim", [2, 7])
def test_rows_that_are_no_pictures_have_a_report(dim, tmp_path) -> None:
    rows = torch.randn(9, dim, generator=torch.Generator().manual_seed(0))
    samples = torch.cat([rows[3:4], rows[3:4] + 1e-4, rows[5:6] + 10.0])
    data = TrainingSet(rows)
    found = memorization.report(samples, data, level=0.0, merge_radius=0.1)
    shown = report.gather(samples, data, found)
    assert shown.copied == [(3, 2)] and shown.index[0, 0] == 3
    report.write(tmp_path / "r.html", found, shown, settings={"name": EVIL})
    page = Page((tmp_path / "r.html").read_text())
    assert EVIL in page.text and "row 32 copies" in re.sub(r"\s*\n\s*", "", page.text)
    scatter = [a for _, a in page.elements if a.get("class") == "scatter"]
    assert len(scatter) == (dim == 2)
    assert "Exact match" in page.text and "asks for it" not in page.text
