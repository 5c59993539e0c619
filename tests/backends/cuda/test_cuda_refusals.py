"""Which calls the CUDA kernels refuse, with which words, and why they may not run at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from memokern.backends import protocol
from memokern.backends.cuda import BACKEND, Cuda
from memokern.backends.cuda.core import compiler, driver, machine, sources
from memokern.backends.cuda.posterior import planner
from memokern.backends.protocol import OPERATIONS, Call
from tests.backends.cuda.fake_driver import H100, installed
from tests.cases import ROW_TYPES

F32, F64, U8 = torch.float32, torch.float64, torch.uint8

SWEEPS = ("posterior", "posterior_state", "posterior_backward")
TAKEN = (*SWEEPS, "bound_scan", "posterior_listed", "posterior_listed_backward", "nearest")


@pytest.fixture
def here() -> Iterator[pytest.MonkeyPatch]:
    """A machine with an H100, a driver and NVRTC."""
    with installed(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patch.setattr(protocol, "_captures", lambda: False)
        patch.setattr(compiler, "missing", lambda: None)
        patch.setattr(sources, "missing", lambda: None)
        patch.setattr(compiler, "version", lambda: "13.0")
        patch.setattr(compiler, "architectures", lambda: frozenset({80, 90, 100}))
        _forget()
        yield patch
    _forget()


def _forget() -> None:
    Cuda.unavailable.cache_clear()
    machine.unknown.cache_clear()


def usual(**fields: object) -> Call:
    return Call("cuda", F32, U8, 1, 50_000, 3072)._replace(**fields)


def test_exactly_these_calls_are_refused(here) -> None:
    assert BACKEND.unavailable() is None
    for operation, device, x, rows, transform, own_bias in itertools.product(
        OPERATIONS, ("cpu", "cuda", "mps"), (F32, F64), ROW_TYPES, (False, True), (False, True)
    ):
        call = usual(device=device, x=x, rows=rows, transform=transform, own_bias=own_bias)
        if device != "cuda":
            words = f"these are on {device}"
        elif transform:
            words = "no torch.func transforms and no forward mode"
        elif operation not in TAKEN:
            words = f"it has no kernel for {operation}"
        elif own_bias:
            words = "differ from query to query"
        else:
            words = "no kernel for float64" if F64 in (x, rows) else None
        reason = BACKEND.refusal(operation, call)
        assert (reason is None) == (words is None), (operation, call, reason)
        assert words is None or (words in reason and "\n" not in reason), (call, reason)


def test_rows_that_are_too_narrow_or_too_wide(here) -> None:
    for rows in (F32, torch.bfloat16, torch.float16, U8):
        most = planner.widest(rows)
        for dim, words in ((9, "more than 256"), (256, "more than 256"), (257, None),
                           (most, None), (most + 1, f"at most {most:,} features"),
                           (200_000, "a cluster holds at most")):  # fmt: skip
            reason = BACKEND.refusal("posterior", usual(rows=rows, dim=dim))
            assert (words in reason) if words else reason is None, (rows, dim, reason)
        # Its backward sweep has twice as many products in shared memory.
        most = planner.widest(rows, backward=True)
        assert BACKEND.refusal("posterior_backward", usual(rows=rows, dim=3072)) is None
        reason = BACKEND.refusal("posterior_backward", usual(rows=rows, dim=most + 1))
        assert f"at most {most:,} features" in reason and most < planner.widest(rows) + 1


def test_few_features_are_for_many_queries(here) -> None:
    for operation, b, dim in itertools.product(SWEEPS, (1, 255, 256, 4096), (1, 2, 8, 9)):
        reason = BACKEND.refusal(operation, usual(b=b, dim=dim))
        if operation == "posterior_backward" or dim == 9:
            assert f"for more than 256 features, and there are {dim}" in reason
        elif b < 256:
            assert reason == f"its sweep of {dim} features is for 256 queries and more, not {b}"
        else:
            assert reason is None


def test_many_queries_go_where_they_are_faster_by_count(here) -> None:
    assert BACKEND.refusal("posterior", usual(b=16)) is None
    reason = BACKEND.refusal("posterior", usual(b=4096))
    assert reason.startswith("by count, 4096 queries on 50,000 rows are faster in chunks of rows")


def test_what_needs_no_cluster_takes_rows_of_any_width(here) -> None:
    for operation, dim in itertools.product(TAKEN[3:], (1, 256, 3072, 200_000)):
        assert BACKEND.refusal(operation, usual(dim=dim)) is None


def test_neighbours_that_others_find_sooner(here) -> None:
    for rows, few in ((U8, 4), (torch.float16, 4), (F32, 12)):
        for b in (1, few):
            assert BACKEND.refusal("nearest", usual(b=b, k=64, rows=rows)) is None
        reason = BACKEND.refusal("nearest", usual(b=256, k=1, rows=rows))
        assert reason.startswith("by count, 256 queries on 50,000 rows are faster by products")
    assert "at most 64 neighbours, and 65" in BACKEND.refusal("nearest", usual(k=65))


def test_a_scan_cannot_be_captured(here) -> None:
    here.setattr(protocol, "_captures", lambda: True)
    for operation in TAKEN:
        reason = BACKEND.refusal(operation, usual())
        words = "cannot be captured in a CUDA graph" if operation == "bound_scan" else None
        assert (words in reason) if words else reason is None


def test_an_architecture_that_is_not_known(here) -> None:
    for capability in ((8, 0), (9, 1), (12, 0)):
        here.setattr(torch.cuda, "get_device_capability", lambda device=None, c=capability: c)
        machine.unknown.cache_clear()
        reason = BACKEND.refusal("posterior", usual())
        assert reason is not None and "has kernels for sm_90a, sm_100a, not for sm_" in reason
        assert "NVIDIA H100 of a test" in reason


def test_the_device_of_the_tensors_is_asked_for(here) -> None:
    of = {None: (9, 0), 0: (9, 0), 1: (8, 0)}
    here.setattr(torch.cuda, "get_device_capability", lambda device: of[device.index])
    machine.unknown.cache_clear()
    assert BACKEND.refusal("posterior", usual()) is None
    assert BACKEND.refusal("posterior", usual(device_index=0)) is None
    assert "not for sm_80" in BACKEND.refusal("posterior", usual(device_index=1))


def test_an_nvrtc_that_is_too_old(here) -> None:
    here.setattr(compiler, "architectures", lambda: frozenset({70, 80}))
    reason = BACKEND.refusal("posterior", usual())
    assert reason == "NVRTC 13.0 does not compile for sm_90a: a newer one does"


@pytest.mark.parametrize("case", ["nothing", "AMD", "no extra", "sources", "no GPU", "no driver",
                                  "old driver"])  # fmt: skip
def test_what_a_machine_lacks(here, case: str) -> None:
    words = {
        "nothing": None, "AMD": "is for AMD's GPUs", "no extra": "pip install 'memokern[cuda]'",
        "sources": "install memokern anew", "no GPU": "PyTorch sees no GPU",
        "no driver": "the CUDA driver cannot be loaded",
        "old driver": "the driver is for CUDA 12.8, and NVRTC 13.0 compiles for CUDA 13",
    }[case]  # fmt: skip
    if case == "AMD":
        here.setattr(torch.version, "hip", "6.0")
    elif case == "no extra":
        here.setattr(compiler, "missing", lambda: "pip install 'memokern[cuda]'")
    elif case == "sources":
        here.setattr(sources, "missing", lambda: "install memokern anew")
    elif case == "no GPU":
        here.setattr(torch.cuda, "is_available", lambda: False)
    elif case == "no driver":
        here.setattr(driver, "version", lambda: None)
    elif case == "old driver":
        here.setattr(driver, "version", lambda: (12, 8))
    _forget()
    reason = BACKEND.unavailable()
    assert (words in reason and "\n" not in reason) if words else reason is None
    assert BACKEND.refusal("posterior", usual()) == reason


def test_who_is_asked_on_a_gpu(here) -> None:
    assert protocol.PREFERENCE["cuda"] == ("cuda", "triton", "reference")
    assert protocol.choose("posterior", usual()) is BACKEND
    assert protocol.choose("posterior", usual(x=F64)) is protocol.get("reference")
    assert "H100" in BACKEND.detail() and "NVRTC 13.0" in BACKEND.detail()


def test_the_driver_of_this_machine_is_asked_without_an_error() -> None:
    found = driver.version()
    assert found is None or found >= (11, 0)


def test_the_version_of_a_driver(here) -> None:
    assert driver.version() == (13, 2)


def test_no_kernel_is_made_for_another_device(monkeypatch) -> None:
    machine.unknown.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA L4")
    with pytest.raises(RuntimeError, match=r"not for sm_89 \(NVIDIA L4\)"):
        machine.of.__wrapped__(torch.device("cuda", 0))
    machine.unknown.cache_clear()
    assert H100.arch == "sm_90a"
