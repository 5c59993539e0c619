"""--labels, and folders of pictures, on the command line."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from memokern import TrainingSet
from tests.apps.cli_calls import call


@pytest.fixture
def rows(tmp_path):
    """Rows without labels: three far apart, two beside each."""
    y = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]).repeat(3, 1)
    y = y + 0.1 * torch.arange(9)[:, None]
    np.save(tmp_path / "rows.npy", y.numpy())
    np.save(tmp_path / "labels.npy", np.arange(9) % 3)
    return tmp_path


def sample(folder, *more: object):
    return call(
        "sample", "--data", folder / "rows.npy", "--label", 1, "--count", 4, "--steps", 8,
        "--output", folder / "out.npz", "--force", *more,
    )  # fmt: skip


def test_labels_of_a_file_restrict_the_samples(rows) -> None:
    refused = sample(rows)
    assert refused.exit_code == 2 and "--labels" in refused.stderr
    done = sample(rows, "--labels", rows / "labels.npy")
    assert done.exit_code == 0, done.output
    assert "the 3 rows of label 1" in done.stdout
    assert set(np.load(rows / "out.npz")["nearest_index"] % 3) == {1}


def test_which_array_of_a_file_are_the_labels(rows) -> None:
    wanted = np.arange(9) % 3
    np.savez(rows / "both.npz", other=np.zeros(4), labels=wanted)
    assert sample(rows, "--labels", rows / "both.npz").exit_code == 0
    np.savez(rows / "named.npz", other=np.zeros(4), kind=wanted)
    unclear = sample(rows, "--labels", rows / "named.npz")
    assert unclear.exit_code == 2 and "--labels-key" in unclear.stderr
    assert sample(rows, "--labels", rows / "named.npz", "--labels-key", "kind").exit_code == 0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(8), "9"),
        (np.arange(9) / 2, "integer"),
        (np.array(["a"] * 9), "number type"),
        (None, "no such file"),
    ],
)
def test_labels_that_do_not_fit_are_one_line(rows, labels, message) -> None:
    path = rows / "wrong.npy"
    if labels is not None:
        np.save(path, labels)
    refused = sample(rows, "--labels", path)
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1
    assert "--labels:" in refused.stderr and message in refused.stderr
    assert sample(rows, "--labels-key", "x").exit_code == 2


def test_an_index_is_saved_with_the_labels(tmp_path) -> None:
    y = torch.randn(60, 20, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "rows.npy", y.numpy())
    np.save(tmp_path / "labels.npy", np.arange(60) % 7)
    out = tmp_path / "indexed.safetensors"
    done = call(
        "index", tmp_path / "rows.npy", "--labels", tmp_path / "labels.npy", "--output", out
    )
    assert done.exit_code == 0, done.output
    labels = TrainingSet.load(out).labels
    assert labels is not None and labels.tolist() == [i % 7 for i in range(60)]


@pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="Pillow is missing")
def test_folders_are_data_and_samples(tmp_path) -> None:
    from PIL import Image

    for i in range(12):
        folder = tmp_path / "data" / ("even", "odd")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        if i < 3:
            (tmp_path / "samples").mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "samples" / f"{i}.png")
    done = call(
        "sample", "--data", tmp_path / "data", "--label", 1, "--count", 2, "--steps", 4,
        "--output", tmp_path / "out.npz",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "12 rows of shape [8, 8], torch.uint8; sampled from the 6 rows of label 1" in done.stdout
    found = call("memorization", tmp_path / "samples", tmp_path / "data")
    assert found.exit_code == 0 and "3 of 3" in found.stdout
    refused = call("memorization", tmp_path / "nowhere", tmp_path / "data")
    assert refused.exit_code == 2 and refused.stderr.count("\n") == 1
