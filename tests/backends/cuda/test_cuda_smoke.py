"""The smoke tests of the GPU check that are the CUDA kernels': the planner takes all of them on
both architectures, and they run from end to end on the emulator."""

from __future__ import annotations

import pytest
import torch

from memokern.backends.cuda.core.machine import Machine
from memokern.backends.cuda.nearest import costs
from memokern.backends.cuda.posterior import planner
from tests import cuda_emulator
from tests.backends.cuda.fake_driver import Driver
from tools.gpu_check import page, smoke, steps

CASES = steps.cuda_smoke()
H200 = Machine("sm_90a", 132, 227 << 10, 50 << 20)
B200 = Machine("sm_100a", 148, 227 << 10, 126 << 20)


@pytest.mark.parametrize("machine", [H200, B200], ids=lambda m: m.arch)
def test_the_planner_takes_them(machine: Machine) -> None:
    for case in CASES:
        rows = getattr(torch, case.rows)
        for name in smoke.ASKED[case.operation]:
            backward, reason = name == "posterior_backward", None
            if name == "nearest":
                reason = costs.refuses(case.b, case.n, case.d, smoke.K, rows, machine)
            elif "listed" not in name and name != "bound_scan":
                reason = planner.refuses(case.b, case.n, case.d, rows, machine, backward)
            assert reason is None, (case.name, reason)


def test_where_they_do_not_run_they_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[0]
    reason = smoke.skipped(case, torch.device("cpu"))
    assert reason is not None and "\n" not in reason
    line = page.smoke_line({"name": f"smoke: {case.name}", "skipped": reason})
    assert line == f"not run {case.name}: {reason}"
    assert not page.is_wrong({"name": case.name, "skipped": reason})
    assert smoke.skipped(case._replace(backend=""), torch.device("cpu")) is None


@pytest.mark.skipif(cuda_emulator.missing() is not None, reason=str(cuda_emulator.missing()))
@pytest.mark.long
@pytest.mark.parametrize("operation", [*smoke.ASKED])
def test_one_of_each_is_right_on_the_emulator(taken: Driver, operation: str) -> None:
    case = next(c for c in CASES if c.operation == operation and c.rows == "uint8")
    case = steps.smaller(case)
    assert smoke.skipped(case, torch.device("cpu")) is None
    found = smoke.check(case, torch.device("cpu"))
    assert found.ratio <= 1, found
    entries = {launch.entry for launch in taken.launches}
    assert ("memokern_gradient" in entries) == (operation == "gradients")
    of = {"nearest": "nearest_about", "bound_scan": "scan_bounds", "listed": "listed_pairs"}
    words = of.get(operation.split()[0], "sweep")
    assert f"memokern_{words}" in entries
