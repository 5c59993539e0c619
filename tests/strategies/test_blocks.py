"""Blocks of rows that are excluded together: what is proven holds, and a box that is too small is
noticed. They are the compiled scan's; other backends leave them alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import memokern
from memokern import TrainingSet
from memokern.index import blocks
from tests import harness, oracle
from tests.cases import F32, F64, U8, normal, query_of
from tests.harness import over
from tests.plain_index import PlainIndex, check_lists
from tests.strategies.rows import rows_of
from tests.strategies.test_pruned import holds

CPU = [name for name in (*harness.INSTALLED, *harness.ISAS) if name.startswith("cpu")]


def clusters(n: int, d: int, seed: int, spread: float = 0.3) -> torch.Tensor:
    """[n, d] float64 rows near 40 points."""
    points = 4 * normal(40, d, seed=seed)
    return points[torch.arange(n) * 7 % 40] + spread * normal(n, d, seed=seed + 1)


def scanned(backend, query, rows, index, **how):
    lists, threshold, level = harness.bound_scan(backend, query, rows, index.bounds(query, **how))
    return *lists, threshold, level


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("b", [1, 2, 7, 64, 65])
@pytest.mark.parametrize("alpha", [1.0, -0.7])
def test_lists_keep_their_promise(backend: str, b: int, alpha: float) -> None:
    data = clusters(1300, 40, 1).to(F32)
    for dims in ((24, 40), (5, 12, 20), (16,)):
        index = PlainIndex(memokern.calls.Rows(data), dims=dims, edges=(8, 30), in_blocks=True)
        rows = index.rows_with_norms(memokern.calls.Rows(data))
        for sigma in (1e-3, 0.05, 0.3, 1.0, 10.0):
            pick = torch.arange(b) * 13 % 1300
            x = (alpha * data[pick].double() + sigma * normal(b, 40, seed=b)).to(F32)
            query = query_of(x, sigma, alpha)
            found = scanned(backend, query, rows, index)
            check_lists(found, oracle.logits(query, rows))
            assert sigma > 0.05 or len(found[1]) < 40 * b
            # The same as without blocks, up to the rows that a better start drops earlier.
            plain = PlainIndex(memokern.calls.Rows(data), dims=dims, edges=(8, 30))
            assert sigma > 0.05 or len(found[1]) <= len(scanned(backend, query, rows, plain)[1]) + b


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize("b", [1, 3, 40])
def test_a_box_that_is_elsewhere_is_noticed(backend: str, b: int) -> None:
    """So it is by the boxes that rows are left out."""
    data = clusters(1300, 40, 1).to(F32)
    rows = memokern.calls.Rows(data)
    index = PlainIndex(rows, dims=(24, 40), edges=(30,), in_blocks=True)
    rows = index.rows_with_norms(rows)
    pick = torch.arange(b) * 13 % 1300
    query = query_of((data[pick].double() + 0.3 * normal(b, 40, seed=b)).to(F32), 0.3)
    t = oracle.logits(query, rows)
    check_lists(scanned(backend, query, rows, index), t)
    for name in ("boxes", "hulls"):
        boxes = getattr(index.blocks, name)
        broken = PlainIndex(rows, dims=(24, 40), edges=(30,), in_blocks=True)
        broken.blocks = index.blocks._replace(**{name: boxes + 3.0})
        with pytest.raises(AssertionError):
            check_lists(scanned(backend, query, rows, broken), t)


@pytest.mark.parametrize("backend", CPU)
def test_a_box_that_is_too_small_is_noticed(backend: str) -> None:
    """Boxes shrunk to their middles: of the rows within reach, some are in boxes beyond it."""
    data = clusters(1300, 40, 1, spread=1.0).to(F32)
    rows = memokern.calls.Rows(data)
    index = PlainIndex(rows, dims=(24, 40), edges=(30,), in_blocks=True)
    rows = index.rows_with_norms(rows)
    query = query_of((data[:40].double() + 1.0 * normal(40, 40, seed=2)).to(F32), 1.0)
    t = oracle.logits(query, rows)
    check_lists(scanned(backend, query, rows, index), t)
    boxes = index.blocks.boxes
    middle = boxes.mean(2, keepdim=True).expand_as(boxes).contiguous()
    index.blocks = index.blocks._replace(boxes=middle)
    with pytest.raises(AssertionError):
        check_lists(scanned(backend, query, rows, index), t)


@pytest.mark.parametrize("backend", CPU)
def test_an_excess_that_is_too_small_is_noticed(backend: str) -> None:
    """Norms of bands that are far too large: harmless, as long as the excess has them."""
    data = clusters(1300, 40, 1).to(F32)
    rows = memokern.calls.Rows(data)
    index = PlainIndex(rows, dims=(24, 40), edges=(30,), in_blocks=True)
    rows = index.rows_with_norms(rows)
    index.coarse[:, 24:-1] *= 3.0
    half = (-0.5 * index.sq_norms).float()
    excess = blocks.excess_of(index.coarse, index.sq_norms)
    index.blocks = blocks.layout(index.coarse, 24, half, excess).blocks(index.coarse)
    pick = torch.arange(40) * 13 % 1300
    query = query_of((data[pick].double() + 0.3 * normal(40, 40, seed=2)).to(F32), 0.3)
    t = oracle.logits(query, rows)
    check_lists(scanned(backend, query, rows, index), t)
    index.blocks = index.blocks._replace(excess=0.0)
    with pytest.raises(AssertionError):
        check_lists(scanned(backend, query, rows, index), t)


@over(lambda name: (True,) if name.startswith("cpu") else (), "_")
def test_a_bias_is_no_matter_of_blocks(backend: str, _: bool) -> None:
    """Boxes know nothing of it: all rows are read as they lie."""
    data = clusters(1300, 40, 1).to(F32)
    rows = memokern.calls.Rows(data)
    index = PlainIndex(rows, dims=(24, 40), edges=(30,), in_blocks=True)
    rows = index.rows_with_norms(rows)
    bias = 100 * normal(1300, seed=4)
    query = query_of(data[:5] + 0.1, 0.3, 1.0, 1.0, bias)
    check_lists(scanned(backend, query, rows, index), oracle.logits(query, rows))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_blocks(threads: int) -> None:
    data = clusters(30_000, 40, 1).to(F32)
    rows = memokern.calls.Rows(data)
    index = PlainIndex(rows, dims=(24, 40), edges=(30,), in_blocks=True)
    rows = index.rows_with_norms(rows)
    sigma = torch.tensor([0.05, 0.1, 1.0, 0.3], dtype=F64).repeat(16)
    x = data[:64] + (sigma[:, None] * normal(64, 40, seed=3)).to(F32)
    query = query_of(x, sigma)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = scanned("cpu", query, rows, index)
    finally:
        torch.set_num_threads(before)
    check_lists(found, oracle.logits(query, rows))


@st.composite
def problems(draw):
    seed = draw(st.integers(0, 2**20))
    n, shape = draw(st.integers(1, 700)), draw(st.sampled_from([(24,), (40,), (8, 8), (3, 8, 8)]))
    d = int(torch.Size(shape).numel())
    kind = draw(st.sampled_from(["clusters", "random", "low-rank", "duplicated", "adversarial"]))
    values = clusters(n, d, seed) if kind == "clusters" else rows_of(kind, n, d, seed)
    values = values * draw(st.sampled_from([1.0, 1e-3, 1e4])) + draw(st.sampled_from([0.0, 50.0]))
    dtype = draw(st.sampled_from([F64, F32, U8]))
    if dtype == U8:
        values = (values * 20 + 128).clamp(0, 255)
    data = TrainingSet(values.to(dtype).reshape(n, *shape))
    y = data.dequantize(data.rows).double()
    alpha = draw(st.sampled_from([0.0, 1e-13, 1.0, 0.5, 1e-3, -0.4]))
    size = float(y.std()) if y.numel() > 1 else 1.0
    sigma = 10 ** draw(st.floats(-3, 0.5)) * (size if size > 0 else 1.0)
    b = draw(st.sampled_from([1, 2, 5, 20]))
    x = alpha * y[torch.arange(b) * 5 % n] + sigma * normal(b, d, seed=seed + 4)
    x = x.to(draw(st.sampled_from([F64, F32])))
    dims = draw(st.sampled_from([(4, 12, 20), (16,), (20,), None]))
    return (
        data,
        dims,
        x,
        sigma,
        alpha,
        draw(st.sampled_from([1.0, 0.1, 3.0])),
        10 ** draw(st.floats(-9, -1)),
    )


@given(problem=problems())
@settings(max_examples=120, deadline=None, derandomize=True)
def test_the_certificate_is_never_violated(problem) -> None:
    data, dims, x, sigma, alpha, temperature, eps = problem
    fewest, blocks.FEWEST = blocks.FEWEST, 1
    try:
        data.build_index(dims=dims)
        assert data.index.blocks is not None
    finally:
        blocks.FEWEST = fewest
    with harness.named("cpu"):
        holds(data, data.index, x, sigma, alpha, temperature, None, eps)
