"""`make gpu-check`: what can be tested of it without a GPU, which is every line but CUDA's own.

Rehearsals run the real command with the CPU's kernels, or Triton interpreting, on tiny problems.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tools import aot
from tools.gpu_check import __main__ as command
from tools.gpu_check import page, pytests, schedule, steps
from tools.gpu_check.check import Check, Options
from tools.gpu_check.schedule import Answer, Pool
from tools.gpu_check.steps import Step

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"device": "cpu", "backend": "cpu", "rehearsed": True, "interpreted": False}


def gpu_check(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tools.gpu_check", *map(str, words)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip


def result_of(out: Path) -> dict[str, Any]:
    return json.loads(out.with_suffix(".json").read_text())


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.long
def test_without_a_gpu_it_says_so_and_compiles() -> None:
    run = gpu_check("nearest_groups", "float32", "B16", "unaligned")
    assert run.returncode == 0, run.stderr
    first, *rows = run.stdout.splitlines()
    assert first == command.NO_GPU
    assert sorted(row.split()[5] for row in rows) == sorted(aot.TARGETS)  # each as it is there
    assert all("registers" in row and " 0 B spilled" in row for row in rows)


def test_to_compile_is_a_choice_where_there_is_a_gpu_too(monkeypatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--compile", "nearest", "sm_90"])
    monkeypatch.setattr(command, "_compile", lambda words: asked.append(words) or 7)
    assert command.main() == 7 and asked == [["nearest", "sm_90"]]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--fault", "x=wrong"], "faults are for rehearsals"),
        (["--rehearse", "cpu", "--fault", "x=odd"], "expected a fault of wrong"),
    ],
)
def test_faults_that_mean_nothing_are_refused(words: list[str], said: str) -> None:
    run = gpu_check(*words)
    assert run.returncode == 2 and said in run.stderr


@pytest.mark.parametrize("tool", ["nvidia-smi", "rocm-smi", None])
def test_the_peers_are_installed_where_there_is_a_gpu(tool: str | None, tmp_path) -> None:
    """Of either vendor: by the tool that comes with its driver."""
    said = made(tmp_path, tool)
    assert ("[bench]" in said) == (tool is not None)


@pytest.mark.parametrize("tool", ["nvidia-smi", None])
def test_an_interpreter_is_taken_as_it_is(tool: str | None, tmp_path) -> None:
    """Where nothing can be installed; a CPU kernel that cannot be built is no reason to stop."""
    said = made(tmp_path, tool, "PYTHON=python3", "VENV=", "ARGS=--minutes 3")
    build, check = said.splitlines()
    assert build.startswith("python3 setup.py -q build_ext --inplace || echo ")
    assert check == "python3 -m tools.gpu_check --minutes 3"


def made(folder: Path, tool: str | None, *words: str) -> str:
    """What make would do, on a machine with this tool."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("there is no make")
    for name in ("sh", "true"):
        (folder / name).symlink_to(shutil.which(name))
    if tool:
        (folder / tool).symlink_to(shutil.which("true"))
    run = subprocess.run(
        [make, "-n", "--no-print-directory", "gpu-check", *words],
        capture_output=True, text=True, cwd=ROOT, env={"PATH": str(folder)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout


# --- rehearsals of a run -------------------------------------------------------------------------


@pytest.mark.long
def test_a_rehearsal_with_triton_interpreting(tmp_path) -> None:
    """From the first line to the last: all is right, and the page has it."""
    out = tmp_path / "page.md"
    run = gpu_check("--rehearse", "--only", "uint8 B=1 N=", "--minutes", 5, "--out", out)
    assert run.returncode == 0, run.stdout + run.stderr
    result = result_of(out)
    assert result["state"] == "finished" and result["not_run"] == [] and result["wrong"] == 0
    names = [line["name"].removeprefix("smoke: ") for line in result["smoke"]]
    assert names == [
        "posterior uint8 B=1 N=70 D=270",
        "nearest uint8 B=1 N=70 D=270 by cuda",
        "nearest uint8 B=1 N=70 D=270",
    ]
    (case,) = result["times"]
    runs = {line["run"]: line for line in case["runs"]}
    assert set(runs) >= {"memokern", "memokern in a graph", "cached", "cached tf32", "sdpa"}
    assert all(line["error"] < 1e-2 for line in runs.values())
    ours = runs["memokern"]
    assert ours["error"] < 1e-5 and ours["of_bound"] > 0 and ours["of_memory"] > 0
    rate = 4 * 300 * 24 / ours["seconds"] / 1e12
    assert ours["tflop_s"] == pytest.approx(rate)
    text = out.read_text()
    assert text.startswith("# What the GPU said\n\nA rehearsal without a GPU")
    assert "Smoke tests against float64: 2 right, 0 wrong" in text
    for line in [*page.time_lines(case), *map(page.smoke_line, result["smoke"])]:
        assert line in run.stdout and line in text


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A run in which much goes wrong."""
    out = tmp_path_factory.mktemp("faulty") / "page.md"
    faults = {
        "smoke: posterior float32 B=5 N=70 D=270": "wrong",
        "smoke: posterior float32 B=1 N=70 D=270": "crash",
        "smoke: nearest float32 B=5 N=70 D=270": "lost",
        "smoke: gradients float32 B=5 N=70 D=270": "memory",
        "time: mean B=4 N=300 D=24 float32": "wrong",
        "time: mean B=1 N=300 D=24 float32": "memory",
    }
    words = [word for name, kind in faults.items() for word in ("--fault", f"{name}={kind}")]
    only = "float32 -compiled -state -rows' -pruned -bound_scan -listed -sigma -log -backward"
    run = gpu_check("--rehearse", "cpu", "--minutes", 4, "--out", out, f"--only={only}", *words)
    return run, out


@pytest.mark.long
def test_what_fails_is_told_and_the_rest_goes_on(faulty) -> None:
    run, out = faulty
    assert run.returncode == 1
    result = result_of(out)
    smoke = {line["name"].removeprefix("smoke: "): line for line in result["smoke"]}
    wrong = smoke["posterior float32 B=5 N=70 D=270"]
    assert wrong["ratio"] > 1e3 and wrong["output"] in ("mean", "residual")
    assert "process ended (-9)" in smoke["posterior float32 B=1 N=70 D=270"]["failed"]
    assert "illegal memory access" in smoke["nearest float32 B=5 N=70 D=270"]["failed"]
    memory = smoke["gradients float32 B=5 N=70 D=270"]
    assert memory["failed"].startswith("out of memory") and "rehearsed" in memory["trace"]
    right = [line for line in smoke.values() if not page.is_wrong(line)]
    assert len(right) >= 5  # after each of them the next step was done, by a new process
    assert result["wrong"] == len([v for v in lines_of(result) if page.is_wrong(v)])
    text = out.read_text()
    assert "WRONG  posterior float32 B=5" in text and "FAILED nearest float32 B=5" in text
    # What is wrong comes first.
    assert text.index("- FAILED") < text.index("- right")


def lines_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [*result["smoke"], *(run for case in result["times"] for run in case["runs"])]


@pytest.mark.long
def test_a_wrong_result_of_a_problem_is_not_timed(faulty) -> None:
    run, out = faulty
    times = {(c["name"], c["kind"]): c["runs"] for c in result_of(out)["times"]}
    (wrong,) = times["mean B=4 N=300 D=24", "time"]
    assert "nothing was timed" in wrong["failed"] and "seconds" not in wrong
    (memory,) = times["mean B=1 N=300 D=24", "time"]
    assert memory["failed"].startswith("out of memory")
    assert any("seconds" in line for line in times["mean B=4 N=300 D=16", "time"])
    assert "| mean B=4 N=300 D=24 | float32 | memokern | FAILED: Wrong: memokern has" in run.stdout


def test_the_time_is_up_before_anything_is_known(tmp_path) -> None:
    out = tmp_path / "page.md"
    run = gpu_check("--rehearse", "cpu", "--minutes", 0.001, "--out", out)
    assert run.returncode == 1  # nothing is known to be right
    result = result_of(out)
    assert result["state"] == "the time was up" and result["times"] == []
    plan = steps.plan(True, "")
    assert result["not_run"] == [step.name for step in [*plan.smoke, *plan.time]]
    assert "## Not run" in out.read_text()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="not Linux")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.long
def test_a_run_that_is_stopped_leaves_what_it_had(number: signal.Signals, tmp_path) -> None:
    """While a step hangs, too; and no process of it is left."""
    out = tmp_path / "page.md"
    second = "smoke: nearest uint8 B=1 N=70 D=270"
    with subprocess.Popen(
        [sys.executable, "-m", "tools.gpu_check", "--rehearse", "cpu", "--only", "uint8 B=1 N=",
         "--fault", f"{second}=hang", "--out", str(out)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    ) as run:  # fmt: skip
        assert run.stdout is not None
        while not (line := run.stdout.readline()).startswith("right  posterior"):
            assert run.poll() is None and not line.startswith("WRONG"), line
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        assert children
        run.send_signal(number)
        run.stdout.read()
    result = result_of(out)
    assert [line["name"] for line in result["smoke"]] == ["smoke: posterior uint8 B=1 N=70 D=270"]
    assert second in result["not_run"] and "right  posterior" in out.read_text()
    assert result["state"] == ("running" if number == signal.SIGKILL else "stopped")
    assert run.returncode == (-9 if number == signal.SIGKILL else 128 + 15)
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("page.md", "page.json")] == []
    until = time.monotonic() + 20
    while time.monotonic() < until and any(Path(f"/proc/{pid}").exists() for pid in children):
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


# --- the clock -----------------------------------------------------------------------------------


def smoke_step(d: int, limit: float) -> Step:
    return Step("smoke", steps.Smoke("posterior", "float32", 2, 9, d), limit)


@pytest.mark.long
def test_a_step_that_hangs_costs_its_own_line() -> None:
    slow, told = smoke_step(3, 1.0), list[Answer]()
    pool = Pool({**SETTINGS, "faults": {slow.name: "hang"}}, 1)
    plan = [smoke_step(2, 60), slow, smoke_step(4, 60)]
    try:
        pool.run(plan, time.monotonic() + 120, told.append)
    finally:
        pool.end()
    assert [answer.step for answer in told] == plan and all(answer.done for answer in told)
    first, second, third = (answer.lines[0] for answer in told)
    assert second["failed"] == "it took longer than 1 s and was ended"
    assert first["ratio"] <= 1 and third["ratio"] <= 1


@pytest.mark.long
def test_nothing_is_begun_that_would_not_be_heard_of() -> None:
    told = list[Answer]()
    plan = [smoke_step(d, 60) for d in (2, 3, 4)]
    pool = Pool({**SETTINGS, "faults": {plan[1].name: "hang"}}, 1)
    try:
        pool.run(plan[:1], time.monotonic() + 60, told.append)
        pool.run(plan[1:], time.monotonic() + 0.5, told.append)  # cut off, so it is told nowhere
        assert [answer.step for answer in told] == plan[:1] and pool.processes == []
        now = time.monotonic()
        pool.run(plan[2:], now + 60, told.append, begin_until=now - 1)
        assert len(told) == 1 and time.monotonic() < now + 10
    finally:
        pool.end()


def test_a_process_that_cannot_start_is_told(monkeypatch) -> None:
    told = list[Answer]()
    monkeypatch.setattr(schedule.sys, "executable", shutil.which("false"))
    pool = Pool({**SETTINGS, "faults": {}}, 1)
    try:
        pool.run([smoke_step(2, 5)], time.monotonic() + 20, told.append)
    finally:
        pool.end()
    assert told[0].lines[0]["failed"] == "its process ended (1)"


# --- the tests on the GPU ------------------------------------------------------------------------


@pytest.mark.long
def test_what_pytest_says_is_kept(tmp_path, capfd) -> None:
    tests = tmp_path / "test_it.py"
    tests.write_text("def test_right(): pass\ndef test_wrong(): assert 1 == 2\n")
    said = pytests.tested([str(tests)])
    assert said.status == 1 and said.summary.startswith("1 failed, 1 passed in")
    assert "test_it.py::test_wrong" in said.failures[0]
    assert "test_wrong" in capfd.readouterr().out
    tests.write_text("def test_right(): pass\n")
    assert pytests.tested([str(tests)]).status == 0
    tests.write_text("import time\ndef test_long(): time.sleep(600)\n")
    began = time.monotonic()
    said = pytests.tested([str(tests)], seconds=3)
    assert time.monotonic() - began < 60
    assert said.status == 0 and said.summary.startswith("the time was up: ")


@pytest.mark.parametrize("wrong", [pytest.param(False, marks=pytest.mark.long), True])
@pytest.mark.long
def test_the_status_is_that_of_the_tests_too(wrong: bool, tmp_path, monkeypatch) -> None:
    """With --tests, whatever time is left; the page says what they said."""
    tests, out = tmp_path / "test_it.py", tmp_path / "page.md"
    tests.write_text(f"def test_it(): assert {not wrong}\n")
    options = Options(
        out, minutes=1, backend="cpu", rehearsed=True, only="posterior float32 B=1 N=70",
        tests=[str(tests)],
    )  # fmt: skip
    assert Check(options).run() == int(wrong)
    assert ("- FAILED" in out.read_text()) == wrong
    assert f"## Tests: 1 {'failed' if wrong else 'passed'}" in out.read_text()
    assert result_of(out)["tests"]["status"] == int(wrong)


@pytest.mark.long
def test_what_needs_no_device_passes_on_a_machine_with_a_gpu_too() -> None:
    """`make gpu-check` may run these there; here they are told that there is a GPU."""
    code = (
        "import sys, torch, pytest; torch.cuda.is_available = lambda: True;"
        "sys.exit(pytest.main(['-q', '-n0', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    )
    names = [
        str(path)
        for name in ("planner", "tuning", "launch")
        for path in (ROOT / "tests").rglob(f"test_triton_{name}.py")
    ]
    assert len(names) == 3
    slow = ("streams", "ahead", "small", "amd", "room", "every", "all_sizes")
    names += ["-k", " and ".join(f"not {word}" for word in slow)]
    run = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout and "failed" not in run.stdout
