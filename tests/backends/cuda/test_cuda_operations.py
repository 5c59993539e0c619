"""The tests of operations (tests/backends) over the CUDA kernels on the emulator. Each program is
compiled for it in about a second, so that most are for the long run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from memokern.backends.cuda.nearest import launch as nearest_launch
from memokern.backends.cuda.scan import launch
from memokern.calls import merge, to_sums
from memokern.calls.state import by_key
from tests import cases, compare, cuda_emulator, harness, oracle
from tests.backends import test_bound_scan as scans
from tests.backends import test_extremes as extremes
from tests.backends import test_listed as lists
from tests.backends import test_nearest as nearest
from tests.backends.cuda.fake_driver import Driver
from tests.cases import BF16, F16, F32, F64, U8, Case, query_of

pytestmark = [
    pytest.mark.skipif(cuda_emulator.missing() is not None, reason=str(cuda_emulator.missing())),
    pytest.mark.usefixtures("taken"),
]
ALL = (U8, F32, BF16, F16)
ROWS = [U8, *(pytest.param(t, marks=pytest.mark.long) for t in (F32, BF16, F16))]
long = pytest.mark.long


@long
@pytest.mark.parametrize("kind", ["random", "clustered", "duplicated"])
@pytest.mark.parametrize("half", [True, False], ids=["float16", "float32"])
def test_scans_keep_their_promise(kind: str, half: bool) -> None:
    scans.test_lists_keep_their_promise("cuda", kind, half)


@long
def test_scans_of_any_noise_and_of_queries_that_cannot_be_bounded() -> None:
    scans.test_queries_of_any_noise_in_one_batch("cuda", 500, 20, 0.1)
    scans.test_queries_that_cannot_be_bounded_are_given_up("cuda", 100, 50)
    scans.test_no_queries("cuda")
    scans.test_arguments_are_checked("cuda")


@long
def test_scans_list_no_more_than_they_must() -> None:
    scans.test_only_what_the_bounds_allow_is_listed("cuda", 500, 20, 0.3)
    scans.test_a_bound_that_lies_is_noticed("cuda", 200, 20)
    scans.test_small_sigma_keeps_few_rows_and_large_sigma_uses_every_level("cuda", 120)
    scans.test_lists_longer_than_a_buffer("cuda", 9000)
    scans.test_queries_of_any_noise_in_one_batch("cuda", 5000, 40, 1.0)


@pytest.mark.parametrize("dtype", ROWS, ids=cases.name_of)
def test_scans_of_every_row_type(dtype: torch.dtype) -> None:
    scans.test_every_row_type("cuda", dtype)


@long
def test_a_scan_waits_once(taken: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launches of a later level, seven others, and one number that the host reads; in blocks of
    queries, one each."""
    rows, index = scans.indexed(scans.decaying(300, 48, 3))
    query = query_of(scans.near(rows, 5, 0.1, 1.0, 5), 0.1)
    read: list[Tensor] = []
    number = Tensor.__int__
    monkeypatch.setattr(Tensor, "__int__", lambda self: read.append(self) or number(self))
    found = {}
    for pairs in (1 << 25, 700):
        monkeypatch.setattr(launch, "_PAIRS", pairs)
        taken.launches.clear()
        read.clear()
        found[pairs] = scans.scan("cuda", query, rows, index)
        blocks = 1 if pairs > 1500 else 3
        entries = [x.entry.removeprefix("memokern_scan_") for x in taken.launches]
        levels = ["refine", "settle_next"] * (len(index.dims) - 1)
        first = ["begin", "bounds", "settle_first", "count", "list"]
        assert entries == [*first, *levels, "end", "gather"] * blocks
        assert len(read) == blocks
    compare.equal(*found.values())


@long
@pytest.mark.parametrize("dtype", ALL, ids=cases.name_of)
@pytest.mark.parametrize("bias", [None, "hole"])
def test_lists_and_their_gradient(dtype: torch.dtype, bias: str | None) -> None:
    group = cases.listed("cuda")[f"{cases.name_of(dtype)}-{bias or 'unbiased'}"]
    lists.test_sums_and_their_gradient("cuda", group)


@long
def test_lists_at_the_limits() -> None:
    lists.test_exact_hits_ties_limits_and_lost_queries("cuda")
    lists.test_their_gradients("cuda")
    lists.test_exact_hits_at_a_tiny_sigma("cuda")
    lists.test_no_queries_and_empty_lists("cuda")
    lists.test_a_lost_query_leaves_the_others_alone("cuda")
    lists.test_lists_that_are_none_are_errors("cuda")


@long
def test_long_lists_and_offsets_beyond_32_bits() -> None:
    lists.test_long_lists_in_parts_and_blocks("cuda")
    lists.test_far_offsets("cuda")
    nearest.test_far_offsets("cuda")


@long
@pytest.mark.parametrize("dtype", ALL, ids=cases.name_of)
def test_nearest_as_all_distances(dtype: torch.dtype) -> None:
    """Few and many features and rows, one query and several, ties, a large offset."""
    for b in (1, 7):
        group = cases.nearest("cuda")[f"{b}-float32-{cases.name_of(dtype)}"]
        nearest.test_as_all_distances("cuda", group)


