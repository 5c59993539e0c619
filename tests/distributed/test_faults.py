"""A rank that dies, raises, is late or is asked something else stops all ranks, with a clear error
and soon."""

from __future__ import annotations

import contextlib

import pytest

from tests.distributed import faults
from tests.distributed.pool import Pool, Raised

SAYS = {
    "x": "x differs", "shape": "x differs", "type": "x differs", "sigma": "sigma differs",
    "weighting": "weighting differs", "gradient": "gradients differs", "bias": "bias differs",
    "label": "label differs", "leave_out": "leave_out differs", "condition": "condition differs",
    "bandwidth": "bandwidth differs", "certificate": "certificate differs", "tol": "tol differs",
}  # fmt: skip


@pytest.mark.parametrize("name", SAYS)
@pytest.mark.one_of(2)
def test_a_call_that_differs(pool, name):
    for kind, said, fares in pool.run(3, faults.disagreeing, name):
        assert kind == "ValueError"
        assert SAYS[name] in said and "rank 1" in said
        assert fares  # the ranks can go on


@pytest.mark.parametrize("name", ["vmap", "jvp"])
def test_a_transform_on_one_rank_is_refused_on_all(pool, name):
    for kind, said, fares in pool.run(2, faults.disagreeing, name):
        assert kind == "RuntimeError" and "no torch.func transform" in said, (kind, said)
        assert fares


@pytest.mark.long
def test_a_compiled_call_is_refused(pool):
    for kind, said, fares in pool.run(2, faults.compiled):
        assert kind in ("RuntimeError", "Unsupported") and "no torch.func transform" in said
        assert fares


def test_a_rank_without_samples(pool):
    for rank, (kind, said) in enumerate(pool.run(3, faults.no_samples)):
        assert kind == ("ValueError" if rank == 1 else "RuntimeError")
        assert "expected at least one sample, got none" in said


@pytest.mark.parametrize("where", ["arguments", "sweep", "operation", "version"])
def test_a_rank_that_raises(pool, where):
    found = pool.run(3, faults.raising, where)
    assert not any(isinstance(v, Raised) for v in found), found
    for rank, (kind, said, fares) in enumerate(found):
        if where == "arguments":
            assert kind == ("ValueError" if rank == 1 else "RuntimeError")
            assert "expected sigma finite and >= 0, got -1.0" in said
        elif where == "sweep":
            assert kind == ("MemoryError" if rank == 1 else "RuntimeError")
            assert rank == 1 or "rank 1 failed in 'posterior'" in said
        else:
            assert kind == "ValueError" and f"{where} differs" in said
        assert fares


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nan", "in row 3"),
        ("type", "rows differs"),
        ("shape", "rows differs"),
        ("labels", "labels differs"),
    ],
)
def test_rows_that_differ(pool, name, says):
    for rank, (kind, said) in enumerate(pool.run(2, faults.sharding, name)):
        assert says in said
        assert kind == ("RuntimeError" if name == "nan" and rank == 0 else "ValueError")


@pytest.mark.parametrize(
    "when", ["sweep", "backward", pytest.param("late", marks=pytest.mark.long)]
)
@pytest.mark.one_of(2)
def test_a_rank_that_is_killed(when):
    pool = Pool(3)
    try:
        pool.begin(3, faults.killed, when)
        found = [pool.result(rank, 60.0) for rank in (0, 2)]
    finally:
        with contextlib.suppress(OSError):
            pool.close()
    for took, said, again in found:
        assert "another rank did not answer" in said and "start all ranks again" in said
        assert took < 15
        assert "cannot go on" in again  # at once, whoever is left
