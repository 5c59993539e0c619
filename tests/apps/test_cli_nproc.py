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
