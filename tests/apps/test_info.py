"""`memokern info`: true statements about this installation, complete and in a form for bug
reports.
"""

from __future__ import annotations

import json
import platform
from types import SimpleNamespace

import pytest
import torch

import memokern
from memokern.apps import info
from memokern.backends import protocol
from memokern.backends.cpu import native
from memokern.util import env

pytestmark = pytest.mark.usefixtures("one_thread")


def test_facts_are_those_of_this_machine() -> None:
    facts = info.collect()
    assert facts["python"] == platform.python_version()
    assert facts["threads"] == torch.get_num_threads()
    assert facts["libraries"]["torch"] == info.version("torch")
    assert [(r["name"], r["available"], r["reason"]) for r in facts["backends"]] == [
        (name, bool(available), reason) for name, available, reason in protocol.here()
    ]


def test_every_backend_that_cannot_run_says_why() -> None:
    rows = info.collect()["backends"]
    assert {"reference", "cpu"} <= {row["name"] for row in rows}
    assert all(row["reason"] for row in rows if not row["available"])


def test_calls_are_explained_as_explain_does() -> None:
    calls = info.explained_calls()
    assert {call["device"] for call in calls} == set(info.devices()) >= {"cpu"}
    for call in calls:
        assert {call["runs"], *call["others"]} == set(protocol.NAMES)
        assert all(call["others"].values())
    found = {call["call"]: call for call in calls if call["device"] == "cpu"}
    assert {"posterior float32", "posterior float32/uint8", "nearest float32"} < found.keys()
    x = torch.zeros(4, 2, dtype=torch.float64)
    explained = memokern.explain(x, torch.zeros(8, 2, dtype=torch.float64), 1.0)
    assert found["posterior float64"]["runs"] == explained.runs
    assert found["posterior float64"]["others"] == {
        answer.name: "could, and is not asked" if answer.runs else answer.detail
        for answer in explained.backends
        if answer.name != explained.runs
    }


def test_a_backend_that_refuses_runs_nothing(monkeypatch) -> None:
    class Refuses(protocol.Backend):
        name = "triton"

        def refuses(self, operation, call):
            return "not today"

        def detail(self):
            return "a backend of this test"

    real = protocol.get
    with monkeypatch.context() as patch:
        patch.setattr(protocol, "get", lambda n: Refuses() if n == "triton" else real(n))
        patch.setenv(env.BACKEND, "triton")
        protocol._candidates.cache_clear()
        calls = info.explained_calls()
        with pytest.raises(RuntimeError, match=r"triton does not: not today.*MEMOKERN_BACKEND"):
            info.check_backend("cpu")
        text = info.render(info.collect() | {"calls": calls})
    protocol._candidates.cache_clear()  # which hold the backend of this test
    protocol._preferred.cache_clear()
    assert {call["runs"] for call in calls} == {None}
    assert all(call["others"]["triton"] == "not today" for call in calls)
    assert "on cpu, nobody runs posterior float32, posterior float32/uint8, " in text
    assert "    triton     not today" in text


def test_check_backend_passes_where_a_backend_runs() -> None:
    info.check_backend("cpu")


def test_text_has_every_fact() -> None:
    facts = info.collect()
    text = info.render(facts)
    for row in facts["backends"]:
        assert row["name"] in text and row["reason"] in text
    for name, found in facts["libraries"].items():
        assert name in text and (found or "not installed") in text
    assert facts["cuda"]["folder"] in text
    for call in facts["calls"]:
        assert call["call"] in text and f"on {call['device']}, {call['runs']} runs" in text
        assert all(reason in text for reason in call["others"].values())


def test_text_without_compiled_kernels_or_libraries() -> None:
    facts = info.collect() | {"isa": None, "libraries": {"triton": None}}
    text = info.render(facts)
    assert "no compiled CPU kernels" in text
    assert "triton             not installed" in text


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
@pytest.mark.parametrize("vnni", [True, False])
def test_vnni_is_named_where_it_is_in_use(isa, vnni, monkeypatch) -> None:
    named = f"{isa} with VNNI" if vnni else isa
    module = SimpleNamespace(isa=lambda: isa, vnni=lambda: vnni)
    cpu = protocol.get("cpu")
    if cpu.unavailable() is not None:
        pytest.skip("the compiled module is missing")
    monkeypatch.setattr(native, "module", lambda: module)
    assert info.instruction_set() == named and f"kernels  {named}\n" in info.render(info.collect())


def test_compiled_cuda_kernels_are_counted(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(env.CUDA_CACHE, str(tmp_path))
    assert info.cuda_kernels()["kernels"] == {}
    (tmp_path / f"sweep.sm_90a.{'0' * 40}.cubin").write_bytes(b"0" * 250_000)
    facts = info.collect()
    assert facts["cuda"]["kernels"] == {"sm_90a": 1} and facts["cuda"]["writable"]
    text = info.render(facts)
    assert f"folder       {tmp_path}" in text and "compiled     1 for sm_90a, 0.2 MB" in text
    gone = {**facts["cuda"], "writable": False, "nvrtc": None, "driver": "13.0", "kernels": {}}
    text = info.render({**facts, "cuda": gone})
    assert "(cannot be written)" in text and "compiled     none yet" in text
    assert "NVRTC        none" in text and "driver       CUDA 13.0" in text


def test_environment_lists_only_our_variables(monkeypatch) -> None:
    monkeypatch.setenv("MEMOKERN_TEST_ONLY", "1")
    monkeypatch.setenv("SECRET_TOKEN", "do not print")
    facts = info.collect()
    assert facts["environment"]["MEMOKERN_TEST_ONLY"] == "1"
    assert "do not print" not in json.dumps(facts)


def test_missing_distribution_has_no_version() -> None:
    assert info.version("no-such-distribution-memokern") is None
