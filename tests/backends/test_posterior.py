"""The dense sweep of every backend against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from memokern.calls import Query, Rows, Sums
from tests import cases, compare, harness, oracle
from tests.cases import BF16, F16, F32, F64, U8, UINT8_UNIT, Case, normal, query_of
from tests.harness import DEVICE, compiled_backends, every_backend, over, sized


def _check(backend: str, query: Query, rows: Rows, what: object) -> Sums:
    got = harness.posterior(backend, query, rows)
    kind = compare.unit(backend, query, rows)
    compare.sums(got, oracle.sums(query, rows), query, rows, kind, what)
    return got


@over(cases.posterior, "group")
@pytest.mark.one_of(3)
def test_as_the_definition(backend: str, group: list[Case]) -> None:
    for case in group:
        query, rows, want = cases.answered(case)
        got = harness.posterior(backend, query, rows)
        compare.sums(got, want, query, rows, compare.unit(backend, query, rows), str(case))


@over(cases.contract, "dtype", "sigma")
@pytest.mark.one_of(2)
def test_contract_at_every_sigma_with_near_duplicates(
    backend: str, dtype: torch.dtype, sigma: float
) -> None:
    """The mean to 1e-5 relative, the weights to 1e-4, near-duplicates and duplicates included."""
    d, n = 96, 130
    values = normal(n, d, seed=1, dtype=F32)
    values[1:6] = values[0] + 1e-3 * normal(5, d, seed=2, dtype=F32)
    values[6] = values[0]
    rows = Rows(values.to(dtype))
    if dtype == U8:
        rows = Rows((values * 30 + 128).clamp(0, 255).to(U8), *UINT8_UNIT)
    rows = cases.with_norms(rows)
    x = (oracle.values(rows)[[0, 0, 3, 50]] + sigma * normal(4, d, seed=3)).float()
    query = query_of(x, sigma)
    compare.contract(harness.posterior(backend, query, rows), oracle.sums(query, rows))


@over(lambda name: [] if name == "triton" else [2, 12, 64], "b")
def test_sums_over_many_rows(backend: str, b: int) -> None:
    """50,000 rows: added one by one to a float32 total, they would be off by 2e-5."""
    data = normal(50_000, 2, dtype=F32)
    x = data[:b] + 0.7 * normal(b, 2, seed=1, dtype=F32)
    query, rows = query_of(x, 0.7), Rows(data)
    got, some = harness.posterior(backend, query, rows), slice(None, None, max(1, b // 4))
    want = oracle.sums(query.take(some), rows)
    assert (got.mean[some].double() - want.mean).abs().max() <= 5e-6 * want.mean.abs().max()


@over(
    sized(
        *((2, F32), (130, F16), *((300, t) for t in cases.ROW_TYPES)),
        triton=((2, F32), (130, F16), *((300, t) for t in (F32, BF16, F16, U8))),
    ),
    "d",
    "dtype",
)
def test_rows_of_equal_weight(backend: str, d: int, dtype: torch.dtype) -> None:
    """What is lost of each sum adds up over the rows."""
    n = 500
    g = torch.Generator().manual_seed(0)
    data = (
        torch.randint(0, 256, (n, d), dtype=dtype, generator=g)
        if dtype == U8
        else (1 + torch.randn(n, d, generator=g)).to(dtype)
    )
    got = harness.posterior(backend, query_of(torch.zeros(1, d), 1e5), Rows(data))
    off = (got.mean.double() - data.double().mean(0)).abs().max()
    assert off <= 4e-6 * data.double().abs().max()
    torch.testing.assert_close(got.weight_sq.item(), 1 / n, rtol=1e-5, atol=0)


@over(sized((40, 120, 33), triton=((7, 32, 33), (7, 32, 140))), "b", "n", "d")
def test_far_queries_and_mixed_levels(backend: str, b: int, n: int, d: int) -> None:
    """Every query has its own noise level, and may be far from all rows."""
    query, rows = Case(b, n, d, sigma=1.0).problem()
    query.x[::2] *= 50
    sigma, alpha = torch.logspace(-3, 3, b, dtype=F64), torch.linspace(0.1, 1, b, dtype=F64)
    _check(backend, query._replace(sigma=sigma, alpha=alpha), rows, "mixed")


@over(sized((2, 30), (30, 30), (300, 2), triton=((2, 5), (2, 300))), "b", "d")
def test_identities(backend: str, b: int, d: int) -> None:
    """Shifted biases shift log Z; duplicated data leave the mean; equal rows weigh the same."""
    query, rows = Case(b, 50, d, sigma=0.6).problem()
    bias = torch.linspace(-1, 1, 50, dtype=F64)
    first = harness.posterior(backend, query._replace(bias=bias), rows)
    moved = harness.posterior(backend, query._replace(bias=bias + 3), rows)
    torch.testing.assert_close(moved.log_z, first.log_z + 3, rtol=0, atol=1e-5)
    torch.testing.assert_close(moved.mean, first.mean, rtol=0, atol=1e-5)
    double = rows._replace(data=rows.data.repeat(2, 1))
    twice = harness.posterior(backend, query._replace(bias=bias.repeat(2)), double)
    torch.testing.assert_close(twice.mean, first.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(twice.log_z, first.log_z + math.log(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(twice.weight_sq, first.weight_sq / 2, rtol=1e-4, atol=0)


@over(
    sized(
        *((b, 300, d, F32) for b in (1, 3, 20) for d in (1, 2, 40)),
        triton=((3, 70, 1, F32), (3, 70, 40, BF16), (3, 70, 140, F32), (3, 70, 300, F32)),
    ),
    "b",
    "n",
    "d",
    "dtype",
)
def test_limit_of_small_sigma(backend: str, b: int, n: int, d: int, dtype: torch.dtype) -> None:
    """At sigma = 0, and where every logit overflows, the nearest row takes all and ties share."""
    g = torch.Generator().manual_seed(1)
    data = torch.randn(n, d, generator=g).to(dtype)
    data[60] = data[7]
    x = data[torch.arange(b) + 5].float() + 1e-3 * torch.randn(b, d, generator=g)
    x[-1] = data[7].float()
    bias = torch.zeros(n, dtype=F64)
    bias[60] = math.log(3)
    rows, query = Rows(data), query_of(x, 0.0, bias=bias)
    at = oracle.squares(x, oracle.values(rows)).argmin(1)
    for sigma in (0.0, 1e-200):
        query = query_of(x, sigma, bias=bias)
        got = harness.posterior(backend, query, rows)
        want = cases.narrow(oracle.sums(query, rows))._replace(mean=data[at].float())
        compare.close(got, want, 1e-6, 1e-6)
        assert torch.isneginf(got.log_z[:-1]).all() and torch.isneginf(got.mean_logit[:-1]).all()
        torch.testing.assert_close(got.log_z[-1].item(), math.log(4))
        torch.testing.assert_close(got.mean_bias[-1].item(), 0.75 * math.log(3))
        torch.testing.assert_close(got.weight_sq[-1].item(), 0.25**2 + 0.75**2)
    # So small that no other row has weight, and large enough for logits that are finite. The
    # reference adds the bias to such a logit, where it is lost.
    query = query_of(x, 1e-30, bias=None if backend == "reference" else bias)
    got, want = harness.posterior(backend, query, rows), oracle.sums(query, rows)
    compare.close(got, cases.narrow(want), 1e-6, 1e-6)
    # The weighting "log" gives all weight to an exact hit, whatever sigma.
    query = query_of(x[-1:], 1.0, bias=bias, weighting="log")
    got = harness.posterior(backend, query, rows)
    torch.testing.assert_close(got.mean, data[7:8].float(), rtol=1e-6, atol=1e-6)
    assert got.log_z.item() == math.inf
    torch.testing.assert_close(got.weight_sq.item(), 0.25**2 + 0.75**2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@over(sized(*((b, d) for b in (3, 30, 200) for d in (2, 40)), triton=((3, 2), (3, 300))), "b", "d")
def test_lost_queries_stay_alone(backend: str, b: int, d: int, value: float) -> None:
    query, rows = Case(b, 40, d).problem()
    clean = harness.posterior(backend, query, rows)
    query.x[1, 1] = value
    got = harness.posterior(backend, query, rows)
    keep = torch.arange(b) != 1
    for a, e in zip(got, clean, strict=True):
        assert torch.isnan(a[1]).all()
        assert torch.equal(a[keep], e[keep])


@every_backend
def test_no_query_one_row_and_strides(backend: str) -> None:
    rows = Rows(normal(5, 3, dtype=F32))
    got = harness.posterior(backend, query_of(torch.empty(0, 3), 1.0), rows)
    assert got.mean.shape == (0, 3) and all(v.shape == (0,) for v in got[1:5])
    got = harness.posterior(backend, query_of(normal(4, 3, dtype=F32), 1.0), Rows(rows.data[:1]))
    torch.testing.assert_close(got.mean, rows.data[:1].expand(4, 3), rtol=1e-6, atol=0)
    if backend.startswith("cpu"):
        assert torch.equal(got.mean, rows.data[:1].expand(4, 3))
    wide, x = normal(50, 40, dtype=F32)[::2, 3:9], normal(7, 12, dtype=F32)[:, ::2]
    assert not wide.is_contiguous() and not x.is_contiguous()
    same = normal(1, 3, dtype=F32).expand(40, 3)  # one row 40 times, which all lie in one place
    _check(backend, query_of(normal(4, 3, dtype=F32), 1.0), Rows(same), "expanded")
    first = harness.posterior(backend, query_of(x, 1.0), Rows(wide))
    again = harness.posterior(backend, query_of(x.contiguous(), 1.0), Rows(wide.contiguous()))
    compare.equal(first, again)


@over(sized((1, 5), (20, 5), triton=((1, 5), (1, 140), (1, 300))), "b", "d")
def test_far_offsets(backend: str, b: int, d: int) -> None:
    """Rows more than 2^31 elements apart: one page of rows, seen with a stride of 2^30 elements."""
    _, rows = Case(1, 4, d, U8, sigma=0.0).problem()
    query = query_of((oracle.values(rows)[-1:] + 0.01).float().repeat(b, 1), 0.3)
    apart = cases.far_apart(rows, harness.device_of(backend))
    got, want = (harness.posterior(backend, query, v) for v in (apart, rows))
    assert torch.equal(got.mean, want.mean)


@over(sized((3, 500, 40), (300, 500, 3), triton=((5, 60, 40),)), "b", "n", "d")
def test_split_of_the_batch(backend: str, b: int, n: int, d: int) -> None:
    """A batch in two parts gives the same within rounding; the same batch, the same bits."""
    query, rows = Case(b, n, d, sigma=1.0).problem()
    whole = harness.posterior(backend, query, rows)
    compare.equal(harness.posterior(backend, query, rows), whole)
    cut = b // 2 + 1
    parts = [harness.posterior(backend, query.take(at), rows) for at in (slice(cut), slice(cut, b))]
    joined = [torch.cat(pair) for pair in zip(*parts, strict=True)]
    compare.close(whole, joined, rtol=1e-5, atol=1e-5)


@over(
    sized(*((b, 50, d) for b in (1, 12, 64) for d in (2, 40)), triton=((2, 20, 3), (2, 20, 300))),
    "b",
    "n",
    "d",
)
def test_far_rows_and_queries(backend: str, b: int, n: int, d: int) -> None:
    """Squares that overflow in float32: exact distances decide, and nothing becomes NaN."""
    data = normal(n, d, dtype=F32)
    data[7], data[11] = 1e25, -1e25
    rows, x = Rows(data), torch.full((b, d), 1e25)
    got = harness.posterior(backend, query_of(x, 1e23), rows)
    assert torch.equal(got.mean, data[7:8].expand(b, d))
    torch.testing.assert_close(got.log_z, torch.zeros(b, dtype=F64))
    got = harness.posterior(backend, query_of(-x, 0.0), rows)
    assert torch.equal(got.mean, data[11:12].expand(b, d))
    x[:, 0] = 3e30
    _check(backend, query_of(x, 1e30), rows, "far")


@over(sized((1, 40), (12, 40), (64, 3), triton=((2, 140), (2, 300))), "b", "d")
def test_outputs_are_written_everywhere(backend: str, b: int, d: int) -> None:
    """Fresh memory is full of NaN in all tests that run on the CPU; here on a GPU too."""
    query, rows = Case(b, 70, d).problem()
    query = query._replace(bias=torch.zeros(70, dtype=F64))
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.isnan(torch.empty(5, device=DEVICE)).all()
        got = harness.posterior(backend, query, rows)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(v).all() for v in got)


@every_backend
def test_huge_values_and_a_norm_that_overflows(backend: str) -> None:
    """A float64 query whose squared norm overflows is lost; one below that is not."""
    rows = Rows(normal(9, 4, seed=1))
    x = torch.stack([torch.full((4,), 1e150, dtype=F64), torch.full((4,), 1e155, dtype=F64)])
    got = harness.posterior(backend, query_of(x, 1e149), rows)
    assert torch.isfinite(got.mean[0]).all() and got.mean[1].isnan().all()


@compiled_backends
def test_what_kernels_cannot_read_is_an_error(backend: str) -> None:
    query, rows = query_of(normal(2, 3, dtype=F32), 1.0), Rows(normal(4, 3, dtype=F32))

    def run(query: Query, rows: Rows) -> None:
        harness.posterior(backend, query, rows)

    with pytest.raises(TypeError, match="int32"):
        run(query, Rows(rows.data.to(torch.int32)))
    with pytest.raises(ValueError, match="contiguous"):
        run(query, Rows(normal(3, 4, dtype=F32).T))
    with pytest.raises(ValueError, match="expected x"):
        run(query, Rows(normal(4, 5, dtype=F32)))
    with pytest.raises(ValueError, match="sigma"):
        run(query._replace(sigma=torch.ones(3, dtype=F64)), rows)
    with pytest.raises(ValueError, match="bias"):
        run(query._replace(bias=torch.zeros(5, dtype=F64)), rows)
    with pytest.raises(ValueError, match="together"):
        run(query, rows._replace(center=torch.zeros(3)))
    with pytest.raises(ValueError, match=r"center must have shape \[3\]"):
        run(query, rows._replace(center=torch.zeros(2), sq_norms=torch.ones(4, dtype=F64)))
    with pytest.raises(ValueError, match="weighting must be gaussian or log, not 'cauchy'"):
        run(query._replace(weighting="cauchy"), rows)
