"""The command line and the index: made, saved, used, and what --verbose and --log say of it."""

from __future__ import annotations

import csv
import errno
import json
import os
from unittest import mock

import pytest
import safetensors.torch
import torch

from memokern import TrainingSet
from memokern.apps.cli import room
from memokern.data import files
from memokern.index import unfinished
from memokern.index.basis import Cosine
from tests.apps.cli_calls import call

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = ["sample", "-n", 3, "--steps", 6, "--seed", 1]


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """The digits with an index, saved by the command."""
    path = tmp_path_factory.mktemp("data") / "digits.safetensors"
    done = call("index", "digits", "--output", path)
    assert done.exit_code == 0, done.output
    assert "Index(dct: 1797 rows, 32 to 64 of 64 dimensions" in done.stdout
    assert f"wrote {path} (index built in " in done.stdout
    return path


def test_an_index_is_saved_with_rows_and_labels(indexed, tmp_path) -> None:
    data, digits = TrainingSet.load(indexed), TrainingSet.digits()
    assert data.index is not None and torch.equal(data.rows, digits.rows)
    assert torch.equal(data.labels, digits.labels) and data.scale == digits.scale
    again = tmp_path / "pca.safetensors"
    assert call("index", indexed, "--basis", "pca", "-o", again).exit_code == 0
    assert TrainingSet.load(again).index.basis == "pca"
    refused = call("index", "digits", "-o", again)
    assert refused.exit_code == 2 and "give --force to replace it" in refused.stderr


