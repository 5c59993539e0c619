"""Which rows can matter: what bound_scan proves is checked literally, in float64, against every
row, over every backend."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from memokern.calls import LogitBounds, Query, Rows, Scan
from tests import harness, oracle
from tests.cases import F16, F32, F64, ROW_TYPES, U8, UINT8_UNIT, column, normal, query_of
from tests.harness import compiled_backends, every_backend, over, sized
from tests.plain_index import PlainIndex, U, check_lists

EPS = 1e-6
DIMS, EDGES = (8, 12, 16, 24), (8, 10, 12, 16, 24, 32)  # of the levels and of the bands


def decaying(n: int, d: int, seed: int, kind: str = "random") -> Tensor:
    """[n, d] float32 values with a few directions of large variance."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randn(n, d, dtype=F64, generator=g) * torch.linspace(3, 0.1, d, dtype=F64)
    if kind == "clustered":  # sorted: the last cluster's rows come last
        y = 0.05 * y + 3 * torch.randn(8, d, dtype=F64, generator=g)[torch.arange(n) * 8 // n]
    if kind == "duplicated":
        y[n // 3 :] = y[torch.arange(n - n // 3) % max(n // 3, 1)]
    return y.to(F32)


def near(rows: Rows, b: int, sigma: float, alpha: float, seed: int, dtype=F32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    pick = torch.randint(0, rows.n, (b,), generator=g)
    noise = torch.randn(b, rows.dim, dtype=F64, generator=g)
    return (alpha * oracle.values(rows)[pick] + sigma * noise).to(dtype)


def indexed(data: Tensor, unit=(1.0, 0.0), **how) -> tuple[Rows, PlainIndex]:
    """Rows with norms, and their index."""
    rows = Rows(data, *unit)
    index = PlainIndex(rows, **{"dims": DIMS, "edges": EDGES} | how)
    return index.rows_with_norms(rows), index


def scan(
    backend: str, query: Query, rows: Rows, index: PlainIndex, eps=1e-6, most_listed=None
) -> tuple[Tensor, ...]:
    """-> start, index, threshold, level."""
    bounds = index.bounds(query, eps, most_listed)
    found = harness.bound_scan(backend, query, rows, bounds)
    assert isinstance(found, Scan)
    return *found.lists, found.threshold, found.level


SHAPES = {
    "reference": [(1, 20, 3), (50, 40, 1), (130, 33, 17)],
    "cpu": [(1, 20, 3), (50, 40, 1), (777, 33, 65), (1300, 48, 17), (1024, 40, 2)],
    "cuda": [(1, 20, 3), (50, 40, 1), (300, 33, 33)],
}


def promises(kernels: str):
    """(n, d, b), and for each several (sigma, alpha, temperature, dtype of x, biased)."""
    for seed, shape in enumerate(SHAPES[kernels]):
        levels = []
        for i, sigma in enumerate((1e-3, 0.1, 0.5, 1.0, 3.0, 1e3)):
            alpha, temperature = (1.0, 0.4, 0.0, -0.7)[(i + seed) % 4], (1.0, 0.3, 4.0)[i % 3]
            for biased in (False, True):
                dtype = F64 if i % 2 and kernels != "cuda" else F32
                levels.append((sigma, alpha, temperature, dtype, biased))
        yield seed, shape, levels


def promises_interpreted(half: bool):
    for seed, (n, d, b, sigma) in enumerate([
        (1, 20, 3, 1e-3), (50, 40, 1, 1e3), (130, 33, 17, 0.1), (130, 33, 65, 1.0),
        (130, 48, 17, 3.0), (190, 33, 4, 0.5),
    ]):  # fmt: skip
        alpha, temperature = (1.0, 0.4, -0.7, 1.0)[seed % 4], (1.0, 0.3, 4.0)[seed % 3]
        yield seed, (n, d, b), [(sigma, alpha, temperature, F32, bool((half + seed) % 2))]


@functools.lru_cache(maxsize=3)  # one of each kernels, which take turns
def promised(kernels: str, kind: str, half: bool) -> list[tuple[Query, Rows, LogitBounds, Tensor]]:
    """Queries, rows and bounds, and all logits; not to be written to."""
    found = []
    for seed, (n, d, b), levels in (
        promises_interpreted(half) if kernels == "triton" else promises(kernels)
    ):
        rows, index = indexed(
            decaying(n, d, seed, kind),
            dims=[k for k in DIMS if k < d],
            storage=F16 if half else F32,
            basis=("principal", "random")[seed % 2],
        )
        bias = 3 * normal(n, seed=seed)
        if n > 1:
            bias[:: max(n // 7, 2)] = -math.inf
        for sigma, alpha, temperature, dtype, biased in levels:
            x = near(rows, b, sigma, alpha, seed, dtype)
            query = query_of(x, sigma, alpha, temperature, bias if biased else None)
            found.append((query, rows, index.bounds(query), oracle.logits(query, rows)))
    return found


@every_backend
@pytest.mark.parametrize("half", [True, False], ids=["float16", "float32"])
@pytest.mark.parametrize("kind", ["random", "clustered", "duplicated"])
@pytest.mark.one_of(2)
def test_lists_keep_their_promise(backend: str, kind: str, half: bool) -> None:
    few, kernels = 0, backend.partition(":")[0]
    for query, rows, bounds, t in promised(kernels, kind, half):
        lists, threshold, level = harness.bound_scan(backend, query, rows, bounds)
        assert bool((level >= 1).all())  # all rows may be listed: none is given up
        check_lists((*lists, threshold, level), t)
        few += lists.index.numel() < t.numel() / (2 if backend == "triton" else 1)
    # At small sigma most rows are dropped.
    assert few >= (2 if backend == "triton" else 4 * (len(SHAPES[kernels]) - 1))


@over(sized((1500, 40, 1.0), triton=((500, 20, 0.3),)), "n", "b", "most")
def test_only_what_the_bounds_allow_is_listed(backend: str, n: int, b: int, most: float) -> None:
    """At small sigma a query's own row is left alone; bounds by every coordinate are exact."""
    rows, index = indexed(decaying(n, 48, 3), dims=(8, 16, 48), edges=(8, 16, 48), storage=F32)
    for sigma in (0.05, 0.3, 1.0):
        if sigma > most:
            continue
        query = query_of(near(rows, b, sigma, 1.0, 5), sigma)
        start, listed, threshold, _ = scan(backend, query, rows, index)
        # No band is left beyond the last level: what is listed is what is above the threshold,
        # but for the margin 2 (K + nb + 16) u |xc| y_max in <x, y> and the like in the squares.
        t = oracle.logits(query, rows)
        size = 4 * (48 + 90) * U * (query.x.norm(dim=1).max().item() + index.y_max + 9) ** 2
        allowed = (t > (threshold - size / sigma**2)[:, None]).sum(1)
        if backend == "reference":  # lists of up to 16 rows are not looked at again
            allowed = torch.where(start.diff() <= 16, 16, allowed)
        assert bool((start.diff() <= allowed).all())
        assert sigma > 0.1 or len(listed) < 2 * b
        assert backend != "triton" or sigma > 0.1 or len(listed) == b


@over(sized((400, 30), triton=((200, 20),)), "n", "b")
def test_a_bound_that_lies_is_noticed(backend: str, n: int, b: int) -> None:
    """Norms too small on rows that the coordinates do not tell: `check_lists` must fail."""
    g = torch.Generator().manual_seed(0)
    y = torch.zeros(n, 40, dtype=F64)
    y[:, :8] = torch.randn(n, 8, dtype=F64, generator=g)
    y[:, 30:] = 6 * torch.randn(n, 10, dtype=F64, generator=g)  # beyond the levels
    rows, index = indexed(y.to(F32), dims=DIMS[:3], basis="axes")
    query = query_of(near(rows, b, 0.5, 1.0, 2), 0.5)
    t = oracle.logits(query, rows)
    check_lists(scan(backend, query, rows, index), t)
    index.coarse[:, 8:-1] *= 0.05
    with pytest.raises(AssertionError):
        check_lists(scan(backend, query, rows, index), t)


@over(sized(*((2000, b) for b in (1, 40, 150)), triton=((150, 20),)), "n", "b")
@pytest.mark.parametrize("share", [0.01, 0.1, 1.0])
def test_queries_of_any_noise_in_one_batch(backend: str, n: int, b: int, share: float) -> None:
    """Sorted by it, sampled, some given up, the others put together anew: each list keeps its
    promise, and where all rows may be listed nobody is given up."""
    rows, index = indexed(decaying(n, 48, 3))
    g = torch.Generator().manual_seed(int(share * n))
    sigma = torch.exp(2 * torch.randn(b, dtype=F64, generator=g) - 1)
    noise = sigma[:, None] * torch.randn(b, 48, dtype=F64, generator=g)
    query = query_of((near(rows, b, 0.0, 1.0, b, F64) + noise).to(F32), sigma)
    found = scan(backend, query, rows, index, most_listed=max(1, int(share * n)))
    check_lists(found, oracle.logits(query, rows))
    level = found[3]
    if share == 1.0:
        assert bool((level > 0).all())
    elif b > 100:  # the noisiest are given up, the least noisy are not
        assert level[sigma.argmax()] == 0 and level[sigma.argmin()] > 0


@over(sized((600, 100), triton=((100, 50),)), "n", "most")
def test_queries_that_cannot_be_bounded_are_given_up(backend: str, n: int, most: int) -> None:
    rows, index = indexed(decaying(n, 40, 1))
    x = near(rows, 9, 0.1, 1.0, 0)
    x[1, 3], x[2, 0] = math.nan, math.inf
    query = query_of(x, 0.1)
    query.sigma[3], query.alpha[4], query.temperature[5] = 0.0, math.nan, 0.0
    query.sigma[6], query.temperature[7] = 50.0, math.inf
    found = scan(backend, query, rows, index, most_listed=most)
    start, listed, threshold, level = found
    given_up = torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 0], dtype=torch.bool)  # 6: too many rows
    assert torch.equal(level == 0, given_up)
    assert bool((start.diff()[given_up] == 0).all())
    if backend != "reference":
        assert bool(threshold[given_up].isnan().all())
    kept = query.take(torch.tensor([0, 8]))
    pick = [*range(int(start[0]), int(start[1])), *range(int(start[8]), int(start[9]))]
    counts = torch.tensor([0, *start.diff()[[0, 8]].tolist()]).cumsum(0)
    rest = (counts, listed[pick], threshold[[0, 8]], level[[0, 8]])
    check_lists(rest, oracle.logits(kept, rows))
    # The lists of the others are what they are alone.
    alone = scan(backend, query.take(slice(8, 9)), rows, index, most_listed=most)
    assert torch.equal(listed[start[8] :], alone[1])


@over(lambda name: [] if name == "triton" else [9000], "n")
def test_lists_longer_than_a_buffer(backend: str, n: int) -> None:
    """Climbed on the way, then given up or not."""
    rows, index = indexed(decaying(n, 24, 2), dims=(8, 12))
    x = near(rows, 3, 2.0, 1.0, 0)
    query = query_of(x, 30.0)
    assert scan(backend, query, rows, index, most_listed=50)[3].tolist() == [0, 0, 0]
    check_lists(scan(backend, query, rows, index), oracle.logits(query, rows))
    query = query_of(x, 1.5)
    found = scan(backend, query, rows, index, most_listed=4000)
    check_lists(found, oracle.logits(query, rows))


@over(sized(400, triton=(120,)), "n")
def test_small_sigma_keeps_few_rows_and_large_sigma_uses_every_level(backend: str, n: int) -> None:
    data = (normal(n, 16, seed=5) * torch.logspace(0, -1, 16)).float()
    rows, index = indexed(data, dims=(4, 8, 12), edges=(6, 10))
    x = data[:20] + 0.02 * normal(20, 16, seed=6).float()
    start, _, _, level = scan(backend, query_of(x, 0.02), rows, index)
    assert start[-1] < 40
    assert level.min() >= 1 and level.max() <= len(index.dims)
    assert scan(backend, query_of(x, 0.5), rows, index)[3].max() == len(index.dims)


@pytest.mark.parametrize("dtype", ROW_TYPES, ids=str)
@every_backend
def test_every_row_type(backend: str, dtype: torch.dtype) -> None:
    n, unit = 200, UINT8_UNIT if dtype == U8 else (1.0, 0.0)
    values = decaying(n, 40, 0)
    data = (values * 30 + 128).clamp(0, 255).to(U8) if dtype == U8 else values.to(dtype)
    rows, index = indexed(data, unit)
    query = query_of(near(rows, 5, 0.1, 1.0, 0), 0.1)
    found = scan(backend, query, rows, index)
    check_lists(found, oracle.logits(query, rows))
    assert len(found[1]) < n


@every_backend
def test_no_queries(backend: str) -> None:
    rows, index = indexed(decaying(30, 40, 1))
    found = scan(backend, query_of(torch.empty(0, 40), 1.0), rows, index)
    assert found[0].tolist() == [0] and all(len(v) == 0 for v in found[1:])


@compiled_backends
def test_arguments_are_checked(backend: str) -> None:
    rows, index = indexed(decaying(30, 40, 1))
    query = query_of(rows.data[:2].clone(), 1.0)

    def refused(words: str, **changes: object) -> None:
        bounds = index.bounds(query)._replace(**changes)
        with pytest.raises(ValueError, match=words):
            harness.bound_scan(backend, query, rows, bounds)

    refused("eps", eps=0.0)
    refused("most_listed must be at least 1", most_listed=0)
    refused("coarse must be float32", coarse=index.coarse.to(F64))
    refused("first_band", first_band=(0, 1, 2, 9))
    refused("dims must", dims=())
    refused(r"margin must be float64 \[2\]", margin=column(0.0, 3))


@functools.lru_cache(maxsize=2)
def beyond_the_levels(
    dtype: torch.dtype, x_dtype: torch.dtype
) -> tuple[Query, Rows, PlainIndex, LogitBounds, Tensor]:
    """Rows that differ only beyond the levels, in 3000 features (more than one sum in float, or in
    32 bits, takes), and a threshold in their midst; not to be written to."""
    n, d, b = 400, 3001, 6
    g = torch.Generator().manual_seed(5)
    values = torch.rand(n, d, dtype=F64, generator=g)
    values[:, :40] = values[:1, :40]
    unit = UINT8_UNIT if dtype == U8 else (1.0, 0.0)
    data = (values * 255 if dtype == U8 else values).to(dtype)
    rows, index = indexed(data, unit, dims=(8, 16), edges=(8, 16), basis="axes")
    y = oracle.values(rows)
    x = (y[:b] + 0.01 * torch.randn(b, d, dtype=F64, generator=g)).to(x_dtype)
    typical = oracle.squares(x, y).median(1).values
    query = query_of(x, (typical / (2 * math.log(n / EPS))).sqrt())
    return query, rows, index, index.bounds(query, EPS), oracle.logits(query, rows)


@pytest.mark.parametrize("x_dtype", [F32, F64], ids=["float32", "float64"])
@over(lambda name: ROW_TYPES if name.startswith("cpu") else (), "dtype")
def test_the_last_level_is_the_product_of_all_features(
    backend: str, dtype: torch.dtype, x_dtype: torch.dtype
) -> None:
    """Every row above the threshold is listed, and of those below only such as rounding cannot tell
    from it. The compiled kernels have such a level."""
    query, rows, index, bounds, t = beyond_the_levels(dtype, x_dtype)
    (start, listed), threshold, level = harness.bound_scan(backend, query, rows, bounds)
    check_lists((start, listed, threshold, level), t, EPS)
    # The error of that product, and of a bound (the slack in csrc).
    pad = (rows.shift - index.center).norm() + index.center.norm()
    length = (query.x.to(F64) - index.center).norm(dim=1)
    error = U * (length * (300 * index.y_max + 4 * pad) + 300 * index.y_max**2)
    if dtype == U8:  # no sharper than need be: kLastError
        error = error + 0.04 * query.sigma**2 * math.log(rows.n / EPS)
    for i in range(len(query.x)):
        mine = listed[start[i] : start[i + 1]]
        assert 100 < len(mine) < 300 and level[i] > 0
        off = 2 * error[i] / query.sigma[i] ** 2
        assert bool((t[i][mine] >= threshold[i] - off).all())
