"""The nearest rows by an index: those of all distances, whatever the rows and the bounds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import memokern
from memokern import TrainingSet, ops
from memokern.strategies import pruned_nearest
from memokern.strategies.costs import Costs
from tests import oracle
from tests.cases import F64, normal
from tests.plain_index import with_index
from tests.strategies.rows import rows_of

pytestmark = pytest.mark.usefixtures("backend")

KINDS = ["random", "clustered", "low-rank", "duplicated", "integer"]


def truth(x, data, k):
    """All squared distances, and the k nearest rows' distances and numbers."""
    rows = data.as_rows()
    sq, order = oracle.nearest(x, rows, k)
    return oracle.squares(x, oracle.values(rows)), sq.sqrt(), order


def pruned(x, data, k, costs=None):
    sq, index = pruned_nearest.nearest(x, data.as_rows(), data.index, k, costs)
    return sq.sqrt(), index


@st.composite
def problems(draw):
    seed = draw(st.integers(0, 2**20))
    n, d = draw(st.integers(1, 70)), draw(st.integers(5, 24))
    offset = draw(st.sampled_from([0.0, 0.0, 100.0]))
    rows = rows_of(draw(st.sampled_from(KINDS)), n, d, seed) + offset
    wide = draw(st.booleans())
    data = TrainingSet(rows if wide else rows.float())
    if draw(st.booleans()):
        with_index(data, storage=draw(st.sampled_from([torch.float16, torch.float32])))
    elif d > 16:
        data.build_index()
    else:
        with_index(data)
    sigma = 10 ** draw(st.floats(-4, 3))
    b = draw(st.sampled_from([1, 3, 11]))
    x = data.rows.double()[torch.arange(b) % n] + sigma * normal(b, d, seed=seed + 4)
    x[0] = data.rows[-1].double()  # a row itself
    k = draw(st.sampled_from([1, 2, n]) | st.integers(1, n))
    return data, x.to(draw(st.sampled_from([F64, torch.float32]))), min(k, n)


@given(problem=problems())
@settings(max_examples=150, deadline=None, derandomize=True)
@pytest.mark.long_on("reference")
def test_the_nearest_rows_are_those_of_all_distances(problem):
    data, x, k = problem
    distance, index = pruned(x, data, k)
    r2, want, order = truth(x, data, k)
    torch.testing.assert_close(distance, want, rtol=1e-12, atol=0)
    # Equal ones in the order of the rows; where two differ by rounding only, either is the nearer.
    torch.testing.assert_close(r2.gather(1, index).sqrt(), want, rtol=1e-12, atol=0)
    swapped = index != order
    assert not swapped[:, :1][distance[:, :1] == 0].any()
    for i in range(len(x)):
        assert len(index[i].unique()) == k
    # What all backends agree on to the bit is the sweep over all rows.
    dense = memokern.nearest(x, data, k, method="dense")
    assert torch.equal(dense.index, index) and torch.equal(dense.distance, distance)


@given(problem=problems(), size=st.integers(1, 40))
@settings(max_examples=100, deadline=None, derandomize=True)
@pytest.mark.long_on("reference")
def test_chunk_after_chunk_finds_them_too(problem, size):
    data, x, k = problem
    rows, p, best = data.as_rows(), pruned_nearest.project(x, data.index), None
    for first in range(0, rows.n, size):
        here = slice(first, first + size)
        part = rows._replace(data=rows.data[here], sq_norms=rows.sq_norms[here])
        known = best[0][:, -1] if best is not None and best[0].shape[1] == k else None
        sq, at = pruned_nearest.nearest_in_chunk(
            x, p, (first, part), data.index, min(k, part.n), None, known
        )
        best = pruned_nearest.merged(best, (sq, at + first), k)
    dense = memokern.nearest(x, data, k, method="dense")
    assert torch.equal(best[1], dense.index) and torch.equal(best[0].sqrt(), dense.distance)


def images(n=400, seed=0):
    smooth = normal(n, 3, 4, 4, seed=seed).repeat_interleave(4, 2).repeat_interleave(4, 3)
    values = 40 * smooth + 8 * normal(n, 3, 16, 16, seed=seed + 1) + 128
    return TrainingSet(values.clamp(0, 255).to(torch.uint8))


def swept_over_all(monkeypatch, data):
    """How many queries are swept over all rows, in each such call from here on."""
    nearest, swept = ops.nearest, []

    def noted(x, rows, k):
        swept.extend([len(x)] if rows.n == data.n else [])
        return nearest(x, rows, k)

    monkeypatch.setattr(ops, "nearest", noted)
    return swept


@pytest.mark.parametrize("k", [1, 2, 10])
@pytest.mark.parametrize("sigma", [0.0, 0.1, 1.0])
def test_few_rows_of_many_are_evaluated(monkeypatch, k, sigma):
    data = images().build_index()
    x = data[:20].double() + sigma * normal(20, 3, 16, 16, seed=3)
    want = memokern.nearest(x, data, k, method="dense")
    evaluated = []
    among = ops.nearest

    def counted(x, rows, k):
        evaluated.append(len(x) * rows.n)
        return among(x, rows, k)

    monkeypatch.setattr(ops, "nearest", counted)
    got = memokern.nearest(x, data, k, method="pruned")
    assert torch.equal(got.index, want.index) and torch.equal(got.distance, want.distance)
    assert sum(evaluated) < 20 * data.n


