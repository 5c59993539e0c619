"""The command line: wrong input gets one line and exit code 2, an interrupt leaves nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from memokern import TrainingSet
from tests.apps.cli_calls import call, process, settings

pytestmark = pytest.mark.usefixtures("one_thread")


def _files(folder) -> None:
    np.save(folder / "line.npy", np.zeros((4, 5)))
    np.save(folder / "bad.npy", np.array([[0.0, 1.0], [np.nan, 1.0]]))
    np.save(folder / "wide.npy", np.zeros((2, 5000), dtype=np.float32))
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
sample --data photographs => --data: no such file or folder: 'photographs'
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
sample --method magic => 'magic' is not one of 'auto', 'dense', 'pruned'
sample --data plane.npy --method pruned => --method: expected rows of more than 16 features
sample --log a.txt => --log: the name must end in .json, .csv, got 'a.txt'
sample --log nowhere/a.csv => --log: no such folder: 'nowhere'
sample --log there.json => --log: 'there.json' exists; give --force
sample --log a.json --json a.json => --log: 'a.json' is also what --json would write
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
memorization plane.npy plane.npy --method magic => 'magic' is not one of
memorization plane.npy plane.npy --method pruned => --method: expected rows of more than 16
memorization plane.npy plane.npy --neighbours 1 => 1 is not in the range x>=2
index digits => Missing option '-o' / '--output'
index digits -o a.npz => --output: the name must end in .safetensors, got 'a.npz'
index missing.npy -o a.safetensors => DATA: no such file
index plane.npy -o a.safetensors => DATA: expected rows of more than 16 features for an index
index digits --basis wavelets -o a.safetensors => 'wavelets' is not one of
index wide.npy -o a.safetensors => DATA: no basis by default for rows [5000]
reproduce => Missing argument
reproduce magic => unknown experiment 'magic'; known: trajectories-ve
reproduce rate --out notes.txt => --out: 'notes.txt' is a file, not a folder
reproduce rate --format gif => 'gif' is not one of
reproduce rate --data notes.txt => --data is for conditional, not for rate
reproduce conditional --data missing.npy => --data: no such file
reproduce conditional --key images => --key says which array of --data FILE
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


@pytest.mark.long
def test_wrong_input_through_the_real_entry_point(tmp_path) -> None:
    done = process("sample", "--data", "missing.npy", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "memokern sample: error: --data: no such file: 'missing.npy'\n"


def test_a_solver_that_cannot_go_on_gets_one_line_and_exit_code_1(tmp_path) -> None:
    """A gated score is singular where alpha = 0: there x0 = (x + R') / alpha."""
    done = call(
        "sample", "--process", "cosine", "--regularizer", "tikhonov:c=0.03", "--solver", "rk45",
        "-n", 2, "-o", tmp_path / "a.npz",
    )  # fmt: skip
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1 and "rk45 stopped: " in done.stderr
    assert "take euler or heun" in done.stderr and list(tmp_path.iterdir()) == []


def test_missing_matplotlib_is_told_before_the_work(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(TrainingSet, "digits", None)  # reading data would fail
    for arguments in (["sample", "--picture", tmp_path / "a.png"], ["reproduce", "rate"], ["demo"]):
        done = call(*arguments)
        assert done.exit_code == 2
        assert "pip install 'memokern[plot]'" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.long
def test_interrupt_leaves_no_output(tmp_path) -> None:
    command = ["sample", "-n", "4000", "--steps", "100000", "-o", str(tmp_path / "a.npz")]
    # SIGINT may be ignored in a test runner's children; ask for Python's own handler.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from memokern.apps.cli import main; print('up', flush=True); main(prog_name='memokern')"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | settings(),
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


@pytest.mark.long
def test_a_wrong_environment_variable_gets_one_line(tmp_path) -> None:
    """In a process of its own, since the variable is read when the kernels are loaded."""
    code = """
import json, sys
from tests.apps.cli_calls import call
done = [call(*command.split()) for command in json.loads(sys.argv[1])]
print(json.dumps([[d.exit_code, d.stdout, d.stderr] for d in done]))
"""
    commands = ["info", "sample", "demo", "reproduce weights"]
    ran = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | settings() | {"MEMOKERN_BACKEND": "cpu", "MEMOKERN_ISA": "magic"},
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    for command, (code, out, error) in zip(commands, json.loads(ran.stdout), strict=True):
        assert (code, out) == (2, ""), command
        assert error.count("\n") == 1 and "MEMOKERN_ISA=magic" in error, command
        assert "error: " in error and list(tmp_path.iterdir()) == [], command
