"""`memokern info`: true statements about this installation, complete and in a form for bug
reports.
"""

from __future__ import annotations

import json
import platform

import torch

from memokern.apps import info
from memokern.backends import protocol as backends


def test_facts_are_those_of_this_machine() -> None:
    facts = info.collect()
    assert facts["python"] == platform.python_version()
    assert facts["threads"] == torch.get_num_threads()
    assert facts["libraries"]["torch"] == info.version("torch")
    assert [(r["name"], r["available"], r["reason"]) for r in facts["backends"]] == [
        (name, bool(available), reason) for name, available, reason in backends.explain()
    ]


def test_every_backend_that_cannot_run_says_why() -> None:
    rows = info.collect()["backends"]
    assert {"reference", "cpu"} <= {row["name"] for row in rows}
    assert all(row["reason"] for row in rows if not row["available"])


def test_text_has_every_fact() -> None:
    facts = info.collect()
    text = info.render(facts)
    for row in facts["backends"]:
        assert row["name"] in text and row["reason"] in text
    for name, found in facts["libraries"].items():
        assert name in text and (found or "not installed") in text


def test_text_without_compiled_kernels_or_libraries() -> None:
    facts = info.collect() | {"isa": None, "libraries": {"triton": None}}
    text = info.render(facts)
    assert "no compiled CPU kernels" in text
    assert "triton       not installed" in text


def test_environment_lists_only_our_variables(monkeypatch) -> None:
    monkeypatch.setenv("MEMOKERN_TEST_ONLY", "1")
    monkeypatch.setenv("SECRET_TOKEN", "do not print")
    facts = info.collect()
    assert facts["environment"]["MEMOKERN_TEST_ONLY"] == "1"
    assert "do not print" not in json.dumps(facts)


def test_missing_distribution_has_no_version() -> None:
    assert info.version("no-such-distribution-memokern") is None
