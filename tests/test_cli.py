"""The command line, through its real entry point where that matters and click's runner for the
rest.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import click.testing
import numpy as np
import pytest
import torch

from memokern import TrainingSet, demo, files, memorization
from memokern.cli import main

DIGIT_ROWS = 1797


def call(*arguments: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(main, [str(a) for a in arguments])


def process(*arguments: object, cwd=None, **environment: str) -> subprocess.CompletedProcess[str]:
    """`memokern` in a process of its own, by its module so that the test sees the tree that is
    imported here.
    """
    return subprocess.run(
        [sys.executable, "-m", "memokern", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        timeout=120,
    )


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


@pytest.mark.parametrize("solver", ["euler", "heun", "rk45", "sde"])
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
        assert f"sampled from {count} of label 7" in done.stdout
    assert "sampled from all\n" in call("sample", "-n", 1, "--steps", 2).stdout


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


# --- wrong inputs ---


def _files(folder) -> None:
    np.save(folder / "line.npy", np.zeros((4, 5)))
    np.save(folder / "bad.npy", np.array([[0.0, 1.0], [np.nan, 1.0]]))
    np.save(folder / "one.npy", np.zeros((1, 2)))
    np.save(folder / "plane.npy", np.arange(6.0).reshape(3, 2))
    np.save(folder / "words.npy", np.array(["a", "b"]))
    np.save(folder / "pickled.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    np.savez(folder / "two.npz", a=np.zeros((2, 2)), b=np.ones((2, 2)))
    (folder / "broken.npz").write_bytes(b"PK not a zip")
    (folder / "notes.txt").write_text("hello")
    (folder / "there.json").write_text("{}")
    (folder / "dir.npz").mkdir()


# One wrong call a line, and a part of the message that it must get.
WRONG = r"""
frobnicate => No such command 'frobnicate'
sample --frob => No such option
sample --data missing.npy => --data: no such file: 'missing.npy'
sample --data notes.txt => --data: expected a file ending in .npy
sample --data broken.npz => --data: 'broken.npz'
sample --data pickled.npy => pickle
sample --data words.npy => --data:
sample --data bad.npy => row 1
sample --data one.npy => at least 2 rows, got 1
sample --data two.npz => ['a', 'b']: say which with --key
sample --data two.npz --key c => has no array 'c'
sample --key c => a key needs a data file
sample --process magic => 'magic' is not one of
sample --solver magic => 'magic' is not one of
sample --regularizer magic => --regularizer:
sample --regularizer tikhonov:c=-1 => --regularizer:
sample --regularizer tikhonov:d=1 => --regularizer:
sample --regularizer tikhonov:c=much => --regularizer:
sample --steps 0 => 0 is not in the range x>=1
sample --solver rk45 --steps 9 => rk45 chooses its own steps
sample -n -3 => -3 is not in the range
sample -n many => 'many' is not a valid integer
sample --sigma-min -1 => --sigma-min: expected a positive number, got -1.0
sample --sigma-min 80 => --sigma-min: edm starts at sigma = 80; expected less, got 80
sample --label 10 => --label: no row has the label 10; the labels are [0, 1, 2, 3, 4, 5, 6, 7, 8
sample --label three => 'three' is not a valid integer
sample --label 99999999999999999999 => --label: expected a label, or several, of integers (int64)
sample --data plane.npy --label 0 => --label: the data have no labels; a .npz or .safetensors file
sample --device magic => --device: no 'magic' on this machine; there is cpu
sample --device meta => --device: no 'meta' on this machine; there is cpu
sample --device cpu --device cuda:99 => --device: no 'cuda:99' on this machine; there is cpu
sample --tolerance nan => --tolerance: expected a positive number, got nan
sample --ratio 0 => --ratio: expected a positive number
sample -o a.txt => --output: the name must end in .npz
sample -o nowhere/a.npz => --output: no such folder: 'nowhere'
sample -o dir.npz => --output: 'dir.npz' is a folder
sample --picture a.jpg => --picture: the name must end in .png, .pdf, .svg
sample --data line.npy --picture a.png => rows of shape [5] are neither images
memorization plane.npy => Missing argument 'DATA'
memorization missing.npy digits => SAMPLES: no such file
memorization plane.npy line.npy => expected samples of shape [S, 5]
memorization bad.npy plane.npy => samples hold NaN or infinite values
memorization plane.npy plane.npy --json there.json => exists; give --force
memorization plane.npy plane.npy --tolerance -1 => expected a positive number
memorization plane.npy plane.npy --neighbours 1 => 1 is not in the range x>=2
reproduce => Missing argument
reproduce magic => unknown experiment 'magic'; known: trajectories-ve
reproduce rate --out notes.txt => --out: 'notes.txt' is a file, not a folder
reproduce rate --format gif => 'gif' is not one of
demo --out notes.txt => --out: 'notes.txt' is a file, not a folder
demo -n 0 => 0 is not in the range x>=1
"""
WRONG_CALLS = [tuple(line.split(" => ")) for line in WRONG.strip().splitlines()]


@pytest.mark.parametrize(("command", "message"), WRONG_CALLS, ids=[c for c, _ in WRONG_CALLS])
def test_wrong_input_gets_one_line_and_exit_code_2(tmp_path, monkeypatch, command, message) -> None:
    monkeypatch.chdir(tmp_path)
    _files(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    done = call(*command.split())
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("memokern")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_wrong_input_through_the_real_entry_point(tmp_path) -> None:
    done = process("sample", "--data", "missing.npy", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "memokern sample: error: --data: no such file: 'missing.npy'\n"


def test_missing_matplotlib_is_told_before_the_work(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(TrainingSet, "digits", None)  # reading data would fail
    for arguments in (["sample", "--picture", tmp_path / "a.png"], ["reproduce", "rate"], ["demo"]):
        done = call(*arguments)
        assert done.exit_code == 2
        assert "pip install 'memokern[plot]'" in done.stderr and done.stderr.count("\n") == 1


def test_interrupt_leaves_no_output(tmp_path) -> None:
    command = ["sample", "-n", "4000", "--steps", "100000", "-o", str(tmp_path / "a.npz")]
    # SIGINT may be ignored in a test runner's children; ask for Python's own handler.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from memokern.cli import main; print('up', flush=True); main(prog_name='memokern')"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == "up\n"
        time.sleep(1.0)
        assert child.poll() is None
        child.send_signal(signal.SIGINT)
        _, error = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130
    assert error.strip() == "memokern: interrupted; no output was left half written"
    assert list(tmp_path.iterdir()) == []


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


def test_memorization_reads_what_sample_wrote(tmp_path) -> None:
    path = tmp_path / "s.npz"
    assert call("sample", "-n", 3, "-o", path).exit_code == 0
    done = call("memorization", path, "digits")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[2].split()[:2] == ["collapse", "100.0%"]


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


@pytest.mark.parametrize("command", ["info", "sample", "demo", "reproduce weights"])
def test_a_wrong_environment_variable_gets_one_line(tmp_path, command) -> None:
    done = process(*command.split(), cwd=tmp_path, MEMOKERN_BACKEND="cpu", MEMOKERN_ISA="magic")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "MEMOKERN_ISA=magic" in done.stderr
    assert "error: " in done.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["", "sample", "memorization", "reproduce", "demo", "info"])
def test_help_describes_itself(command) -> None:
    done = call(*command.split(), "--help")
    assert done.exit_code == 0 and done.output.startswith("Usage: ")
    assert call("-h").output == call("--help").output == call().output


def test_demo_shows_the_cure(tmp_path) -> None:
    done = process("demo", "--out", tmp_path / "d", "-n", 4)
    assert (done.returncode, done.stderr) == (0, "")
    for file in ("unregularised", "tikhonov", "empirical-bayes"):
        assert (tmp_path / "d" / f"{file}.png").read_bytes().startswith(b"\x89PNG")
        assert f"{file}.png" in done.stdout
    results = demo.run(48)
    plain, tikhonov, bayes = results
    assert plain.collapse.fraction == plain.ratio.fraction == 1.0
    assert tikhonov.collapse.fraction == 0 and tikhonov.ratio.fraction < 0.1
    assert bayes.collapse.fraction < 0.25 and bayes.ratio.fraction < 0.35
    assert demo.render(results).splitlines()[1].startswith("not regularised")
    # What the texts say of Tikhonov's samples: a training image plus noise of std sqrt(c).
    noise = tikhonov.collapse.distance.square().mean().sqrt() / 8
    assert noise == pytest.approx(demo.TIKHONOV_C**0.5, rel=0.1)


def test_mean_at_floor_stays_on_a_training_point_and_blends_elsewhere() -> None:
    data = TrainingSet(torch.tensor([[0.0, 0.0], [2.0, 0.0]]))
    x = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
    mean = demo.mean_at_floor(x, data, log_tau=-2.0)
    torch.testing.assert_close(mean, torch.tensor([[2.0, 0.0], [1.0, 0.0]]))


def test_demo_searches_neighbours_once_for_both_criteria(monkeypatch) -> None:
    searches, search = [], memorization.functional.nearest

    def counting(x, data, k=1):
        searches.append((len(x), k))
        return search(x, data, k)

    monkeypatch.setattr(memorization.functional, "nearest", counting)
    results = demo.run(3)
    assert searches == [(3, 2)] * 3
    for result in results:
        assert torch.equal(result.collapse.index, result.ratio.index)
        again = memorization.collapse(result.shown, TrainingSet.digits(), demo.TOLERANCE)
        assert torch.equal(result.collapse.distance, again.distance)