def test_nearest_where_float32_says_little() -> None:
    nearest.test_offsets_that_hide_the_differences("cuda")
    nearest.test_many_ties("cuda")
    nearest.test_no_query_and_rows_that_are_strided("cuda")
    nearest.test_what_nobody_takes("cuda")
    for far in (1e20, 1e35):
        nearest.test_far_queries("cuda", 3, far)
    for value in (math.nan, math.inf):
        nearest.test_lost_queries_stay_alone("cuda", 3, value)


@long
def test_nearest_where_rounding_is_coherent() -> None:
    nearest.test_where_rounding_is_coherent("cuda", 4, 130, 2048)
    nearest.test_a_batch_can_be_split("cuda")


@long
def test_nearest_in_blocks_of_queries(taken: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four launches for each; the same to the bit."""
    query, rows = Case(7, 300, 20).problem()
    found = []
    for pairs, blocks in ((1 << 25, 1), (900, 3)):
        monkeypatch.setattr(nearest_launch, "_PAIRS", pairs)
        taken.launches.clear()
        found.append(harness.nearest("cuda", query.x, rows, 9))
        entries = [x.entry.removeprefix("memokern_nearest_") for x in taken.launches]
        assert entries == ["about", "bound", "exact", "join"] * blocks
    compare.equal(*found)


# --- the sweep over rows of few features ----------------------------------------------------------


def _plane(case: Case, known: bool = True) -> None:
    """Sums, and states of two parts of the rows."""
    query, rows = case.problem()
    rows = cases.with_norms(rows) if known else rows
    want = oracle.sums(query, rows)
    compare.sums(harness.posterior("cuda", query, rows), want, query, rows, F32, str(case))
    if case.n > 1:
        half, states = case.n // 2, []
        for part in (slice(0, half), slice(half, case.n)):
            norms = None if rows.sq_norms is None else rows.sq_norms[part]
            some = rows._replace(data=rows.data[part], sq_norms=norms)
            asked = query._replace(bias=None if query.bias is None else query.bias[part])
            states.append(harness.posterior_state("cuda", asked, some))
        got = to_sums(merge(*states, by_key(query)), query)
        compare.sums(got, want, query, rows, F32, (str(case), "parts"))


@long
@pytest.mark.parametrize("dtype", ALL, ids=cases.name_of)
def test_few_features_as_the_definition(dtype: torch.dtype, taken: Driver) -> None:
    """Little noise and much, queries far from all rows, sigma = 0, biases, both weightings."""
    for sigma in (1e-3, 0.05, 0.5, 80.0):
        _plane(Case(260, 300, 2, dtype, sigma=sigma, alpha=0.9, temperature=1.3))
    _plane(Case(257, 70, 2, dtype, sigma=0.0), known=False)
    _plane(Case(257, 70, 2, dtype, sigma=0.5, alpha=-0.7, bias="holes", weighting="log"))
    _plane(Case(257, 1, 1, dtype, sigma=0.5, bias="normal"))
    entries = [x.entry for x in taken.launches if "plane" in x.entry]
    assert entries[:2] == ["memokern_plane_sweep", "memokern_plane_sums"]


@long
@pytest.mark.parametrize("d", [3, 4, 5, 8])
def test_every_number_of_few_features(d: int) -> None:
    for sigma in (1e-3, 0.3, 3.0, 1e3):
        _plane(Case(300, 530, d, F32, sigma=sigma, alpha=0.9, bias="hole", temperature=0.7))
        _plane(Case(256, 200, d, F32, sigma=sigma, offset=1000.0))
        _plane(Case(256, 200, d, F32, sigma=sigma, repeat=sigma / 30))
        _plane(Case(256, 200, d, F32, sigma=sigma, alpha=1e-3, bias="holes"))


@long
def test_few_features_far_away_lost_and_mixed() -> None:
    """In one warp: queries of any noise, far ones, one that is not finite, one that only biases
    of -inf answer; and all of them alone."""
    query, rows = Case(256, 150, 2, F32).problem()
    query.sigma[:] = torch.logspace(-4, 3, 256, dtype=F64)
    query.x[3] = 40.0
    query.sigma[7], query.alpha[9], query.alpha[11] = 0.0, 0.0, 1e-30
    want = oracle.sums(query, rows)
    got = harness.posterior("cuda", query, rows)
    compare.sums(got, want, query, rows, F32, "mixed")
    query.x[5, 1] = math.nan
    lost = harness.posterior("cuda", query, rows)
    keep = torch.arange(256) != 5
    compare.equal([v[keep] for v in lost], [v[keep] for v in got])
    assert all(v[5].isnan().all() for v in lost)
    none = query._replace(bias=torch.full((150,), -math.inf, dtype=F64))
    found = harness.posterior("cuda", none, rows)
    assert (found.log_z[keep] == -math.inf).all() and found.mean.isnan().all()
    large = query._replace(x=query.x.nan_to_num(0.0), bias=1e4 * cases.normal(150, seed=3))
    compare.sums(harness.posterior("cuda", large, rows), oracle.sums(large, rows), large, rows, F32,
                 "biases")  # fmt: skip


# --- the sweep over wide rows ---------------------------------------------------------------------


@pytest.mark.parametrize("power", [-66, *(pytest.param(p, marks=long) for p in (-85, -50, 50, 66))])
def test_units_do_not_matter(power: int) -> None:
    extremes.test_units_do_not_matter("cuda", 3, 40, 270, power)
