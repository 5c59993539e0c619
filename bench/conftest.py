"""Options of `python -m bench`, and the figures it collects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import cases, machine
from memokern import files

RESULT = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", type=int, default=50_000, help="N")
    parser.addoption("--quick", action="store_true", help="a few cases, fewer rounds")
    parser.addoption("--data", help="a file of rows for TrainingSet, in place of random ones")
    parser.addoption("--out", help="where the figures go, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULT] = {
        "machine": machine.describe(),
        "skipped": {},
        "cases": [],
        "memory": [],
        "accuracy": [],
    }


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        option = metafunc.config.getoption
        dim = cases.read(option("data")).shape[1] if option("data") else None
        chosen = cases.select(option("quick"), dim)
        metafunc.parametrize("case", chosen, ids=[c.id for c in chosen])


def pytest_sessionfinish(session: pytest.Session) -> None:
    out = session.config.getoption("--out")
    if out:
        files.write_json(Path(out), session.config.stash[RESULT])


@pytest.fixture
def result(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.config.stash[RESULT]
