"""memokern.index.index: what is stored of the rows bounds every inner product, rounding included.

The truth is float64 by definition; its own rounding is some 1e-13 of what the bounds allow for, so
no tolerance is added anywhere.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memokern.backends import protocol
from memokern.data.training_set import TrainingSet
from memokern.index.projection import Projected, rounded_up
from memokern.util import env
from tests.data.rows import DTYPES

pytestmark = pytest.mark.usefixtures("one_thread")

# The compiled projection, and the one in PyTorch, which Triton's tensors go through too.
BACKENDS = [answer.name for answer in protocol.here() if answer.runs and answer.name != "triton"]


@pytest.fixture(params=BACKENDS, autouse=True, scope="module")
def backend(request):
    """Every test runs with the projection of each backend."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(env.BACKEND, request.param)
        yield request.param


KINDS = ["random", "clustered", "low rank", "duplicated", "constant", "far", "smooth"]


def values_of(kind: str, n: int, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """[n, *shape] float64, within about -1..1 but for "far"."""
    g = torch.Generator().manual_seed(seed)

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    dim = math.prod(shape)
    flat = noise(n, dim) / 3
    if kind == "clustered":
        flat = noise(3, dim)[torch.randint(3, (n,), generator=g)] / 3 + 0.01 * flat
    elif kind == "low rank":
        flat = noise(n, 2) @ noise(2, dim) / 6
    elif kind == "duplicated":
        flat = flat[torch.randint(max(1, n // 4), (n,), generator=g)]
    elif kind == "constant":
        flat = flat[:1].expand(n, -1)
    elif kind == "far":
        flat = flat + 1e4
    elif kind == "smooth":
        flat = (noise(n, dim) / (1 + torch.arange(dim)) ** 0.7).cumsum(1) / 8
    return flat.reshape(n, *shape).contiguous()


def set_of(values: torch.Tensor, dtype: torch.dtype = torch.float32) -> TrainingSet:
    if dtype == torch.uint8:
        low, high = float(values.min()), float(values.max())
        scale = (high - low) / 255 or 1.0
        return TrainingSet(((values - low) / scale).round().to(dtype), scale=scale, shift=low)
    return TrainingSet(values.to(dtype))


@functools.cache
def indexed(kind: str, dtype: torch.dtype, basis: str) -> TrainingSet:
    """30 rows with an index, built once for all backends, since none takes part in it."""
    return set_of(values_of(kind, 30, (3, 8, 9)), dtype).build_index(basis)


def truth(data: TrainingSet, x: torch.Tensor, alpha: torch.Tensor):
    """xc [B, D], yc [N, D] about the set's center, and |x - alpha y|^2 [B, N]."""
    y = data.dequantize(data.rows).double()
    center = data.center.double()
    distances = torch.stack(
        [(q - a * y).square().sum(1) for q, a in zip(x.double(), alpha, strict=True)]
    )
    return x.double() - alpha[:, None] * center, y - center, distances


def gaps(
    data: TrainingSet,
    projected: Projected,
    x: torch.Tensor,
    alpha: torch.Tensor,
    shrink: float = 1.0,
    single: bool = False,
) -> list[torch.Tensor]:
    """For each level [B, N]: by how much the bound exceeds what it bounds. single: the products
    accumulated in float32."""
    index = data.index
    xc, yc, distances = truth(data, x, alpha)
    wanted = xc @ yc.T
    k0 = index.dims[0]
    work = torch.float32 if single else torch.float64
    z = torch.cat([index.coarse[:, :k0], index.fine.float()], dim=1).to(work)
    norms, pad = index.coarse[:, k0:-1].to(work) * shrink, index.coarse[:, -1].to(work)
    found = []
    for level, k in enumerate(index.dims):
        first = index.first_band[level]
        product = projected.z[:, :k].to(work) @ z[:, :k].T
        rest = projected.norms[:, first:-1].to(work) @ norms[:, first:].T
        if level:
            rest = rest + projected.norms[:, -1:].to(work) * pad
        bound = rest.double() + projected.margin[:, None]
        found.append(bound - (wanted - product.double()).abs())
        # And what it is for: no distance is smaller than is claimed.
        a = alpha[:, None]
        claimed = a * product.double() + a.abs() * bound
        claimed = projected.sq[:, None] + a**2 * data.sq_norms - 2 * claimed
        if shrink == 1.0:
            assert (claimed <= distances).all()
    return found


def queries_of(data: TrainingSet, sigma: float, count: int = 6) -> torch.Tensor:
    """Rows with noise, one row as it is, one opposite to it about the center, and the center."""
    g = torch.Generator().manual_seed(1)
    y = data.dequantize(data.rows).double()
    some = y[torch.randint(len(y), (count,), generator=g)]
    noisy = some + sigma * torch.randn(some.shape, generator=g, dtype=torch.float64)
    center = data.center.double()[None]
    return torch.cat([noisy, y[:1], 2 * center - y[:1], center])


def assert_bounded(data: TrainingSet, x: torch.Tensor, alpha: torch.Tensor) -> None:
    projected = data.index.project(x, alpha)
    for single in (False, True):
        for level, gap in enumerate(gaps(data, projected, x, alpha, single=single)):
            assert (gap >= 0).all(), (level, single, float(gap.min()))
    xc = truth(data, x, alpha)[0]
    assert (projected.sq <= xc.square().sum(1)).all()
    assert (projected.norms[:, -1].double() >= torch.linalg.vector_norm(xc, dim=1)).all()


# --- the bound ----------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", ["dct", "pca"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.one_of(2)
def test_the_bound_holds(kind, dtype, basis):
    data = indexed(kind, dtype, basis)
    assert data.index.dims == (32, 64, 128, 216)
    for sigma, wide in ((0.0, torch.float32), (0.5, torch.float64), (20.0, torch.float32)):
        x = queries_of(data, sigma).to(wide)
        for alpha in (1.0, 0.3, 0.0):
            assert_bounded(data, x, torch.full((len(x),), alpha, dtype=torch.float64))


shapes = st.sampled_from([(17,), (40,), (8, 8), (3, 8, 8), (10, 9, 3), (1, 12, 8), (5, 4, 6)])


@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    shape=shapes,
    basis=st.sampled_from(["dct", "pca"]),
    storage=st.sampled_from(["float16", "float32"]),
    n=st.integers(1, 25),
    steps=st.lists(st.integers(1, 17), min_size=1, max_size=4, unique=True),
    scale=st.floats(-1e3, 1e3).filter(lambda v: abs(v) > 1e-6),
    shift=st.floats(-1e4, 1e4),
    sigma=st.floats(0, 1e4),
    alpha=st.floats(-2, 2),
    wide=st.booleans(),
    seed=st.integers(0, 99),
)
@example("random", torch.float64, (17,), "pca", "float16", 1, [1], 1.0, 257.0, 0.0, 0.0, False, 0)
@settings(max_examples=150, deadline=None, derandomize=True)
@pytest.mark.long_on("reference")
def test_the_bound_holds_whatever_is_drawn(
    kind, dtype, shape, basis, storage, n, steps, scale, shift, sigma, alpha, wide, seed
):
    if basis == "dct" and len(shape) == 1:
        basis = "pca"
    rows = set_of(values_of(kind, n, shape, seed), dtype).rows.reshape(n, *shape)
    data = TrainingSet(rows, scale=scale, shift=shift)
    data.build_index(basis, dims=sorted(steps), storage=storage)
    x = queries_of(data, sigma).to(torch.float64 if wide else torch.float32)
    assert_bounded(data, x, torch.full((len(x),), alpha, dtype=torch.float64))


@pytest.mark.parametrize("storage", ["float16", "float32"])
@pytest.mark.parametrize("basis", ["dct", "pca"])
def test_the_bound_is_tight_and_a_wrong_one_is_seen(basis, storage):
    """A query that is a row: in every band the two residuals are parallel, so norms a thousandth
    too small must fail, at every level that has bands."""
    data = set_of(values_of("random", 400, (3, 16, 16)))
    data.build_index(basis, dims=(16, 64, 128), storage=storage)
    x = (data.dequantize(data.rows).double())[:5]
    alpha = torch.ones(5, dtype=torch.float64)
    projected = data.index.project(x, alpha)
    for level, gap in enumerate(gaps(data, projected, x, alpha)):
        # All that the bound gives away here: the margin, twice, and the pad from level 1 on.
        allowed = 2 * projected.margin
        if level:
            allowed += 2 * projected.norms[:, -1] * data.index.coarse[:5, -1]
        assert (gap >= 0).all()
        assert (gap.diagonal() <= allowed).all()
    for gap in gaps(data, projected, x, alpha, shrink=1 - 1e-3):
        assert (gap.diagonal() < 0).all()


def test_a_query_seen_too_small_is_caught():
    """The same for the query's share: what is projected, not only what is stored, is tested."""
    data = set_of(values_of("random", 20, (3, 16, 16))).build_index("dct", dims=(16, 64))
    x, alpha = data[:5].flatten(1), torch.ones(5, dtype=torch.float64)
    good = data.index.project(x, alpha)
    for wrong in (
        good._replace(norms=good.norms * (1 - 1e-3)),
        good._replace(z=good.z * (1 - 1e-3)),
        good._replace(margin=-good.margin),
    ):
        assert (gaps(data, wrong, x, alpha, shrink=1 - 1e-9)[0] < 0).any()


def test_margins_are_small():
    """A sound margin could be vacuous: it is of the order of K roundings to float32, no more."""
    data = set_of(values_of("smooth", 50, (3, 32, 32)), torch.uint8).build_index()
    x, alpha = queries_of(data, 0.5).float(), torch.ones(9, dtype=torch.float64)
    projected = data.index.project(x, alpha)
    size = projected.norms[:, -1].double() * data.index.y_max
    # 2 (512 + 7 + 17) roundings, and for the query (32 + 1) sqrt(32) along each of two axes.
    assert (projected.margin[:-1] <= (1072 + 2 * 33 * 5.7 + 30) * 2.0**-24 * size[:-1]).all()
    xc = truth(data, x, alpha)[0]
    torch.testing.assert_close(projected.sq, xc.square().sum(1), rtol=1e-6, atol=1e-9)
    # The pad is measured: half a unit in the last place of float16, 2^-11 of the coordinates.
    tail = data.index.fine.float().norm(dim=1)
    assert (data.index.coarse[:, -1] <= 2.0**-11 * tail + 1e-5).all()


# --- queries ------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", ["dct", "pca"])
@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
def test_shorter_products_do_not_loosen_it(basis, precision, backend):
    """bfloat16 products, by autocast or by the settings, would break the float32 bound."""
    data = set_of(values_of("random", 30, (3, 8, 8)))
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = precision
    try:
        with torch.autocast("cpu", torch.bfloat16):
            data.build_index(basis, dims=(16, 64))
            x, alpha = queries_of(data, 0.3).float(), torch.ones(9, dtype=torch.float64)
            projected = data.index.project(x, alpha)
    finally:
        settings.fp32_precision = before
    if basis == "dct":
        # float64 throughout is what shorter products are answered with; the kernel has its own.
        precision = "ieee" if backend == "cpu" else precision
        used = {dtype for _, dtype in data.index._projector._margin_cache}
        assert used == {torch.float32 if precision == "ieee" else torch.float64}
    assert all((gap >= 0).all() for gap in gaps(data, projected, x, alpha))


@pytest.mark.parametrize("shape", [(3, 8, 9), (40, 20, 3), (33, 17), (2, 70, 48), (5, 4, 6)])
def test_the_kernel_projects_as_pytorch_does(shape, monkeypatch):
    """Odd and even sides, channels first and last, boxes of fewer frequencies than the image; with
    one thread or two."""
    data = set_of(values_of("smooth", 40, shape)).build_index("dct", dims=(9, 33, 60))
    x, alpha = queries_of(data, 0.3).float(), torch.linspace(-1, 1, 9, dtype=torch.float64)
    monkeypatch.setenv("MEMOKERN_BACKEND", "auto")
    assert data.index._projector.backends_own(x) is not None
    mine = data.index.project(x, alpha)
    strided = x.repeat_interleave(2, dim=1)[:, ::2]
    for part, again in zip(mine, data.index.project(strided, alpha), strict=True):
        assert torch.equal(part, again)
    torch.set_num_threads(2)
    for part, again in zip(mine, data.index.project(x, alpha), strict=True):
        assert torch.equal(part, again)
    torch.set_num_threads(1)
    monkeypatch.setenv("MEMOKERN_BACKEND", "reference")
    plain = data.index.project(x, alpha)
    # Each lies within its error, a part of the margin, of the exact coordinates.
    allowed = 2 * (mine.margin / data.index.y_max)[:, None]
    assert ((mine.z - plain.z).double().norm(dim=1, keepdim=True) <= allowed).all()
    bands = [(v.norms[:, :-2].double() * (1 - 2.0**-22)) for v in (mine, plain)]  # rounded up
    assert ((bands[0] - bands[1]).abs() <= allowed + 2.0**-21 * bands[1]).all()
    torch.testing.assert_close(mine.norms[:, -1], plain.norms[:, -1], rtol=1e-6, atol=0)
    torch.testing.assert_close(mine.sq, plain.sq, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(mine.margin, plain.margin, rtol=1e-6, atol=0)


def test_queries_need_no_gradient_and_come_in_any_number(monkeypatch):
    data = set_of(values_of("smooth", 30, (3, 8, 8))).build_index(dims=(16, 64))
    x, alpha = queries_of(data, 0.3, 20).float(), torch.rand(23, dtype=torch.float64)
    whole = data.index.project(x, alpha)
    parameter = x.clone().requires_grad_()
    tracked = data.index.project(parameter, alpha.clone().requires_grad_())
    assert not any(part.requires_grad for part in tracked)
    monkeypatch.setattr("memokern.index.projection.QUERY_ELEMENTS", 5 * 192)
    for found in (data.index.project(x, alpha), tracked):
        for part, expected in zip(found, whole, strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-5)
    none = data.index.project(x[:0], alpha[:0])
    assert [tuple(part.shape) for part in none] == [(0, 64), (0, data.index.bands + 1), (0,), (0,)]
    assert [part.dtype for part in none] == [torch.float32] * 2 + [torch.float64] * 2


@pytest.mark.parametrize("basis", ["dct", "pca"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
def test_queries_beyond_float32_have_no_bound(basis, bad):
    data = set_of(values_of("random", 30, (3, 8, 8))).build_index(basis, dims=(16, 64))
    x = torch.zeros(3, 192, dtype=torch.float64)
    x[1, 5] = bad
    margin = data.index.project(x, torch.ones(3, dtype=torch.float64)).margin
    assert margin[1] == math.inf
    assert torch.isfinite(margin[[0, 2]]).all()


def test_project_refuses():
    data = set_of(values_of("random", 30, (3, 8, 8))).build_index()
    alpha = torch.ones(2, dtype=torch.float64)
    for x in (torch.zeros(2, 191), torch.zeros(192), torch.zeros(3, 192)):
        with pytest.raises(ValueError, match=r"expected x \[B, 192\] and alpha \[B\], got"):
            data.index.project(x, alpha)


@given(st.floats(0, 1e30))
def test_rounded_up(value):
    exact = torch.tensor([value], dtype=torch.float64)
    up = rounded_up(exact).double()
    assert exact <= up <= exact * (1 + 2.0**-21) + 2.0**-119
