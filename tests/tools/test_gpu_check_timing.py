"""What `make gpu-check` measures and what it takes for right, on the CPU."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import memokern
from memokern.backends.reference import BACKEND as reference
from memokern.calls import Query, Rows
from tools.gpu_check import makers, page, rates, rivals, smoke, steps, timing, truth
from tools.gpu_check.steps import Problem, Smoke
from tools.gpu_check.worker import Worker

F64 = torch.float64
CPU = torch.device("cpu")
RATES = {"memory": 1e9, "half": 1e10, "tf32": 1e9, "fp32": 1e9}
ON = timing.Conditions(CPU, RATES)
SMALL = Problem("mean", "float32", 3, 200, 16)


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.0)  # the fewest rounds


def measured(p: Problem, on: timing.Conditions = ON) -> dict[str, dict[str, Any]]:
    told: list[Any] = []
    lines = timing.measure(p, on, told.append)
    assert next(line["run"] for line in told[0]) == "memokern"  # ours are told first
    return {line["run"]: line for line in lines}


def test_a_problem_is_checked_then_timed(monkeypatch) -> None:
    lines = measured(SMALL)
    for name in ("memokern", "cached", "cached tf32", "sdpa"):
        line = lines[name]
        assert line["error"] < 1e-5 and line["seconds"] > 0
        rate = 4 * 3 * 200 * 16 / line["seconds"]
        assert line["tflop_s"] == pytest.approx(rate / 1e12)
        assert line["of_product"] == pytest.approx(rate / RATES["tf32"])
        assert line["of_memory"] == pytest.approx(4 * 200 * 16 / line["seconds"] / 1e9)
    wrong = {**rivals.peers.MEAN, "cached": lambda rows: lambda x, sigma: torch.zeros_like(x)}
    monkeypatch.setattr(rivals.peers, "MEAN", wrong)
    lines = measured(SMALL)
    assert lines["cached"]["skipped"] == "wrong: an error of 1.0e+00" and "sdpa" in lines
    monkeypatch.setattr(memokern, "denoise", lambda x, data, sigma: torch.zeros_like(x))
    with pytest.raises(timing.Wrong, match="nothing was timed"):
        timing.measure(SMALL, ON, lambda lines: None)


def test_a_peer_that_fails_is_a_line(monkeypatch) -> None:
    monkeypatch.setattr(rivals, "flex", lambda rows: 1 / 0)
    monkeypatch.setitem(rivals.peers.MEAN, "compile", rivals.peers.MEAN["naive"])
    lines = measured(SMALL, ON._replace(compiled=True))
    assert "ZeroDivisionError" in lines["flex"]["skipped"]
    assert lines["compile"]["seconds"] > 0 and set(lines) == {"memokern", "compile", "flex"}


def test_a_peer_that_takes_the_gpu_with_it_costs_nothing_of_ours(monkeypatch) -> None:
    """Our times were told, and stand; the process is given up, and nothing of ours is wrong."""
    monkeypatch.setattr(rivals, "flex", lambda rows: 1 / 0)
    monkeypatch.setitem(rivals.peers.MEAN, "compile", rivals.peers.MEAN["naive"])
    monkeypatch.setattr(timing, "is_lost", lambda device: True)
    answers = io.StringIO()
    settings = {"device": "cpu", "rehearsed": False, "faults": {}}
    step = steps.Step("compiled", SMALL, 60)
    message = json.dumps({**step.message(), "rates": RATES})
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{message}\n{message}\n"))
    Worker(settings, answers).serve()
    first, last = map(json.loads, answers.getvalue().splitlines())  # the second is left
    assert not first["done"] and last["done"] and last["lost"]
    assert last["lines"][0] == first["lines"][0] and last["lines"][0]["seconds"] > 0
    assert last["lines"][1]["run"] == "flex" and "context" in last["lines"][1]["skipped"]
    assert not any(page.is_wrong(line) for line in last["lines"])


@pytest.mark.parametrize("operation", ["nearest", "pruned", "backward", "rows' gradient"])
def test_each_kind_of_problem(operation: str) -> None:
    p = steps.smaller(next(p for p in steps.problems() if p.operation == operation))
    lines = measured(p)
    assert len(lines) > 1
    ours = [line for line in lines.values() if "skipped" not in line]
    assert all(line["error"] < 1e-3 and line["seconds"] > 0 for line in ours)


def test_peers_are_asked_for_what_they_can(monkeypatch) -> None:
    monkeypatch.setattr(rivals.peers, "missing", lambda name: None)
    assert "flex" not in rivals.names_of("mean", 3072, compiled=True)
    assert rivals.names_of("mean", 64, compiled=True) == ("compile", "flex")
    assert rivals.names_of("mean", 64, compiled=False) == ("cached", "cached tf32", "sdpa", "keops")
    assert "keops" not in rivals.names_of("mean", 3072, compiled=False)
    monkeypatch.setattr(rivals.peers, "missing", lambda name: "why" if name == "keops" else None)
    assert "keops" not in rivals.names_of("mean", 64, compiled=False)


def test_peers_whose_rows_would_not_fit_are_left_out(monkeypatch) -> None:
    monkeypatch.setattr(rivals, "too_large", lambda made, device: "its rows would take 63 GiB")
    lines = measured(SMALL)
    assert lines.pop("memokern")["seconds"] > 0
    assert lines and all("63 GiB" in line["skipped"] for line in lines.values())


def test_the_steps_are_in_order_of_importance() -> None:
    plan = steps.plan(rehearsed=False, only="")
    every = [*plan.smoke, *plan.warm, *plan.time]
    assert len({step.name for step in every}) == len(every)
    assert all(steps.step_of(json.loads(json.dumps(s.message()))).case == s.case for s in every)
    first = [step.case for step in plan.time[:9]]
    assert {(c.b, c.rows) for c in first} == {(b, t) for b in (1, 64, 256) for t in steps.TYPES[:3]}
    assert {(c.operation, c.d) for c in first} == {("mean", 3072)}
    kinds = [step.kind for step in plan.time]
    assert kinds == sorted(kinds, key=["time", "compiled"].index)
    # Every operation with every type of rows that it takes comes before any second case.
    asked = [(s.case.operation, s.case.rows) for s in plan.smoke]
    operations = set(smoke.CHECKS) - {"posterior ieee"}
    assert {o for o, _ in asked} - {"posterior ieee"} == operations
    for operation in operations - {"rows' gradient"}:
        assert {t for o, t in asked if o == operation} == set(steps.TYPES)
    assert {t for o, t in asked if o == "rows' gradient"} == set(steps.TYPES) - {"uint8"}
    assert not any(step.case.is_big for step in plan.warm)
    few = steps.plan(rehearsed=True, only="nearest uint8")
    assert [s.name for s in few.smoke] == [
        "smoke: nearest uint8 B=5 N=70 D=270",
        "smoke: nearest uint8 B=1 N=70 D=270 by cuda",
        "smoke: nearest uint8 B=4 N=70 D=270 by cuda",
        "smoke: nearest uint8 B=1 N=70 D=270",
        "smoke: nearest uint8 B=2 N=70 D=270 far",
        "smoke: nearest uint8 B=4 N=70 D=270 by triton",
    ]


# --- the truth -----------------------------------------------------------------------------------


def given(weighting: str = "gaussian", sigma: float = 0.7) -> truth.Given:
    g = torch.Generator().manual_seed(0)
    x, rows = torch.randn(4, 3, dtype=F64, generator=g), torch.randn(9, 3, dtype=F64, generator=g)
    one = torch.ones(4, dtype=F64)
    bias = torch.randn(9, dtype=F64, generator=g)
    return truth.Given(x, rows, 2.0, 0.5, sigma * one, 0.8 * one, 1.3 * one, bias, weighting)


@pytest.mark.parametrize("weighting, sigma", [("gaussian", 0.7), ("gaussian", 0.0), ("log", 1.0)])
def test_the_truth_is_the_references(weighting: str, sigma: float, monkeypatch) -> None:
    monkeypatch.setattr(truth, "CHUNK", 40)  # some rows at a time
    of = given(weighting, sigma)
    assert len(of.chunks()) > 1
    query = Query(of.x, of.sigma, of.alpha, of.temperature, of.bias, weighting)
    want = reference.posterior(query, Rows(of.rows, of.scale, of.shift))
    for name, a, b in zip(smoke.FIELDS, truth.sums(of), want, strict=True):
        if sigma > 0 or name not in ("log_z", "mean_logit"):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    lists = torch.tensor([0, 2, 3, 8, 9]), torch.tensor([1, 4, 0, 2, 3, 5, 6, 8, 7])
    got = truth.listed_sums(of, *lists)[0]
    alone = of.take(0, torch.tensor([1, 4]))
    torch.testing.assert_close(got[:1], truth.sums(alone)[0])


def test_the_rows_gradient_by_hand_is_that_of_autograd() -> None:
    of = given()._replace(temperature=torch.ones(4, dtype=F64))
    grad = torch.randn(4, 3, dtype=F64)
    values = of.values(slice(None)).requires_grad_()
    mean = truth.sums(of._replace(rows=values, scale=1.0, shift=0.0))[0]
    (want,) = torch.autograd.grad(mean, values, grad)
    torch.testing.assert_close(truth.rows_gradient(of, grad, 5), want[:5])


def test_what_is_off_is_noticed() -> None:
    want = torch.tensor([1.0, math.inf, math.nan])
    assert truth.compare("x", want.clone(), want, 1e-3).ratio == 0
    off = truth.compare("x", torch.tensor([1.01, math.inf, math.nan]), want, 1e-3)
    assert off.ratio == pytest.approx(10, rel=1e-3) and off.allowed == 1e-3
    for bad in ([math.nan, math.inf, math.nan], [1.0, 2.0, math.nan], [1.0, math.inf, 0.0]):
        assert truth.compare("x", torch.tensor(bad), want, 1e-3).ratio == math.inf
    assert truth.compare("x", want[:1] + 1, want[:1], 0.0).ratio == math.inf
    found = [truth.compare(n, want[:1] + e, want[:1], 1.0) for n, e in (("a", 0.1), ("b", 0.3))]
    assert truth.worst(found).output == "b"
    with pytest.raises(ValueError, match="has the shape"):
        truth.compare("x", want[:2], want, 1.0)


def test_a_line_tells_whether_it_is_wrong() -> None:
    assert not page.is_wrong({"ratio": 1.0}) and page.is_wrong({"ratio": 1.1})
    assert page.is_wrong({"ratio": "inf"})  # JSON has no infinity
    assert page.is_wrong({"failed": "why"}) and not page.is_wrong({"skipped": "why"})
    assert page.is_wrong({"status": 1}) and not page.is_wrong({"status": 0})


def test_a_strided_case_lies_at_an_odd_address() -> None:
    made = smoke.Made(Smoke("posterior", "float32", 2, 9, 8, layout="strided"), CPU)
    assert made.rows.stride() == (11, 1) and made.rows.storage_offset() == 1
    assert rates.shares(10.0, 1.0, 1.0, "uint8", {})["of_memory"] is None


@pytest.mark.gpu
def test_a_problem_on_the_gpu() -> None:
    device = torch.device("cuda")
    on = timing.Conditions(device, rates.measured(device))
    lines = measured(Problem("mean", "float32", 64, 20_000, 256), on)
    assert lines["memokern"]["error"] < makers.TOLERANCE["mean"] and "cached" in lines
    assert lines[timing.IN_A_GRAPH]["error"] < makers.TOLERANCE["mean"]
