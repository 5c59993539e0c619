"""Options of `python -m bench`, and the figures it collects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import cases, machine, table
from memokern.util import writing

RESULT = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", type=int, default=50_000, help="N")
    parser.addoption("--quick", action="store_true", help="a few cases, fewer rounds")
    parser.addoption("--data", help="a file of rows for TrainingSet, in place of random ones")
    parser.addoption("--images", help="a file of uint8 images, in place of synthetic ones")
    parser.addoption("--isa", help="instruction sets to time beside the one in use")
    parser.addoption("--out", help="where the figures go, as JSON")
    parser.addoption("--keep", help="figures to add to: only what was disturbed is timed again")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULT] = {
        "machine": machine.describe(),
        "code": machine.code(),
        "skipped": {},
        "cases": [],
        "memory": [],
        "accuracy": [],
    }
    if config.getoption("--keep"):
        keep(config.stash[RESULT], json.loads(Path(config.getoption("--keep")).read_text()))


def keep(result: dict[str, Any], old: dict[str, Any]) -> None:
    """Takes over the cases that nothing disturbed."""
    for what in ("machine", "code"):
        if result[what] != old[what]:
            raise pytest.UsageError(f"the figures to keep are of another {what}: measure them all")
    for what in ("skipped", "memory", "accuracy"):
        result[what] = old[what]
    result["cases"] = [case for case in old["cases"] if table.undisturbed(case)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        option = metafunc.config.getoption
        dim = cases.read(option("data")).shape[1] if option("data") else None
        kept = {case["name"] for case in metafunc.config.stash[RESULT]["cases"]}
        chosen = [c for c in cases.select(option("quick"), dim) if c.name not in kept]
        metafunc.parametrize("case", chosen, ids=[c.id for c in chosen])


def pytest_sessionfinish(session: pytest.Session) -> None:
    out = session.config.getoption("--out")
    if out:
        result = session.config.stash[RESULT]
        order = [case.name for case in cases.select()]
        result["cases"].sort(key=lambda c: order.index(c["name"]) if c["name"] in order else -1)
        writing.write_json(Path(out), result)


@pytest.fixture
def result(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.config.stash[RESULT]
