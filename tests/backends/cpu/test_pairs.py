"""Rows of uint8 in integers: the first product of a sweep, its error as the kernels state it, and
what nearest and posterior make of it, against float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from memokern.calls import Query, Rows
from tests import cases, compare, harness, oracle
from tests.cases import F64, U8, UINT8_UNIT, normal, query_of

if "cpu" not in harness.INSTALLED:
    pytest.skip("the compiled module is missing", allow_module_level=True)

from memokern.backends.cpu import native
from tests import compiled, isas


def with_vnni() -> set[str]:
    """The instruction sets that this processor is known to extend by VNNI."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return set()
    return {isa for isa, flag in (("avx2", "avx_vnni"), ("avx512", "avx512_vnni")) if flag in flags}


MANY = 520  # rows: fewer have no product in integers
VNNI = with_vnni()
WITH = {"avx2", "avx2w16"} | VNNI  # instruction sets that have one
# Those that run here; without the module of parts for tests one name, whose tests are skipped.
ISAS = [isa for isa in compiled.isas() if isa in WITH] or ["none"]
with_products = pytest.mark.skipif(ISAS == ["none"], reason="needs AVX2 and memokern._testing")
RUN_BY = {"cpu": native.module().isa()} | {f"cpu:{isa}": isa for isa in isas.others()}
BACKENDS = [name for name, isa in RUN_BY.items() if name in harness.COMPILED and isa in WITH]
KINDS = ("noise", "equal features", "one feature", "huge feature", "copies", "tiny", "zero")


def bytes_of(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=U8, generator=g)


