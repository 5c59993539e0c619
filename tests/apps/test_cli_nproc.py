"""--nproc gives what one process does."""

import json
import subprocess
import sys

import numpy as np
import pytest

from memokern import TrainingSet

pytestmark = pytest.mark.long


def run(*args, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "memokern", *map(str, args)], capture_output=True, text=True,
        timeout=100,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_sample_and_memorization(tmp_path):
    out = {n: tmp_path / f"{n}.npz" for n in (1, 2)}
    for n, path in out.items():
        said, _ = run("sample", "-n", 3, "--steps", 4, "--output", path, "--nproc", n)
        assert said.count("wrote") == 1
    one, two = (np.load(path) for path in out.values())
    assert (one["nearest_index"] == two["nearest_index"]).all()
    np.testing.assert_allclose(one["samples"], two["samples"], rtol=1e-4, atol=1e-4)
    report = tmp_path / "report.json"
    folder = tmp_path / "parts"
    run("memorization", out[2], "digits", "--json", report, "--nproc", 2)
    found = json.loads(report.read_text())
    assert found["ratio"]["index"] == two["nearest_index"].tolist()
    run("index", "digits", "--output", folder, "--nproc", 2, "--resume")
    assert not (tmp_path / "parts.partial").exists()
    _, said = run("index", "digits", "--output", folder, "--nproc", 2, code=2)
    assert "give --force to replace it" in said
    parts = sorted(folder.iterdir())
    assert [TrainingSet.load(p).n for p in parts] == [899, 898]
    assert TrainingSet.load(parts[0]).index is not None


def test_errors_are_one_line(tmp_path):
    _, said = run("sample", "--data", tmp_path / "no.npy", "--nproc", 2, code=2)
    assert said.startswith("memokern sample: error: --data: no such file") and said.count("\n") == 1


@pytest.fixture
def folders(tmp_path):
    """Fourteen pictures as rows, and three of them beside a new one as samples."""
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (15, 8, 8), dtype=np.uint8)
    for name, numbers in (("rows", range(14)), ("samples", (0, 6, 13, 14))):
        (tmp_path / name).mkdir()
        for i in numbers:
            image.fromarray(pixels[i]).save(tmp_path / name / f"{i:02}.png")
    return tmp_path / "samples", tmp_path / "rows"


def test_a_report_of_two_processes_is_that_of_one(folders, tmp_path):
    """Copies of the rows of either process, each by its name, and the same page to the byte."""
    pytest.importorskip("matplotlib")
    pages = {n: tmp_path / f"{n}.html" for n in (1, 2)}
    for n, page in pages.items():
        said, _ = run("memorization", *folders, "--report", page, "--nproc", n)
        assert said.count(f"wrote {page}") == 1 and said.count("wrote") == 1
    one, two = (page.read_text() for page in pages.values())
    assert "3 of 4 samples are copies" in two and "06.png" in two and "13.png" in two
    assert one == two
    _, said = run("memorization", *folders, "--report", pages[2], "--nproc", 2, code=2)
    assert "--force" in said and said.count("\n") == 1


def test_json_of_two_processes_is_that_of_one(folders):
    """Nothing else is on the output, though two processes run."""
    one, two = (
        json.loads(run("memorization", *folders, "--json", "--nproc", n)[0]) for n in (1, 2)
    )
    assert two["nearest_files"][:3] == ["00.png", "06.png", "13.png"]
    assert two["collapse"]["memorized"] == [True, True, True, False]
    assert one.keys() == two.keys()
    for criterion in ("collapse", "ratio", "neighbourhood", "carlini"):
        for part in ("value", "distance"):
            np.testing.assert_allclose(
                two[criterion].pop(part), one[criterion].pop(part), rtol=1e-12, atol=0
            )
    assert one == two
