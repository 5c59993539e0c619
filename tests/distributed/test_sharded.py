"""Rows on several ranks give what all rows in one process do."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import programs
from tests.distributed.pool import Raised

SIZES = [2, 3, 4]
OPTIONS = {
    "near": {"sigma": 0.3},
    "far": {"sigma": 20.0, "alpha": 0.7, "temperature": 2.0},
    "zero": {"sigma": 0.0},
    "tiny": {"sigma": 1e-160},
    "log": {"sigma": 1.0, "weighting": "log"},
    "bias": {"sigma": 1.0, "bias": torch.linspace(-3, 0, 37, dtype=torch.float64)},
    "left out": {"sigma": 0.5, "bias": torch.log((torch.arange(37) // 2 == 15).double())},
}  # fmt: skip


def same(found, expected, tol):
    for rank, mine in enumerate(found):
        assert not isinstance(mine, Raised), (rank, mine)
        for name, value in expected.items():
            torch.testing.assert_close(
                mine[name],
                value,
                rtol=tol,
                atol=tol,
                equal_nan=True,
                msg=lambda s, name=name: f"{name}: {s}",
            )


@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.one_of(2)
def test_posterior(pool, case, kind):
    tol = 1e-5 if kind == torch.float32 else 1e-11
    expected = programs.posterior("one", OPTIONS[case], kind)
    for size in SIZES:
        same(pool.run(size, programs.posterior, OPTIONS[case], kind), expected, tol)


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("sigma", [0.4, 2.0])
def test_gradients(pool, sigma, second):
    expected = programs.gradients("one", second, sigma)
    found = pool.run(3, programs.gradients, second, sigma)
    assert not any(isinstance(v, Raised) for v in found), found
    for mine in found:
        for got, wanted in zip(mine[:4], expected[:4], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    if not second:  # the bias is each rank's own
        every = torch.cat([mine[4] for mine in found])
        torch.testing.assert_close(every, expected[4], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.one_of(3)
def test_everything_else(pool, size):
    expected = programs.questions("one")
    same(pool.run(size, programs.questions), expected, 2e-5)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.one_of(2)
def test_certificates(pool, size):
    exact = programs.certified("one", "dense")
    for method in ("pruned", "auto", "dense"):
        for mine in pool.run(size, programs.certified, method):
            assert not isinstance(mine, Raised), mine
            for name in ("weight", "mean_error", "score_error", "log_z_error"):
                assert bool((mine[name] >= 0).all()) and bool(mine[name].isfinite().all())
            off = torch.linalg.vector_norm(mine["mean"] - exact["mean"], dim=1)
            assert bool((off <= mine["mean_error"] + 2e-5).all())
            assert bool((mine["weight"] < 2e-6).all())
            assert mine["rows_kept"][3] == mine["rows_kept"][4] == 1797  # sigma = 0 and 30
            if method == "pruned":
                assert bool((mine["rows_kept"] < 1797).any() and (mine["weight"] > 0).any())
            if method == "dense":
                assert not bool(mine["weight"].any())


@pytest.mark.parametrize("counts", [[5, 3], [3, 0, 4], [0, 2, 5, 1]], ids=str)
@pytest.mark.one_of(2)
def test_split_queries_that_ask_for_something(pool, counts):
    expected = programs.split_asked("one", counts)
    found = pool.run(len(counts), programs.split_asked, counts)
    assert not any(isinstance(v, Raised) for v in found), found
    same([{k: torch.cat([mine[k] for mine in found]) for k in expected}], expected, 1e-5)


def test_a_rank_explains_by_itself(pool):
    first, _ = pool.run(2, programs.explained)
    assert first[0].startswith("37 rows on 2 ranks, 19 of them here: dense")
    assert first[1] != "None"