def problem(kind: str, b: int, n: int, d: int, scale: float, shift: float) -> tuple[Tensor, Rows]:
    """Queries and rows about their mean; `kind` says what is hard about them."""
    data = bytes_of(n, d)
    if kind == "equal features":  # roundings of rows and queries that all go one way
        data = bytes_of(n, 1).expand(n, d).contiguous()
    if kind == "one feature":
        data = torch.full((n, d), 100, dtype=U8)
        data[:, d // 2] = bytes_of(n)
    rows = cases.with_norms(Rows(data, scale, shift))
    x = oracle.values(rows)[torch.arange(b) % n]
    if kind == "equal features":
        x = x[:, :1].expand(b, d) + 0.37 * scale
    elif kind == "zero":
        assert rows.center is not None
        x = rows.center.to(F64).expand(b, d)
    elif kind != "copies":
        x = x + (1e-6 if kind == "tiny" else 40) * scale * normal(b, d, seed=1)
    if kind == "huge feature":
        x = x.clone()
        x[:, d - 1] += 1e5 * scale
    return x.float(), rows


def parts(query: Query, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """What the product is of, in float64: centred queries in the rows' units, rounded to float32 as
    the sweep has them, and not; and rows without their scale, about the center."""
    assert rows.center is not None
    center = rows.center.to(F64)
    xc = query.x.to(F64) - query.alpha[:, None] * center
    rounded = (xc.float().to(F64) * rows.scale).float().to(F64)
    offset = ((rows.shift - center) / rows.scale).float().to(F64)
    return rounded, xc * rows.scale, rows.data.to(F64) + offset


@with_products
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scale, shift", [UINT8_UNIT, (1.0, 0.0), (-0.3, 5.0)])
@pytest.mark.parametrize("b, d", [(7, 257), (8, 300), (20, 511), (37, 784), (16, 2305)])
def test_the_error_is_what_the_kernel_says(
    b: int, d: int, scale: float, shift: float, isa: str
) -> None:
    """At sigma = 0 it is a bound for all data, else twice a rounding and more than it ever is."""
    for kind in KINDS:
        x, rows = problem(kind, b, MANY, d, scale, shift)
        for sigma, alpha in ((0.0, 1.0), (3.0, 1.0), (0.5, -0.7)):
            query = query_of(x, sigma, alpha)
            found = compiled.pairs(isa, query, rows)
            assert found is not None, (kind, d)
            dots, refined, errors = found
            seen, given, u = parts(query, rows)
            i0, i1, r1 = (errors[:, :3] / errors[:, 3:].abs()).T
            norm = abs(scale) * u.norm(dim=1)[:, None]
            assert ((dots - u @ seen.T).abs() <= i0 + i1 * norm).all(), (kind, sigma)
            assert ((refined - u @ given.T).abs() <= 1e-30 + r1 * norm).all(), (kind, sigma)


@with_products
@pytest.mark.parametrize("isa", ISAS)
def test_the_likely_error_is_no_guess(isa: str) -> None:
    """2 unit |u|, which independent roundings reach a half of and no more in 10^5 products."""
    x, rows = problem("noise", 64, 1500, 784, *UINT8_UNIT)
    query = query_of(x, 3.0)
    found = compiled.pairs(isa, query, rows)
    assert found is not None
    dots, _, errors = found
    seen, _, u = parts(query, rows)
    likely = errors[:, 1] / errors[:, 3].abs() * rows.scale * u.norm(dim=1)[:, None]
    share = (dots - u @ seen.T).abs() / likely
    assert 0.5 < share.max() < 1 and 0.15 < share.square().mean().sqrt() < 0.25


@with_products
@pytest.mark.parametrize("isa", ISAS)
def test_rows_that_have_no_such_product(isa: str) -> None:
    """A centre far from all values, few features, other types, few rows."""
    x, rows = problem("noise", 8, MANY, 300, *UINT8_UNIT)
    query = query_of(x, 1.0)
    assert compiled.pairs(isa, query, rows) is not None
    far = rows._replace(center=torch.full((300,), 5.0))
    assert compiled.pairs(isa, query, far) is None
    assert compiled.pairs(isa, query, rows._replace(data=rows.data.float())) is None
    few = Rows(rows.data[:, :120].contiguous(), *UINT8_UNIT)
    assert compiled.pairs(isa, query_of(x[:, :120].contiguous(), 1.0), few) is None
    assert compiled.pairs(isa, query, cases.with_norms(rows._replace(data=rows.data[:400]))) is None


def test_the_processor_decides() -> None:
    """AVX2 has the product, AVX-512 only with VNNI, and nothing else has it; `integers` says so,
    and `vnni` which of them use VNNI."""
    module = native.module()
    x, rows = problem("noise", 8, MANY, 300, *UINT8_UNIT)
    for name in isas.usable():
        with isas.selected(name):
            assert module.integers() == (name in WITH), name
            assert module.vnni() == (name in VNNI), name
    for name in compiled.isas():
        assert (compiled.pairs(name, query_of(x, 1.0), rows) is not None) == (name in WITH), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("b, d", [(7, 257), (24, 300), (70, 784)])
def test_nearest_is_exact(backend: str, b: int, d: int) -> None:
    """Rows a unit of one byte apart, copies, and queries that one feature leaves few digits."""
    for kind in KINDS:
        x, rows = problem(kind, b, MANY, d, *UINT8_UNIT)
        if kind == "noise":
            rows.data[200:300] = rows.data[:100]  # ties
            rows.data[300:400] = rows.data[:100]
            rows.data[300:400, 3] ^= 1  # and next to a tie
        for given in (cases.with_norms(rows), Rows(rows.data, *UINT8_UNIT)):
            distance, index = harness.nearest(backend, x, given, 3)
            want, order = oracle.nearest(x, given, 3)
            assert torch.equal(index, order), kind
            torch.testing.assert_close(distance, want, rtol=1e-12, atol=1e-24)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("b, n, d", [(9, MANY, 300), (24, 900, 257), (40, 700, 513)])
def test_posterior_keeps_its_contract(backend: str, b: int, n: int, d: int) -> None:
    """Clusters of rows a few bytes apart, which share the weight at small sigma, and copies."""
    g = torch.Generator().manual_seed(2)
    home = torch.randint(0, 12, (n,), generator=g)
    data = bytes_of(12, d)[home].long() + torch.randint(-3, 4, (n, d), generator=g)
    data[n // 2 :: 9] = data[n // 2].clone()
    rows = Rows(data.clamp(0, 255).to(U8), *UINT8_UNIT)
    known = cases.with_norms(rows)
    bias = normal(n, seed=3)
    for i, sigma in enumerate((0.0, 1e-3, 0.02, 0.05, 0.1, 0.3, 1.0, 3.0, 30.0)):
        alpha, temperature = ((1.0, 1.0), (0.4, 1.7), (-1.3, 0.6))[i % 3]
        x = alpha * oracle.values(rows)[torch.arange(b) % n] + sigma * normal(b, d, seed=i)
        x[0] = alpha * oracle.values(rows)[-1]  # an exact hit but for the rounding of x
        x[1, 2] += 30  # its scale leaves the others few digits
        for extra in (None, bias, 1e4 * bias):
            query = query_of(x.float(), sigma, alpha, temperature, extra)
            for given in (known, rows):
                got, want = harness.posterior(backend, query, given), oracle.sums(query, given)
                if sigma > 0:
                    compare.sums(got, want, query, given, torch.float32, (backend, sigma))
                else:
                    compare.residuals(got, want, query, given, torch.float32, (backend, sigma))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_rows_have_in_common(backend: str) -> None:
    """All rows differ in one direction, along which a query's rounding moves all logits alike: the
    error of the mean is not averaged out where many rows share the weight."""
    n, d = 3000, 300
    ways = normal(d, seed=5).sign()
    level = torch.rand(n, generator=torch.Generator().manual_seed(6), dtype=F64) * 2 - 1
    rows = cases.with_norms(Rows((127 + 120 * level[:, None] * ways).round().to(U8), *UINT8_UNIT))
    for sigma in (3.0, 5.0, 10.0):
        x = oracle.values(rows)[:24] + sigma * normal(24, d, seed=7)
        query = query_of(x.float(), sigma)
        got, want = harness.posterior(backend, query, rows), oracle.sums(query, rows)
        compare.sums(got, want, query, rows, torch.float32, sigma)


@pytest.mark.parametrize("sigma", [0.05, 0.3])
def test_queries_of_all_kinds_in_one_block(sigma: float) -> None:
    """One that is not finite, one at sigma = 0 and a noisy one leave the others right."""
    x, rows = problem("noise", 24, 700, 300, *UINT8_UNIT)
    x = oracle.values(rows)[:24].float() + sigma * normal(24, 300, seed=4).float()
    sigmas = torch.full((24,), sigma, dtype=F64)
    sigmas[5], sigmas[6] = 0.0, 50.0
    x[3, 7], x[4, 8] = math.nan, math.inf
    got = harness.posterior("cpu", query_of(x, sigmas), rows)
    rest = torch.tensor([b for b in range(24) if b not in (3, 4, 5)])
    query = query_of(x[rest], sigmas[rest])
    assert got.mean[3:5].isnan().all() and got.mean[5].isfinite().all()
    mine = type(got)(*(v[rest] for v in got))
    compare.sums(mine, oracle.sums(query, rows), query, rows, torch.float32, sigma)
