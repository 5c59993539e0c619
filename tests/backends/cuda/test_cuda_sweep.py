"""The CUDA sweep for wide rows, on the emulator, against its definition."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from memokern.calls import Query, Rows, merge
from tests import cases, compare, cuda_emulator, oracle
from tests.backends.cuda import kernels
from tests.backends.cuda.kernels import Answer, Variant
from tests.cases import BF16, F16, F32, F64, U8, Case, query_of

pytestmark = pytest.mark.skipif(
    cuda_emulator.missing() is not None, reason=str(cuda_emulator.missing())
)

# Together these have several sizes of tiles, numbers of stages, queries and blocks, and both ways
# of copying.
VARIANTS = {
    U8: Variant(tile=32),
    BF16: Variant(tile=64, stages=3),
    F16: Variant(queries=32, cluster=4, tile=16, bulk=False),
    F32: Variant(tile=16, cluster=1, stages=4),
}
LOG = {U8: Variant(tile=32, bulk=False), F32: Variant(tile=16, cluster=2)}
LONG = [
    Variant(queries=64, cluster=8, tile=64),
    Variant(queries=64, cluster=2, tile=128, bulk=False),
    Variant(queries=16, cluster=16, tile=128, stages=3),
    Variant(queries=32, cluster=4, tile=32, features=96),
]
D = 272


def _given(case: Case) -> tuple[Query, Rows]:
    """The problem, with what the host adds to it."""
    query, rows = case.problem()
    rows = cases.with_norms(rows)
    return query, rows._replace(center=rows.center.double())


def _check(query: Query, rows: Rows, variant: Variant, what: object, **how: object) -> Answer:
    got = kernels.posterior(query, rows, variant, **how)
    want = oracle.sums(query, rows)
    compare.sums(got.sums, want, query, rows, F32, what)
    return got


@pytest.mark.parametrize("sigma", [1e-6, 1e-3, 0.1])
def test_queries_at_a_center_that_is_a_row_of_bytes(sigma: float) -> None:
    bytes_ = torch.randint(0, 256, (1, D), generator=torch.Generator().manual_seed(2))
    rows = Rows(bytes_.to(U8).expand(3, -1).contiguous(), *cases.UINT8_UNIT)
    x = 0.4 * oracle.values(rows) + sigma * cases.normal(3, D, seed=1)
    x[0] = 0.4 * oracle.values(rows)[0]
    rows = cases.with_norms(rows)
    rows = rows._replace(center=rows.center.double())
    _check(query_of(x.float(), sigma, 0.4, 1.7), rows, VARIANTS[U8], sigma)


@pytest.mark.parametrize("dtype", VARIANTS, ids=cases.name_of)
@pytest.mark.parametrize("sigma", [1e-3, 0.05, 0.5, 3.0, 30.0, 1e3])
@pytest.mark.one_of(2)
def test_as_the_definition(dtype: torch.dtype, sigma: float) -> None:
    """Ragged last tile; biases, temperatures and alphas; more and fewer rows than a tile."""
    for seed, n in enumerate((1, 30, 90)):
        case = Case(3, n, D, dtype, sigma=sigma, alpha=0.9, temperature=1.3, seed=seed,
                    bias="holes" if n == 90 else None)  # fmt: skip
        _check(*_given(case), VARIANTS[dtype], str(case), seed=seed)


@pytest.mark.parametrize("dtype", LOG, ids=cases.name_of)
def test_weighting_log(dtype: torch.dtype) -> None:
    for bias in (None, "normal"):
        case = Case(3, 70, D, dtype, alpha=0.9, bias=bias, weighting="log", temperature=20.0)
        query, rows = _given(case)
        _check(query, rows, LOG[dtype], str(case))
    # An exact hit takes all.
    query = query_of(oracle.values(rows)[5:6].float(), 1.0, weighting="log")
    got = kernels.posterior(query, rows, LOG[dtype]).sums
    assert got.log_z.item() == math.inf
    torch.testing.assert_close(got.mean.double(), oracle.values(rows)[5:6], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", VARIANTS, ids=cases.name_of)
def test_near_duplicates_and_offsets(dtype: torch.dtype) -> None:
    """Equal rows are ties to the bit; rows far from the origin, and far from each other."""
    for case in (
        Case(4, 70, D, dtype, sigma=0.01, repeat=0.0),
        Case(4, 70, D, dtype, sigma=0.05, repeat=1e-3),
        Case(4, 70, D, dtype, sigma=0.5, offset=100.0),
        Case(4, 70, D, dtype, sigma=200.0, offset=100.0),
    ):
        query, rows = _given(case)
        _check(query, rows, VARIANTS[dtype], str(case))


@pytest.mark.parametrize("dtype", VARIANTS, ids=cases.name_of)
def test_limit_of_small_sigma(dtype: torch.dtype) -> None:
    query, rows = _given(Case(3, 90, D, dtype))
    rows.data[60] = rows.data[7]
    rows = cases.with_norms(rows)
    rows = rows._replace(center=rows.center.double())
    y = oracle.values(rows)
    x = y[[7, 30, 80]].float()
    x[1:] += 1e-3
    for sigma in (0.0, 1e-200):
        query = query_of(x, sigma)
        got, want = kernels.posterior(query, rows, VARIANTS[dtype]).sums, oracle.sums(query, rows)
        compare.close(got[1:5], want[1:5], 1e-6, 1e-6)
        assert torch.equal(got.mean, y[[7, 30, 80]].float())
    torch.testing.assert_close(got.weight_sq[0].item(), 0.5)


def test_queries_without_an_answer() -> None:
    """A query that is not finite is lost alone; without rows that count there is no mean."""
    query, rows = _given(Case(3, 40, D, U8))
    clean = kernels.posterior(query, rows, VARIANTS[U8]).sums
    x = query.x.clone()
    x[1, 5] = math.nan
    got = kernels.posterior(query._replace(x=x), rows, VARIANTS[U8])
    for a, e in zip(got.sums, clean, strict=True):
        assert torch.isnan(a[1]).all()
        compare.equal([a[[0, 2]]], [e[[0, 2]]])
    assert got.state.key[1] == 0 and got.state.m[1] == 0 and torch.isnan(got.state.s[1])
    none = kernels.posterior(
        query._replace(bias=torch.full((40,), -math.inf, dtype=F64)), rows, VARIANTS[U8]
    )
    assert torch.isneginf(none.sums.log_z).all() and torch.isnan(none.sums.mean).all()
    assert torch.isposinf(none.state.key).all() and (none.state.acc == 0).all()


def test_states_merge() -> None:
    """The states of two halves are that of all rows."""
    query, rows = _given(Case(3, 90, D, F32, sigma=0.3, bias="normal"))
    halves = [
        kernels.posterior(
            query._replace(bias=query.bias[part].contiguous()),
            rows._replace(data=rows.data[part], sq_norms=rows.sq_norms[part].contiguous()),
            VARIANTS[F32],
        ).state
        for part in (slice(0, 33), slice(33, 90))
    ]
    want = oracle.state(query, rows, rows.center)
    for got in (kernels.posterior(query, rows, VARIANTS[F32]).state, merge(*halves)):
        compare.close(got[:6], want[:6], 1e-5, 1e-5)
        compare.close([got.acc.double(), got.residual.double()], want[6:8], 1e-5, 1e-4)


@pytest.mark.parametrize("dtype", [U8, F16], ids=cases.name_of)
def test_order_of_threads_does_not_matter(dtype: torch.dtype) -> None:
    """To the bit, whichever warp comes first and whenever a copy completes."""
    query, rows = _given(Case(5, 150, D, dtype, sigma=2.0))
    want = kernels.posterior(query, rows, VARIANTS[dtype])
    for seed in (1, 2, 3):
        got = kernels.posterior(query, rows, VARIANTS[dtype], seed=seed)
        compare.equal(got.sums, want.sums)
    # Nor does it how many other queries there are.
    some = kernels.posterior(query.take(slice(1, 3)), rows, VARIANTS[dtype])
    compare.equal(some.sums, [v[1:3] for v in want.sums])


def test_parts_of_many_clusters() -> None:
    """Clusters without a tile, and the norms from their kernel."""
    query, rows = _given(Case(4, 100, D, U8, sigma=1.0))
    norms = kernels.sq_norms(rows)
    torch.testing.assert_close(norms, rows.sq_norms, rtol=1e-12, atol=0)
    for clusters in (1, 3, 7):
        _check(query, rows._replace(sq_norms=norms), VARIANTS[U8], clusters, clusters=clusters)


def test_gates() -> None:
    """The regularised scores of the last step, by their definitions."""
    query, rows = _given(Case(4, 60, D, U8, sigma=0.8))
    want = oracle.sums(query, rows)
    plain = want.residual / query.sigma[:, None] ** 2
    tau = want.log_z.median().item()
    share = torch.exp(want.log_z - tau).clamp(max=1.0)[:, None]
    for gates, score in (
        ((0.0, -math.inf), plain),
        ((0.3, -math.inf), want.residual / (query.sigma[:, None] ** 2 + 0.3)),
        ((0.0, tau), plain * share),
    ):
        got = kernels.posterior(query, rows, VARIANTS[U8], gates=gates).score
        torch.testing.assert_close(got.double(), score, rtol=1e-5, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("variant", LONG, ids=str)
@pytest.mark.parametrize("dtype", VARIANTS, ids=cases.name_of)
def test_other_variants(variant: Variant, dtype: torch.dtype) -> None:
    for b, sigma in ((1, 0.1), (variant.queries, 1.0)):
        case = Case(b, 150, D, dtype, sigma=sigma, bias="normal")
        query, rows = _given(case)
        _check(query, rows, variant, str(case), seed=b)
        log = replace(case, weighting="log", temperature=20.0)
        _check(*_given(log), variant, str(log), seed=b)
