"""The command line: what its commands do. What they refuse: test_cli_errors.py."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from memokern import StreamedSet, TrainingSet
from memokern.apps import experiments
from memokern.apps.cli import room
from memokern.data import files
from memokern.util import memory
from tests.apps.cli_calls import call, process

pytestmark = pytest.mark.usefixtures("one_thread")

DIGIT_ROWS = 1797


@pytest.fixture
def planar(tmp_path):
    """Ten points in the plane in a file."""
    path = tmp_path / "planar.npy"
    np.save(path, np.random.default_rng(0).standard_normal((10, 2)))
    return path


# --- sample ---


def test_unregularised_digits_are_copies_and_every_output_is_written(tmp_path) -> None:
    out = {kind: tmp_path / f"run.{kind}" for kind in ("npz", "png", "json")}
    done = process(
        "sample", "-n", 6, "--output", out["npz"], "--picture", out["png"], "--json", out["json"]
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "collapse  100.0% of 6" in done.stdout and "per score evaluation" in done.stdout
    table = files.read_table(out["npz"])
    digits = TrainingSet.digits()
    assert table["samples"].shape == (6, 8, 8)
    matched = digits.gather(torch.from_numpy(table["nearest_index"]))
    distance = (torch.from_numpy(table["samples"]) - matched).double().flatten(1).norm(dim=1)
    np.testing.assert_allclose(distance, table["nearest_distance"], atol=1e-6)
    assert table["memorized"].all() and table["collapsed"].all()
    report = json.loads(out["json"].read_text())
    assert report["collapse"]["fraction"] == 1.0 and report["data"]["rows"] == DIGIT_ROWS
    assert report["each"]["index"] == table["nearest_index"].tolist()
    assert out["png"].read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in tmp_path.iterdir()} == {"run.npz", "run.png", "run.json"}


def test_the_same_seed_gives_the_same_samples_another_seed_others(tmp_path) -> None:
    paths = [tmp_path / f"{i}.npz" for i in range(3)]
    for path, seed in zip(paths, (3, 3, 4), strict=True):
        assert call("sample", "-n", 2, "--seed", seed, "-o", path).exit_code == 0
    first, second, third = (files.read_table(p)["samples"] for p in paths)
    np.testing.assert_array_equal(first, second)
    assert not np.allclose(first, third)


def test_regularizers_join_and_reduce_memorisation(tmp_path) -> None:
    report = tmp_path / "r.json"
    done = call(
        "sample", "-n", 8, "--regularizer", "tikhonov:c=0.1",
        "--regularizer", "temperature:sigma_c=0.1",
        "--json", report,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    facts = json.loads(report.read_text())
    assert facts["regularizer"] == "tikhonov:c=0.1+temperature:sigma_c=0.1"
    assert facts["collapse"]["fraction"] == 0 and facts["ratio"]["fraction"] == 0


@pytest.mark.parametrize("solver", ["exponential", "euler", "heun", "rk45", "sde"])
@pytest.mark.one_of(2)
def test_every_solver_samples_the_plane(planar, tmp_path, solver) -> None:
    out, picture = tmp_path / "s.npz", tmp_path / "s.pdf"
    done = call(
        "sample", "--data", planar, "--process", "ve", "--solver", solver, "-n", 20,
        "--sigma-min", 0.01, "-o", out, "--picture", picture,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    table = files.read_table(out)
    assert table["samples"].shape == (20, 2) and np.isfinite(table["samples"]).all()
    # Stopped at sigma = 0.01, samples lie within a few noise levels of a training point.
    assert np.median(table["nearest_distance"]) < 5 * 0.01
    assert picture.read_bytes().startswith(b"%PDF")


def test_a_key_chooses_the_array(tmp_path) -> None:
    path = tmp_path / "d.npz"
    files.write_npz(path, left=np.zeros((3, 2)), right=np.eye(2, dtype=np.float32))
    done = call("sample", "--data", path, "--key", "right", "-n", 2, "--steps", 4)
    assert done.exit_code == 0, done.output
    assert "2 rows of shape [2], torch.float32" in done.output


def test_a_label_restricts_the_samples_and_rows_keep_their_numbers(tmp_path) -> None:
    path, report = tmp_path / "d.npz", tmp_path / "r.json"
    digits = TrainingSet.digits()
    for data, solver in (("digits", "heun"), (tmp_path / "half.safetensors", "sde")):
        if data != "digits":
            digits.subset(slice(0, 900)).save(data)
        done = call(
            "sample", "--data", data, "--label", 7, "--solver", solver, "-n", 9,
            "-o", path, "--json", report, "--force",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        table, facts = files.read_table(path), json.loads(report.read_text())
        index = torch.from_numpy(table["nearest_index"])
        # Indices into the whole data, so that they are the user's row numbers.
        assert (digits.labels[index] == 7).all() and len(index.unique()) > 1
        matched = digits.gather(index).numpy()
        np.testing.assert_allclose(table["samples"], matched, atol=0.01)
        rows = digits if data == "digits" else TrainingSet(data)
        count = int((rows.labels == 7).sum())
        assert (facts["label"], facts["rows_swept"], facts["device"]) == (7, count, "cpu")
        assert f"sampled from the {count} rows of label 7" in done.stdout
    assert "sampled from all rows\n" in call("sample", "-n", 1, "--steps", 2).stdout


def test_the_device_asked_for_is_used(tmp_path) -> None:
    """On the CPU what is the default; on an accelerator, where there is one, the same samples."""
    paths = {"default": tmp_path / "default.npz", "cpu": tmp_path / "cpu.npz"}
    if torch.accelerator.is_available():
        paths[torch.accelerator.current_accelerator().type] = tmp_path / "accelerator.npz"
    for name, path in paths.items():
        device = [] if name == "default" else ["--device", name]
        done = call("sample", "-n", 3, "--label", 2, "-o", path, *device)
        assert done.exit_code == 0, done.output
        assert f"on {'cpu' if name == 'default' else name}" in done.stdout
    first, *others = (files.read_table(path) for path in paths.values())
    for other in others:
        np.testing.assert_array_equal(first["nearest_index"], other["nearest_index"])
        np.testing.assert_allclose(first["samples"], other["samples"], atol=1e-5)


def test_existing_outputs_are_kept_unless_forced(tmp_path) -> None:
    path = tmp_path / "a.npz"
    path.write_text("mine")
    refused = call("sample", "-n", 2, "--steps", 2, "-o", path)
    assert refused.exit_code == 2 and "exists; give --force to replace it" in refused.stderr
    assert path.read_text() == "mine"
    assert call("sample", "-n", 2, "--steps", 2, "-o", path, "--force").exit_code == 0
    assert files.read_table(path)["samples"].shape == (2, 8, 8)


# --- the other commands ---


def test_memorization_counts_copies(tmp_path) -> None:
    rows = np.random.default_rng(0).standard_normal((30, 4))
    samples = np.concatenate([rows[[7, 3]] + 1e-4, rows[[1]] + 2.0])
    np.save(tmp_path / "rows.npy", rows)
    np.save(tmp_path / "samples.npy", samples)
    report = tmp_path / "r.json"
    done = call(
        "memorization",
        tmp_path / "samples.npy",
        tmp_path / "rows.npy",
        "--binary",
        0.5,
        "--json",
        report,
    )
    assert done.exit_code == 0, done.output
    found = json.loads(report.read_text())
    assert found["collapse"]["memorized"] == [True, True, False]
    assert found["collapse"]["index"][:2] == [7, 3]
    assert found["collapse"]["distance"][0] == pytest.approx(2e-4, rel=1e-6)
    assert {"collapse", "ratio", "carlini", "exact"} <= found.keys()
    assert "66.7%" in done.stdout and "closest samples" in done.stdout


@pytest.mark.parametrize("method", ["auto", "dense", "pruned"])
def test_rows_for_which_there_is_no_memory_are_streamed(tmp_path, monkeypatch, method) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (600, 3, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "rows.npy", rows)
    samples = rows[[5, 77, 599, 0, 300]] / np.float32(127.5) - 1
    samples[::2] += np.random.default_rng(1).normal(size=samples[::2].shape).astype(np.float32) / 9
    np.save(tmp_path / "samples.npy", samples)
    made, checked = [], room.checked
    monkeypatch.setattr(room, "checked", lambda *a: made.append(checked(*a)) or made[-1])
    found = []
    for left in (1 << 40, 2 * rows.nbytes - 1):
        monkeypatch.setattr(memory, "available", lambda left=left: left)
        done = call(
            "memorization", tmp_path / "samples.npy", tmp_path / "rows.npy", "--method", method,
            "--neighbours", 2, "--json", "-",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        found.append(json.loads(done.stdout))
    assert [isinstance(data, StreamedSet) for data in made] == [False, True]
    assert found[0] == found[1] and found[0]["ratio"]["index"] == [5, 77, 599, 0, 300]
    # A quarter of what is left is 57 kB, and two levels of these rows take 127.
    assert method != "pruned" or made[1].index.dims == (32, 64)
    rows = rows.astype(np.float32)
    rows[400, 1] = np.nan
    np.save(tmp_path / "rows.npy", rows)
    done = call("memorization", tmp_path / "samples.npy", tmp_path / "rows.npy")
    assert done.exit_code == 2 and "DATA: expected finite rows" in done.stderr
    assert "in row 400" in done.stderr and done.stderr.count("\n") == 1


def test_memorization_reads_what_sample_wrote(tmp_path) -> None:
    path = tmp_path / "s.npz"
    assert call("sample", "-n", 3, "-o", path).exit_code == 0
    done = call("memorization", path, "digits")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[2].split()[:2] == ["collapse", "100.0%"]


def test_reproduce_takes_images_of_a_file(tmp_path, monkeypatch) -> None:
    images = np.zeros((4, 4, 4), np.float32)
    np.savez(tmp_path / "i.npz", a=images, b=images[:3])
    taken = []

    def reproduce(experiment, folder, **options):
        taken.append((experiment.name, options["data"]))
        return experiments.Outcome({}, [], [], 0.0)

    monkeypatch.setattr(experiments, "reproduce", reproduce)
    given = ("--out", tmp_path / "new", "--data", tmp_path / "i.npz", "--key", "a")
    for name in ("conditional", "all"):
        done = call("reproduce", name, *given)
        assert done.exit_code == 0, done.output
    data = (str(tmp_path / "i.npz"), "a")
    assert taken[0] == ("conditional", data) and len(taken) == 1 + len(experiments.EXPERIMENTS)
    assert dict(taken[1:]) == dict.fromkeys(experiments.EXPERIMENTS) | {"conditional": data}
    done = call("reproduce", "conditional", *given[:-2])
    assert done.exit_code == 2 and "['a', 'b']" in done.output


def test_reproduce_writes_figure_and_numbers(tmp_path) -> None:
    done = call("reproduce", "structured", "--quick", "--out", tmp_path / "new", "--format", "png")
    assert done.exit_code == 0, done.output
    numbers = json.loads((tmp_path / "new" / "structured.json").read_text())
    assert numbers["parameters"]["per_side"] == 11 and len(numbers["conclusions"]) == 2
    assert (tmp_path / "new" / "structured.png").read_bytes().startswith(b"\x89PNG")
    again = call("reproduce", "structured", "--quick", "--out", tmp_path / "new", "--format", "png")
    assert again.exit_code == 2 and "exists; give --force" in again.stderr


def test_info_is_text_or_json() -> None:
    text = call("info")
    assert text.exit_code == 0 and "backends" in text.output and "reference" in text.output
    facts = json.loads(call("info", "--json").output)
    assert facts["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    "command", ["", "sample", "train", "memorization", "index", "reproduce", "demo", "info"]
)
def test_help_describes_itself(command) -> None:
    done = call(*command.split(), "--help")
    assert done.exit_code == 0 and done.output.startswith("Usage: ")
    assert call("-h").output == call("--help").output == call().output
    assert "..." not in call().output.split("Commands:")[1]  # each fits its line


def test_memorization_draws_its_criteria(tmp_path):
    rows = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    files.write_npz(tmp_path / "d.npz", rows=rows)
    files.write_npz(tmp_path / "s.npz", samples=rows[:6] + 0.01)
    picture = tmp_path / "p.png"
    ran = call("memorization", tmp_path / "s.npz", tmp_path / "d.npz", "--merge-radius", 0.1,
               "--binary", 0.0, "--picture", picture)  # fmt: skip
    assert ran.exit_code == 0, ran.output
    for name in ("collapse", "ratio", "merged", "neighbourhood", "carlini", "exact"):
        assert f"\n{name}" in ran.output
    assert picture.stat().st_size > 10000 and f"wrote {picture}" in ran.output
    ran = call("memorization", tmp_path / "s.npz", tmp_path / "d.npz", "--merge-radius", -1)
    assert ran.exit_code == 2 and "--merge-radius: expected a number >= 0" in ran.output
