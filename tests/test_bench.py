"""The benchmark: its real entry point, its arithmetic, and what it refuses."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import memokern
from bench import (
    cases,
    conftest,
    images,
    isas,
    loops,
    peers,
    pruned,
    report,
    runs,
    scaling,
    table,
    timing,
    trajectories,
)
from bench.__main__ import main as bench_main
from memokern.backends.cpu import native
from tests import harness
from tests import isas as usable_isas

ROOT = Path(__file__).resolve().parent.parent


def bench(*args):
    # pytest-benchmark measures nothing in what it takes for a worker of pytest-xdist.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [sys.executable, "-m", "bench", *map(str, args)],
        cwd=ROOT, capture_output=True, text=True, env=environment,
    )  # fmt: skip


@pytest.mark.long
def test_a_small_run_through_the_entry_point(tmp_path):
    out, page = tmp_path / "figures.json", tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    words = "accuracy or nearest or types"
    run = bench("--quick", "--rows", 300, "-k", words, "--json", out, "--markdown", page)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(out.read_text())
    assert [line["sigma"] for line in result["accuracy"]] == [80.0, 1.0, 0.1, 0.01, 0.002]
    assert {case["op"] for case in result["cases"]} == {"nearest", "types"}
    assert run.stdout.startswith(report.on(result["machine"]) + "\n")
    assert " targets: " in run.stdout and "float32 / uint8" in run.stdout
    text = page.read_text()
    assert text == f"before\n{report.BEGIN}\n{report.markdown(result)}\n{report.END}\nafter\n"
    assert bench("--load", out, "--markdown", "-").stdout == report.markdown(result) + "\n"


def test_the_page_of_figures_has_the_marks_of_its_table():
    """Where a bare --markdown writes to."""
    head, tail = report.PAGE.read_text().split(report.BEGIN)
    assert head and "Measured on" in tail.split(report.END)[0]


@pytest.mark.parametrize("isa, said", [("avx2", "avx2"), (None, "no compiled kernels")])
def test_the_machine_is_named_with_its_instruction_set(isa, said):
    assert report.on({**MACHINE, "isa": isa}) == f"C, 2 threads, {said}, torch 2"


@pytest.mark.skipif("cpu" not in harness.INSTALLED, reason="the compiled module is missing")
def test_other_instruction_sets_are_runs_of_a_case():
    module = native.module()
    before, other = module.isa(), next(iter(usable_isas.others()), None)
    if other is None:
        pytest.skip("one instruction set alone runs here")
    assert isas.beside(f"{other},{before}") == (other,)
    with pytest.raises(ValueError, match=r"expected --isa as some of .*, got sse9"):
        isas.beside("sse9")
    for case, more in ((cases.Case("mean", 2, 8, ("memokern", "sdpa"), n=30), True),
                       (cases.Case("types", 2, 8, ("float32",), n=30), False)):  # fmt: skip
        made = runs.maker(case, cases.rows(30, 8, "float32" if more else "uint8"))
        with_other, make = isas.with_others(case, made, (other,))
        assert with_other.runs == case.runs + ((f"memokern {other}",) if more else ())
        used = {}
        for name in with_other.runs:
            run = make(name)
            run.before()
            used[name] = module.isa()
            assert run.error(run.call()) < 1e-5
        assert used == {name: other if other in name else before for name in with_other.runs}
        module.select_isa(before)


@pytest.mark.long
def test_pruning_is_measured_on_images(tmp_path):
    out = tmp_path / "figures.json"
    run = bench("--quick", "-k", "pruned", "--json", out)
    assert run.returncode == 0, run.stdout + run.stderr
    (case,) = json.loads(out.read_text())["cases"]
    assert (case["op"], case["n"], case["b"]) == ("pruned-path", 2500, 64)
    assert set(case["runs"]) == {"memokern", "dense", "pruned", "cached", "sdpa"}
    assert max(case["runs"][name]["error"] for name in pruned.METHODS) < 1e-5
    rows = tmp_path / "rows.npy"
    np.save(rows, np.zeros((5, 7), np.float32))
    run = bench("--images", rows, "-k", "pruned")
    assert run.returncode == 2 and "expected uint8 images" in run.stderr


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setattr(images, "COUNT", 300)
    monkeypatch.setattr(images, "HELD_OUT", 20)
    images.load.cache_clear()
    yield images.load(None)
    images.load.cache_clear()


def test_the_batches_of_pruning_cases(few_images):
    data = few_images
    assert data.rows.shape == (280, 3, 32, 32) and data.held_out.shape == (20, 3, 32, 32)
    path = pruned.trajectory(data, 2)
    assert len(path) == 2 * pruned.STEPS - 1  # Heun: two a step, one in the last
    assert path[0][1] == pytest.approx(80.0) and path[-1][1] == pytest.approx(0.002)
    assert [s for _, s in path] == sorted((s for _, s in path), reverse=True)
    (last, _) = path[-1]  # the model that memorises: all but on a row
    distance = memokern.nearest(last.reshape(-1, 3, 32, 32), memokern.TrainingSet(data.rows))
    assert (distance.distance < 0.5).all()
    for case in cases.select():
        if case.op in cases.PRUNED:
            for x, sigma in pruned.batches(dataclasses.replace(case, b=2), data):
                assert x.shape == (2, 3072) and torch.isfinite(x).all()
                assert isinstance(sigma, float) or sigma.shape == (2,)
    x, sigma = pruned.held_out(data, 2, 0.0)
    assert (torch.cdist(x, images.values(data.held_out)).amin(1) == 0).all()


def test_augmented_images_are_many_and_distinct(few_images):
    more = images.augmented(few_images.rows, 900)
    assert len(more) == 900 and torch.equal(more[:280], few_images.rows)
    assert torch.equal(more[280:560], few_images.rows.flip(-1))
    assert len(more.flatten(1).unique(dim=0)) == 900


def test_the_cost_against_the_number_of_rows(few_images, tmp_path, monkeypatch, capsys):
    out, picture = tmp_path / "n.json", tmp_path / "n.png"
    argv = ["scaling", "--counts", 50, 300, "--batch", 3, "--patience", 0, "--json", out]
    argv += ["--sigma", 0.1, 0.3, "--picture", picture]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    assert scaling.main() == 0
    counts = json.loads(out.read_text())["counts"]
    assert [(c["n"], c["sigma"]) for c in counts] == [(n, s) for n in (50, 300) for s in (0.1, 0.3)]
    timed = ("pruned", "all rows", "dense", "read", "sdpa")
    assert all(min(c[name] for name in timed) > 0 < c["kept"] for c in counts)
    assert picture.read_bytes()[:4] == b"\x89PNG" and "N=    300" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["scaling", "--data", str(tmp_path / "none.npy")])
    assert scaling.main() == 2 and "none.npy" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["memokern", "cached", "naive", "cdist", "sdpa", "ideal"])
def test_peers_agree_with_float64_where_nothing_cancels(name):
    if peers.missing(name):
        pytest.skip(peers.missing(name))
    torch.manual_seed(0)
    rows = torch.randn(50, 6)
    x = rows[:5] + torch.randn(5, 6)
    truth = peers.reference(x, rows, 1.0, chunk=7)
    got = peers.MEAN[name](rows)(x, 1.0)
    # logits of size r^2 / 2 < 50 carry a few float32 roundings of 6e-8 each
    assert float((got - truth).abs().max()) < 50 * 8 * 6e-8


def test_the_references_gradient_is_that_of_its_mean():
    torch.manual_seed(0)
    rows, grad = torch.randn(20, 3).double(), torch.randn(4, 3).double()
    x = torch.randn(4, 3).double().requires_grad_()
    r2 = (x[:, None] - rows).square().sum(2)
    mean = torch.softmax(-r2 / (2 * 0.7**2), 1) @ rows
    (truth,) = torch.autograd.grad(mean, x, grad)
    got = peers.reference(x.detach(), rows, 0.7, grad, chunk=6)
    torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-12)


def test_every_case_names_what_can_be_built_and_its_targets_name_its_runs():
    own = {"forward", "denoise", "1 thread", "2 threads", "dense", "pruned", *cases.DTYPES}
    own |= set(cases.CONDITIONAL_PEERS)
    for case in cases.select():
        assert set(case.runs) <= peers.ALL | own, case
        for target in case.targets:
            assert {target.slow, target.fast} <= {"", *case.runs}, case
    assert len({case.name for case in cases.select()}) == len(cases.select())
    assert 0 < len(cases.select(quick=True)) < len(cases.select()) / 2


def test_a_wrong_result_has_an_error():
    x = torch.ones(9, 2)
    run = runs.Run(lambda: x, torch.ones(4, 2).double())
    assert run.error(x) == 0
    assert run.error(1.5 * x) == pytest.approx(0.5)
    assert run.error(x * float("nan")) == float("inf")


def case(**seconds):
    rest = {"spread": 1.0, "rounds": 3, "error": 1e-7, "itemsize": 4, "quiet": True}
    figures = {name: {"seconds": s, **rest} for name, s in seconds.items()}
    return {"name": "mean B=2 D=5", "op": "mean", "b": 2, "n": 10, "d": 5, "runs": figures,
            "targets": [], "sgemm": 1e9, "read": 1e8}  # fmt: skip


MACHINE = {"cpu": "C", "threads": 2, "isa": "avx2", "torch": "2"}


def test_arithmetic():
    f = table.figures(case(memokern=1e-6), "memokern")
    assert f["gflops"] == pytest.approx(0.4)  # 400 operations in a microsecond
    assert f["gbs"] == pytest.approx(0.2)  # 200 bytes
    assert f["sgemm"] == pytest.approx(0.4)
    assert f["floor"] == pytest.approx(0.5)  # 2 us to read, 0.4 us to compute


@pytest.mark.parametrize(
    "target, found, state",
    [
        (cases.Target("sgemm", 0.5), 0.4, table.MISSED),
        (cases.Target("floor", 0.6, at_most=True), 0.5, table.MET),
        (cases.Target("ratio", 3.0, "sdpa"), 2.0, table.MISSED),
        (cases.Target("ratio", 2.0, "sdpa"), 2.0, table.MET),
        (cases.Target("ratio", 2.0, "keops"), None, table.UNKNOWN),
        (cases.FASTEST, 2.0, table.MET),
        (cases.Target("error", 1e-8, at_most=True), 1e-7, table.MISSED),
    ],
)
def test_targets(target, found, state):
    measured = case(memokern=1e-6, sdpa=2e-6, naive=3e-6)
    wanted = vars(target)
    assert table.value(measured, wanted) == (None if found is None else pytest.approx(found))
    assert table.verdict(measured, wanted)[1] == state
    measured["runs"]["memokern"]["quiet"] = False
    timed = found is not None and target.kind != "error"
    assert table.verdict(measured, wanted)[1] == (table.DISTURBED if timed else state)


def test_a_disturbed_call_is_timed_again(monkeypatch):
    busy = iter([0.0, 0.0, 5.0, 5.0, 5.0, *[5.0] * 99])  # others take 5 s during the first try
    monkeypatch.setattr(timing, "taken_by_others", lambda: next(busy))
    clock, calls = timing.Clock(), []
    _, alone = clock.time(lambda: calls.append("call"), lambda: calls.append("before"))
    assert alone and calls == ["before", "call"] * 2
    busy = iter(range(0, 9999, 5))
    assert not timing.Clock(patience=0).time(lambda: None, lambda: None)[1]


def test_others_time_is_none_of_ours():
    clock = timing.Clock()
    before, own = timing.taken_by_others(), os.times()
    while sum(os.times()[:2]) - sum(own[:2]) < 0.5:
        torch.ones(1000).sum()
    other = timing.taken_by_others() - before
    assert other >= -timing.TICKS  # others may work, but our half second is not theirs
    assert clock.patience > 0


def test_the_best_quiet_round_counts():
    found = timing.best([(1.0, False), (3.0, True), (2.0, True)])
    assert found == {"seconds": 2.0, "spread": 1.0, "rounds": 3, "quiet": True}
    assert timing.best([(1.0, False), (3.0, False)])["quiet"] is False


def test_an_update_keeps_what_nothing_disturbed():
    disturbed = case(memokern=1.0)
    disturbed["runs"]["memokern"]["quiet"] = False
    limits = {**case(memokern=1.0), "quiet": False}
    old = {"machine": 1, "code": "a", "skipped": {"faiss": "why"}, "memory": [], "accuracy": []}
    old["cases"] = [disturbed, case(memokern=2.0), limits]
    new = {"machine": 1, "code": "a", "skipped": {}, "cases": []}
    conftest.keep(new, old)
    assert new == {**old, "cases": [case(memokern=2.0)]}
    for what in "machine", "code":
        with pytest.raises(pytest.UsageError, match=what):
            conftest.keep({**new, what: "other"}, old)
    assert "~" in report.markdown({**old, "machine": MACHINE})


def test_figures_of_two_machines_are_refused(tmp_path, monkeypatch, capsys):
    paths = []
    for cpu in "one", "other":
        paths.append(tmp_path / f"{cpu}.json")
        paths[-1].write_text(json.dumps({"machine": {"cpu": cpu}, "cases": []}))
    monkeypatch.setattr(sys, "argv", ["bench", "--compare", *map(str, paths)])
    assert bench_main() == 2 and "machine" in capsys.readouterr().err
    one = json.loads(paths[0].read_text())
    assert report.compare(one, one) == "no case is in both"


def test_loops_are_checked_before_they_are_timed(monkeypatch):
    monkeypatch.setattr(loops, "ROUNDS", 1)
    clock = timing.Clock(patience=0.0)
    found = [loops.measure(case, clock) for case in loops.cases(quick=True)]
    assert [entry["case"].split()[0] for entry in found] == [
        "stable", "flow_matching", "stable_velocity", "labels", "conditions", "kde", "memorization"
    ]  # fmt: skip
    assert all(entry["ratio"] > 0 for entry in found)
    case = next(loops.cases(quick=True))
    wrong = dataclasses.replace(case, ours=lambda: case.truth + 1)
    with pytest.raises(AssertionError, match="memokern is off by"):
        loops.measure(wrong, clock)


def test_trajectories_are_compared_at_equal_fidelity(monkeypatch, tmp_path, capsys):
    few = {name: steps[:2] for name, steps in trajectories.STEPS.items()}
    monkeypatch.setattr(trajectories, "STEPS", few)
    monkeypatch.setattr(trajectories, "TOLERANCES", (1e-2,))
    monkeypatch.setattr(trajectories, "TRUTH", 40)
    out, picture = tmp_path / "t.json", tmp_path / "t.png"
    arguments = ["--samples", "4", "--json", str(out), "--plot", str(picture)]
    monkeypatch.setattr("sys.argv", ["trajectories", *arguments])
    assert trajectories.main() == 0 and picture.stat().st_size > 0
    found = json.loads(out.read_text())["figures"]
    assert [e["evaluations"] for e in found if e["solver"] == "Heun"] == [15, 19]
    assert all(0 <= e["same"] <= 1 and e["each"] <= e["evaluations"] for e in found)
    assert "fewer evaluations than Heun" in capsys.readouterr().out
    made = [
        {"solver": "exponential", "setting": "a", "evaluations": 5, "same": 0.9, "error": 0.2},
        {"solver": "exponential", "setting": "b", "evaluations": 10, "same": 0.95, "error": 0.1},
        {"solver": "Heun", "setting": "c", "evaluations": 30, "same": 0.9, "error": 0.1},
    ]
    assert trajectories.gains(made, "Heun") == {"c": 3.0}


def test_heun_of_the_peers_is_that_of_the_samplers():
    data = memokern.TrainingSet.digits()
    start = 80 * torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    sigmas = memokern.processes.EDM().times(9).tolist()
    x = trajectories.heun(lambda x, s: memokern.denoise(x.reshape(2, 8, 8), data, s).flatten(1),
                          start, sigmas)  # fmt: skip
    ours = memokern.samplers.ode(memokern.Denoiser(data), start.reshape(2, 8, 8), 8).x
    torch.testing.assert_close(x, ours.flatten(1), rtol=1e-4, atol=1e-4)