def test_lists_have_so_many_rows_at_a_time(monkeypatch):
    data = images().build_index()
    x = data[:50].double() + 0.3 * normal(50, 3, 16, 16, seed=3)
    x[7], x[30, 0] = torch.nan, torch.inf
    want = memokern.nearest(x, data, 2, method="dense")
    scan, counts, swept = pruned_nearest.scan_index, [], swept_over_all(monkeypatch, data)

    def counted(query, *rest):
        counts.append(len(query.x))
        return scan(query, *rest)

    monkeypatch.setattr(pruned_nearest, "LISTED", 20 * data.n)
    monkeypatch.setattr(pruned_nearest, "scan_index", counted)
    got = memokern.nearest(x, data, 2, method="pruned")
    assert torch.equal(got.index, want.index)
    assert torch.equal(got.distance.nan_to_num(-1.0), want.distance.nan_to_num(-1.0))
    assert max(counts) <= 20 and len(counts) >= 3
    assert swept == [2]  # all that are left in one sweep


def test_queries_that_are_not_finite_have_no_distance_and_leave_the_others_alone():
    data = images(100).build_index()
    x = data[:12].float() + 0.1
    x[3, 0, 0, 0], x[7, 1, 2, 3] = math.nan, math.inf
    got = memokern.nearest(x, data, 3, method="pruned")
    want = memokern.nearest(x, data, 3, method="dense")
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert got.distance[3].isnan().all() and torch.isfinite(got.distance[[0, 11]]).all()


def test_gradients_are_those_of_all_rows():
    data = images(100).build_index()
    x = (data[:11].double() + 0.3 * normal(11, 3, 16, 16)).requires_grad_()

    def gradients(method):
        distance = memokern.nearest(x, data, 3, method=method).distance
        (first,) = torch.autograd.grad((distance**3).sum(), x, create_graph=True)
        return first.detach(), *torch.autograd.grad(first.square().sum(), x)

    for got, want in zip(gradients("pruned"), gradients("dense"), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 * want.abs().max().item())


def test_a_bound_that_is_too_small_is_noticed():
    """The nearest row is so by the last coordinates, which the index then denies."""
    rows = normal(60, 24)
    rows[0, -4:] += 30.0
    data = TrainingSet(rows)
    x = rows[:1].clone()
    x[:, :20] = rows[1, :20]  # in the first coordinates it is another row
    index = with_index(data, dims=(4, 8), basis="axes").index
    want = memokern.nearest(x, data, method="dense").index
    assert want == 0 and torch.equal(pruned(x, data, 1)[1], want)
    index.coarse[0, index.dims[0] :] = 0.0
    assert not torch.equal(pruned(x, data, 1)[1], want)


@pytest.mark.long_on("reference")
def test_auto_sweeps_for_queries_that_keep_too_many_rows(monkeypatch):
    data = images(2000).build_index()
    sigma = torch.where(torch.arange(20) % 5 == 0, 50.0, 0.05).to(F64)
    x = (data[:20].double() + sigma[:, None, None, None] * normal(20, 3, 16, 16)).flatten(1)
    swept = swept_over_all(monkeypatch, data)
    costs = Costs(row=0.0, query=1.0, listed=1.0, call=0.0)
    want = memokern.nearest(x.reshape(20, 3, 16, 16), data, 1, method="dense")
    swept.clear()
    got = pruned(x, data, 1, costs)
    assert swept == [4]
    assert torch.equal(got[1], want.index) and torch.equal(got[0], want.distance)
    # Sweeps that cost less than some calls, of many queries or of few; many rows asked for; most
    # queries hopeless.
    dear = costs._replace(call=1e9)
    ten = costs.dense(10, data.n, data.dim)
    some = costs._replace(
        call=ten / pruned_nearest.WORTH_CALLS
    )  # a sweep of 10 queries is worth it
    hopeless = x[::5].repeat(5, 1)
    pruned(x, data, 1, some)
    assert swept == [4, 4]
    for q, k, price in ((x, 1, dear), (x[:5], 1, some), (x, 500, costs), (hopeless, 1, costs)):
        swept.clear()
        pruned(q, data, k, price)
        assert swept == [len(q)]


def test_no_queries_and_one_row():
    data = images(100).build_index()
    found = memokern.nearest(torch.zeros(0, 3, 16, 16), data, 2, method="pruned")
    assert found.distance.shape == found.index.shape == (0, 2)
    one = TrainingSet(normal(1, 20)).build_index()
    assert memokern.nearest(one[:], one, method="pruned").distance.tolist() == [[0.0]]


def test_queries_that_no_scan_takes_are_swept():
    data = images(100).build_index()
    x = torch.full((3, 3, 16, 16), 1e30)
    got, want = (memokern.nearest(x, data, 2, method=m) for m in ("pruned", "dense"))
    assert torch.equal(got.index, want.index) and torch.equal(got.distance, want.distance)


def test_a_method_is_checked():
    data = images(20)
    with pytest.raises(ValueError, match=r"call build_index\(\)"):
        memokern.nearest(data[:2], data, method="pruned")
    with pytest.raises(ValueError, match="method one of auto, dense, pruned, got 'magic'"):
        memokern.nearest(data[:2], data, method="magic")


def test_under_a_compiler_and_vmap_all_rows_are_swept():
    data = images(60).build_index()
    x = data[:4].double()
    want = memokern.nearest(x, data, 2, method="dense")
    compiled = torch.compile(
        lambda q: memokern.nearest(q, data, 2, method="pruned"),
        fullgraph=True,
        backend="aot_eager",
    )
    mapped = torch.func.vmap(lambda q: memokern.nearest(q, data, 2, method="pruned"))
    for call in (compiled, mapped):
        assert torch.equal(call(x).index, want.index)