def test_a_build_that_was_killed_goes_on(indexed, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(unfinished, "SECONDS", 0.0)
    path = tmp_path / "digits.safetensors"
    arguments = ("index", "digits", "--output", path, "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(TrainingSet, "save", lambda *_: os._exit(0))
        child = os.fork()
        if child == 0:  # which ends as a process that is killed does, after its index is made
            call(*arguments)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
    assert not path.exists() and (tmp_path / "digits.safetensors.partial" / "coarse.rows").exists()
    patched = mock.patch.object(Cosine, "coordinates", side_effect=AssertionError("once more"))
    with patched:
        done = call(*arguments)
    assert done.exit_code == 0, done.output
    assert list(tmp_path.iterdir()) == [path]
    mine, plain = (TrainingSet.load(p).index for p in (path, indexed))
    assert torch.equal(mine.fine, plain.fine) and torch.equal(mine.coarse, plain.coarse)


def test_a_full_disk_is_told_before_anything_is_computed(tmp_path, monkeypatch) -> None:
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with mock.patch.object(Cosine, "coordinates", side_effect=AssertionError("in vain")):
        done = call("index", "digits", "--output", tmp_path / "d.safetensors", "--resume")
    assert done.exit_code == 1 and len(done.stderr.splitlines()) == 1
    assert f"--resume: cannot write {tmp_path}/d.safetensors.partial" in done.stderr
    assert "No space left on device for " in done.stderr and "DATA" not in done.stderr


@pytest.mark.parametrize("label", [[], ["--label", 4]])
def test_samples_are_those_of_dense_sweeps(indexed, tmp_path, label) -> None:
    facts = {}
    for method in ("dense", "auto", "pruned"):
        report = tmp_path / f"{method}.json"
        done = call(*STEPS, "--data", indexed, "--method", method, "--json", report, *label)
        assert done.exit_code == 0, done.output
        # A dense sweep leaves the file's index where it is.
        index = "no index" if method == "dense" else "Index(dct: 1797 rows"
        assert f"method       {method}, {index}" in done.stdout
        facts[method] = json.loads(report.read_text())
    each = [f["each"]["index"] for f in facts.values()]
    assert each[0] == each[1] == each[2]
    assert facts["pruned"]["method"] == "pruned" and "dct" in facts["pruned"]["index"]


def test_a_damaged_index_is_told_with_the_way_out(indexed, tmp_path) -> None:
    path = tmp_path / "damaged.safetensors"
    tensors, metadata = safetensors.torch.load_file(indexed), files.read_metadata(indexed)
    tensors["rows"] = tensors["rows"].flip(0)
    safetensors.torch.save_file(tensors, path, metadata)
    files.write_npz(tmp_path / "s.npz", samples=TrainingSet.digits()[:3])
    for command in ([*STEPS, "--data", path], ["memorization", tmp_path / "s.npz", path]):
        done = call(*command)
        assert done.exit_code == 2 and "does not belong to these 1797 rows" in done.stderr
        hint = "'memokern index' makes a new one, --method dense needs none"
        assert hint in done.stderr and done.stderr.count("\n") == 1
        assert call(*command, "--method", "dense").exit_code == 0
    assert call("index", path, "-o", path, "--force").exit_code == 0
    assert call(*STEPS, "--data", path).exit_code == 0


def read(path):
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with path.open(newline="") as file:
        return [
            {name: float(text) if text else None for name, text in row.items()}
            for row in csv.DictReader(file)
        ]


@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_verbose_says_what_was_done_and_log_keeps_it(indexed, tmp_path, suffix) -> None:
    path = tmp_path / f"run.{suffix}"
    steps = [*STEPS, "--solver", "heun"]
    done = call(*steps, "--data", indexed, "--method", "pruned", "--verbose", "--log", path)
    assert done.exit_code == 0, done.output
    records = read(path)
    header, *lines = done.stderr.splitlines()
    assert " ".join(header.split()) == (
        "step eval sigma rows kept at most dense dims mean error time queries part"
    )
    assert len(lines) == len(records) == 11  # two evaluations a step, one for the last
    assert [r["step"] for r in records] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    for line, record in zip(lines, records, strict=True):
        step, evaluation, sigma, mean, most, dense, dims, error, *_ = line.split()
        assert (int(step), int(evaluation)) == (record["step"], record["evaluation"])
        assert float(sigma) == pytest.approx(record["sigma"], rel=1e-3)
        assert float(mean) == pytest.approx(record["rows_kept_mean"], abs=0.05)
        assert int(most) == record["rows_kept_max"] <= 1797 and int(dense) == 0
        assert int(dims) == record["dims"] in (32, 64)
        assert float(error) == pytest.approx(record["mean_error_max"], rel=0.06)
        assert record["queries"] == 3 and record["seconds"] > 0
        assert 0 <= record["weight_dropped_max"] <= 1e-6
    first, last = records[0], records[-1]
    assert first["sigma"] == 80 and first["rows_kept_mean"] == 1797
    assert last["rows_kept_max"] < 10 and 0 < last["mean_error_max"] < 1e-4
    assert f"wrote        {path}" in done.stdout
    quiet = call(*steps, "--data", indexed, "--method", "pruned", "--log", path, "--force")
    assert quiet.exit_code == 0 and quiet.stderr == ""
    assert [r["rows_kept_mean"] for r in read(path)] == [r["rows_kept_mean"] for r in records]


def test_verbose_says_which_part_of_the_trajectory_an_evaluation_was_of(tmp_path) -> None:
    path = tmp_path / "run.json"
    done = call("sample", "-n", 6, "--verbose", "--log", path)
    assert done.exit_code == 0, done.output
    parts = [line.split()[-1] for line in done.stderr.splitlines()[1:]]
    counts = [int(line.split()[-2]) for line in done.stderr.splitlines()[1:]]
    records = json.loads(path.read_text())
    assert parts == [r["phase"] for r in records] and counts == [r["queries"] for r in records]
    order = ["gaussian", "middle", "end"]
    assert set(parts) >= set(order[:2]) and parts == sorted(parts, key=order.index)
    assert counts[0] == 6 > counts[-1] and len(parts) < 20


def test_verbose_without_an_index_says_dense() -> None:
    done = call("sample", "-n", 2, "--verbose", "--solver", "sde", "--steps", 3)
    assert done.exit_code == 0, done.output
    assert "method       auto, no index" in done.stdout
    lines = done.stderr.splitlines()[1:]
    assert [line.split()[:2] for line in lines] == [["1", "1"], ["2", "2"], ["3", "3"]]
    assert [line.split()[3:8] for line in lines] == [["1797.0", "1797", "2", "-", "0"]] * 3
    done = call("sample", "-n", 2, "--verbose", "--solver", "rk45", "--sigma-min", 1)
    assert done.exit_code == 0 and done.stderr.splitlines()[1].split()[0] == "-"


def test_the_metrics_use_an_index_too(indexed, tmp_path) -> None:
    path = tmp_path / "s.npz"
    files.write_npz(path, samples=TrainingSet.digits()[:30] + 0.01)
    outputs = [
        call("memorization", path, indexed, "--method", method).stdout
        for method in ("dense", "pruned", "auto")
    ]
    assert outputs[0] == outputs[1] == outputs[2] and "closest samples" in outputs[0]


def test_an_index_is_built_where_it_pays(monkeypatch) -> None:
    """Many images of many features, for many queries; by all means if pruning is asked for."""
    images = torch.zeros(room.INDEX_ROWS, 3, 16, 16, dtype=torch.uint8)
    images[:, 0, 0] = torch.arange(room.INDEX_ROWS)[:, None].to(torch.uint8)
    few, many = room.INDEX_PAYS - 1, room.INDEX_PAYS
    flat, cut = images.flatten(1), images[1:]
    for rows, method, queries, built in (
        (images, "auto", many, True),
        (images, "auto", few, False),
        (cut, "auto", many, False),
        (images[:, :1, :8, :8], "auto", many, False),
        (flat, "auto", many, False),
        (images, "dense", many, False),
        (cut, "pruned", 1, True),
        (flat, "pruned", 1, True),
    ):
        data = TrainingSet(rows)
        room.index_for(data, method, queries, progress=False)
        assert (data.index is not None) == built, (rows.shape, method, queries)
    data = TrainingSet(images).build_index(dims=(16,))
    room.index_for(data, "pruned", many, progress=False)
    assert data.index.dims == (16,)


def test_sample_counts_the_queries_an_index_would_serve(monkeypatch) -> None:
    wanted = []
    monkeypatch.setattr(room, "index_for", lambda data, method, n, **_: wanted.append(n))
    for arguments in (
        ["-n", 3, "--steps", 4],
        ["-n", 3, "--steps", 4, "--solver", "heun"],
        ["-n", 3, "--steps", 4, "--solver", "euler"],
        ["-n", 2, "--solver", "sde", "--steps", 5],
    ):
        assert call("sample", *arguments).exit_code == 0
    assert wanted == [12, 24, 12, 10]
