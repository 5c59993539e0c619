"""The benchmark: its real entry point, its arithmetic, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import peers, table

ROOT = Path(__file__).resolve().parent.parent


def bench(*args):
    return subprocess.run(
        [sys.executable, "-m", "bench", *map(str, args)], cwd=ROOT, capture_output=True, text=True
    )


def test_a_small_run_through_the_entry_point(tmp_path):
    out = tmp_path / "figures.json"
    run = bench("--rows", 200, "-k", "accuracy", "--json", out)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(out.read_text())
    assert [line["sigma"] for line in result["accuracy"]] == [80.0, 1.0, 0.1, 0.01, 0.002]
    assert result["sgemm"] > 0 and result["read"] > 0
    assert "GFLOP/s" in run.stdout


@pytest.mark.parametrize("name", ["memokern", "cached", "naive", "cdist", "sdpa"])
def test_peers_agree_with_float64_where_nothing_cancels(name):
    torch.manual_seed(0)
    rows = torch.randn(50, 6)
    x = rows[:5] + torch.randn(5, 6)
    truth = peers.reference(x, rows, 1.0, chunk=7)
    got = peers.available()[name].prepare(rows)(x, 1.0)
    # logits of size r^2 / 2 < 50 carry a few float32 roundings of 6e-8 each
    assert float((got - truth).abs().max()) < 50 * 8 * 6e-8


def test_arithmetic():
    f = table.figures(b=2, n=10, d=5, itemsize=4, seconds=1e-6, sgemm=1e9, read=1e8)
    assert f["gflops"] == pytest.approx(0.4)  # 400 operations in a microsecond
    assert f["gbs"] == pytest.approx(0.2)  # 200 bytes
    assert f["floor"] == pytest.approx(0.5)  # 2 us to read, 0.4 us to compute


def test_figures_of_two_machines_are_refused(tmp_path):
    paths = []
    for cpu in "one", "other":
        paths.append(tmp_path / f"{cpu}.json")
        paths[-1].write_text(json.dumps({"machine": {"cpu": cpu}, "cases": []}))
    run = bench("--compare", *paths)
    assert run.returncode == 2 and "machine" in run.stderr
    assert bench("--compare", paths[0], paths[0]).returncode == 0
