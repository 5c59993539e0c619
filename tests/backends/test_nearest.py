"""The nearest rows: exact, with ties to the lower index, whatever rounding does to the products
that rule rows out."""

from __future__ import annotations

import math

import pytest
import torch

from memokern.calls import Rows
from tests import cases, compare, harness, oracle
from tests.cases import F32, F64, U8, Case, normal
from tests.harness import compiled_backends, every_backend, over, sized


def _check(
    backend: str,
    x: torch.Tensor,
    rows: Rows,
    k: int,
    rtol: float = 1e-12,
    known: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """known: more neighbours than k, as they should be."""
    distance, index = harness.nearest(backend, x, rows, k)
    want, order = (v[:, :k] for v in known or oracle.nearest(x, rows, k))
    assert distance.dtype == F64 and index.dtype == torch.int64
    assert torch.equal(index, order)
    torch.testing.assert_close(distance, want, rtol=rtol, atol=1e-24 if rtol == 1e-12 else 0)


@over(cases.nearest, "group")
def test_as_all_distances(backend: str, group: list[Case]) -> None:
    for case in group:
        query, rows = case.problem()
        x, n = query.x, case.n
        if n > 20:
            rows.data[n // 2] = rows.data[3]  # a tie: the lower index first
            x[0] = oracle.values(rows)[3]
            rows = cases.with_norms(rows) if case.known else rows
        want = oracle.nearest(x, rows, max(cases.neighbours(backend, case)))
        for k in cases.neighbours(backend, case):
            _check(backend, x, rows, k, known=want)


@over(
    sized((1, 400, 4096), (12, 400, 4096), triton=((1, 130, 2048), (4, 130, 2048))), "b", "n", "d"
)
def test_where_rounding_is_coherent(backend: str, b: int, n: int, d: int) -> None:
    """Equal features: every addition of a product rounds the same way, as far as it can go.

    A bound that takes roundings as independent loses the nearest row here; a worst-case one cannot.
    """
    levels = 1 + 2e-3 * torch.rand(n, generator=torch.Generator().manual_seed(0))
    data = levels[:, None].expand(n, d).contiguous()
    x = (levels[:b] + 1e-7)[:, None].expand(b, d).contiguous()
    rows = Rows(data, center=torch.zeros(d), sq_norms=data.double().square().sum(1))
    _check(backend, x, rows, 3, rtol=1e-11)


@pytest.mark.parametrize("far", [1e20, 1e35])
@over(sized(1, 12, triton=(3,)), "b")
def test_far_queries(backend: str, b: int, far: float) -> None:
    """Products that overflow in float32 are never formed into an answer."""
    data = normal(100, 20, dtype=F32)
    data[71] = far
    x = torch.full((b, 20), far)
    x[:, 0] *= 0.5
    distance, index = harness.nearest(backend, x, Rows(data), 1)
    assert (index == 71).all()
    torch.testing.assert_close(distance, torch.full((b, 1), (0.5 * far) ** 2, dtype=F64))


@over(sized((1, 40, 3), (12, 40, 3), (12, 300, 40), triton=()), "b", "n", "d")
def test_squares_that_overflow(backend: str, b: int, n: int, d: int) -> None:
    """Of float64: they are infinite, with ties as of any equal ones; a hit is at distance 0, and a
    near row as near as it is, though no norm is finite."""
    data = normal(n, d, seed=1) * 2.0**520
    x = data[:b].clone()
    x[::2, 0] += 2.0**480
    _check(backend, x, Rows(data), 3)
    distance, index = harness.nearest(backend, x, Rows(data), 3)
    near = (x[:, 0] - data[:b, 0]).square()
    assert torch.equal(index[:, 0], torch.arange(b)) and torch.equal(distance[:, 0], near)
    assert distance[:, 1:].isposinf().all()


@over(sized((1, 40, 3), (12, 40, 40), (30, 9, 2), triton=((3, 40, 3), (3, 9, 40))), "b", "n", "d")
@pytest.mark.parametrize("lost", [0, 5])
def test_a_row_that_is_no_number_is_the_last(
    backend: str, b: int, n: int, d: int, lost: int
) -> None:
    """It hides no other, though a center may be taken of it."""
    data = normal(n, d, seed=1, dtype=F32)
    x = normal(b, d, dtype=F32)
    data[lost, d - 1] = math.nan
    rest = torch.arange(n) != lost
    want, order = oracle.nearest(x, Rows(data[rest]), n - 1)
    want = torch.cat([want, torch.full((b, 1), math.inf, dtype=F64)], 1)
    order = torch.cat([rest.nonzero()[:, 0][order], torch.full((b, 1), lost)], 1)
    for k in (1, n):
        _check(backend, x, Rows(data), k, known=(want, order))


@every_backend
@pytest.mark.parametrize("lost", [(1, 3), (0, 4)])
def test_rows_at_no_distance_keep_their_order(backend: str, lost: tuple[int, int]) -> None:
    data = normal(5, 6, dtype=F32)
    data[lost[0]], data[lost[1], 2] = math.nan, math.inf
    left = [n for n in range(5) if n not in lost]
    distance, index = harness.nearest(backend, normal(3, 6, seed=1, dtype=F32), Rows(data), 5)
    assert (index[:, :3].sort(dim=1).values == torch.tensor(left)).all()
    assert torch.equal(index[:, 3:], torch.tensor(lost).expand(3, 2))
    assert distance[:, :3].isfinite().all() and distance[:, 3:].isposinf().all()


@every_backend
def test_offsets_that_hide_the_differences(backend: str) -> None:
    """Rows 1e-3 apart, a thousand away from the origin: squares that are expanded cannot tell."""
    data = 1000 + torch.arange(40, dtype=F32)[:, None] * 1e-3 + torch.zeros(40, 64)
    _check(backend, data[[7, 23]] + 2e-4, Rows(data), 3)


@every_backend
def test_many_ties(backend: str) -> None:
    data = torch.ones(130, 5)
    distance, index = harness.nearest(backend, torch.ones(2, 5), Rows(data), 64)
    assert torch.equal(index, torch.arange(64).expand(2, 64)) and (distance == 0).all()


@over(sized(3, 20, triton=()), "b")
@pytest.mark.parametrize("k", [65, 400, 2999, 3000])
@pytest.mark.parametrize("kind", ["grid", "near", "far"])
def test_many_neighbours(backend: str, b: int, k: int, kind: str) -> None:
    """Hundreds of neighbours, up to all rows: points of a grid, which are ties; rows so near to
    each other, or one so far away, that products tell nothing."""
    if kind == "grid":
        data = torch.arange(3000)[:, None].div(torch.tensor([1, 9, 81]), rounding_mode="floor") % 9
        data = data.float()
    elif kind == "near":
        data = 300 + normal(3000, 3, dtype=F32) * 1e-4
    else:
        data = normal(3000, 3, dtype=F32)
        data[1234] = 1e30
    _check(backend, data[:b] + 0.5, Rows(data), k)


@over(sized(3, 30, 200, triton=(3,)), "b")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_lost_queries_stay_alone(backend: str, b: int, value: float) -> None:
    query, rows = Case(b, 40, 5).problem()
    clean = harness.nearest(backend, query.x, rows, 3)
    query.x[1, 1] = value
    distance, index = harness.nearest(backend, query.x, rows, 3)
    keep = torch.arange(b) != 1
    assert torch.equal(distance[keep], clean[0][keep]) and torch.equal(index[keep], clean[1][keep])
    lost = distance[1]
    assert (lost.isnan() if math.isnan(value) else lost.isnan() | lost.isposinf()).all()
    assert torch.equal(index[1], torch.arange(3))


@every_backend
def test_no_query_and_rows_that_are_strided(backend: str) -> None:
    query, rows = Case(17, 290, 37).problem()
    wide = torch.full((290, 48), math.nan)
    wide[:, :37] = rows.data
    _check(backend, query.x, rows._replace(data=wide[:, :37]), 3)
    distance, index = harness.nearest(backend, query.x[:0], rows, 3)
    assert distance.shape == index.shape == (0, 3)


@every_backend
def test_far_offsets(backend: str) -> None:
    query, rows = Case(4, 4, 70, U8, sigma=0.1).problem()
    apart = cases.far_apart(rows, harness.device_of(backend))
    found = harness.nearest(backend, query.x, apart, 2)
    compare.equal(found, harness.nearest(backend, query.x, rows, 2))
    assert torch.equal(found[1], oracle.nearest(query.x, rows, 2)[1])


@every_backend
def test_a_batch_can_be_split(backend: str) -> None:
    query, rows = Case(9, 120, 20).problem()
    whole = harness.nearest(backend, query.x, rows, 2)
    parts = [harness.nearest(backend, x, rows, 2) for x in query.x.split(4)]
    compare.equal(whole, [torch.cat(pair) for pair in zip(*parts, strict=True)])


@compiled_backends
def test_what_nobody_takes(backend: str) -> None:
    query, rows = Case(2, 30, 4).problem()
    with pytest.raises(ValueError, match="k must lie between 1 and the number of rows, 30"):
        harness.nearest(backend, query.x, rows, 31)
    with pytest.raises(ValueError, match="expected x"):
        harness.nearest(backend, query.x[:, :2], rows, 1)
    with pytest.raises(ValueError, match="each row must be contiguous"):
        harness.nearest(backend, query.x, Rows(rows.data.T.contiguous().T), 1)
