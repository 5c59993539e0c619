"""Triton's kernels by every plan: in chunks where one pass would do, in blocks and turns, through
descriptors. What they compute is tested with the operations; here, that plans change only the order
of sums, and that what is left out is left out for a reason."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

import memokern
from memokern.backends import protocol, triton
from memokern.backends.protocol import Call, get
from memokern.backends.triton import BACKEND
from memokern.backends.triton.core import machine
from memokern.backends.triton.core import rows as stored
from memokern.backends.triton.core.centering import centred
from memokern.backends.triton.nearest import kernels
from memokern.backends.triton.nearest import launch as nearest_launch
from memokern.backends.triton.posterior import finish, fused, planner, weigh
from memokern.backends.triton.scan import launch as scan_launch
from memokern.calls import BasicSums, Query, Rows, Sums, to_sums
from memokern.util import env
from tests import cases, compare, harness, oracle
from tests.cases import BF16, F16, F32, F64, U8, Case, normal, query_of, random_like
from tests.harness import DEVICE
from tests.plain_index import PlainIndex

ROW_TYPES = cases.row_types("triton")


def posterior(query: Query, rows: Rows) -> Sums:
    return harness.posterior("triton", query, rows)


def check(query: Query, rows: Rows) -> Sums:
    got = posterior(query, rows)
    compare.sums(got, oracle.sums(query, rows), query, rows, F32, "plan")
    return got


@pytest.fixture
def in_chunks(monkeypatch):
    """Every sweep in chunks, also of few features."""
    monkeypatch.setattr(planner, "one_pass", lambda *_: None)


@pytest.fixture
def in_blocks(monkeypatch):
    """Called with a number of queries: tiles of 16 of them, so that the rest is a second block;
    then also no room for more than the least chunk."""

    def set_for(b: int) -> None:
        monkeypatch.setattr(planner, "FEW_QUERIES", b)

    def no_room(l2: int) -> None:
        monkeypatch.setattr(planner, "WORKSPACE", 1)
        monkeypatch.setattr(machine, "of", lambda _: machine.Machine(4, l2))

    return set_for, no_room


# --- the sweep ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "dtype"), [(5, F32), *((300, t) for t in ROW_TYPES)])
def test_tails_of_features_in_chunks(d: int, dtype: torch.dtype, in_chunks: None) -> None:
    check(*Case(3, 33, d, dtype, known=d == 5).problem())


@pytest.mark.parametrize(("b", "n"), [(1, 1), (2, 257), (17, 20)])
def test_tails_of_rows_and_queries_in_chunks(b: int, n: int, in_chunks: None) -> None:
    check(*Case(b, n, 5, BF16, sigma=0.7, seed=n).problem())


@pytest.mark.parametrize("dtype", ROW_TYPES)
@pytest.mark.one_of(2)
def test_rows_through_descriptors(dtype: torch.dtype, in_chunks: None, monkeypatch) -> None:
    """The same bits as by pointers, at ragged edges of rows and features, in chunks; NaN beyond a
    view's own features stays outside."""
    monkeypatch.setattr(planner, "chunked", lambda *_: planner.Chunked(True, 3, 256, 1, 1))
    query, rows = Case(3, 300, 140, dtype).problem()
    wide = torch.full((300, 160), 77 if dtype == U8 else math.nan).to(dtype)
    wide[:, :140] = rows.data
    view, results = rows._replace(data=wide[:, :140]), []
    for knows in (False, True):
        monkeypatch.setattr(stored, "has_descriptors", lambda _, k=knows: k)
        results.append(posterior(query, view))
    compare.equal(*results)
    compare.sums(results[1], oracle.sums(query, rows), query, rows, F32, "descriptors")


def test_far_offsets_through_descriptors(monkeypatch) -> None:
    monkeypatch.setattr(stored, "has_descriptors", lambda _: True)
    query, rows = Case(1, 4, 300, U8, sigma=0.3).problem()
    apart = cases.far_apart(rows, DEVICE)
    assert torch.equal(posterior(query, apart).mean, posterior(query, rows).mean)


@pytest.mark.parametrize("d", [3, 140, pytest.param(300, marks=pytest.mark.long)])
@pytest.mark.one_of(2)
def test_plans_change_only_the_order_of_sums(d: int, in_blocks) -> None:
    """Other parts of rows, features and queries: the same results within rounding, and the same of
    a query wherever it lies."""
    set_for, no_room = in_blocks
    query, rows = Case(16, 150, d, BF16, sigma=3.0).problem()
    query = query.take(torch.tensor([*range(16), 0]))
    set_for(17)  # 16 queries, then the last
    whole = posterior(query, rows)
    no_room(1 << 18)
    other = posterior(query, rows)
    compare.close(other, whole, rtol=2e-5, atol=2e-5)
    for a in other:
        assert torch.equal(a[0], a[16])  # of the second launch, or tile


@pytest.mark.parametrize("chunks", [False, True])
def test_states_in_blocks(chunks: bool, in_blocks, monkeypatch) -> None:
    set_for, no_room = in_blocks
    query, rows = Case(17, 40, 20, BF16, sigma=2.0, bias="holes").problem()
    want = oracle.sums(query, rows)
    set_for(17)
    no_room(1 << 15)
    if chunks:
        monkeypatch.setattr(planner, "one_pass", lambda *_: None)
    state = harness.posterior_state("triton", query, rows)
    assert state.acc.dtype == F32
    compare.sums(to_sums(state, query), want, query, rows, F32, "state")


@pytest.mark.parametrize("precision", ["tf32x3", "ieee"])
@pytest.mark.parametrize("d", [20, 300])
@pytest.mark.one_of(3)
def test_precisions(precision: str, d: int, monkeypatch) -> None:
    monkeypatch.setenv(env.PRECISION, precision)
    # So much noise that no row is evaluated exactly, whatever the products are.
    query, rows = Case(2, 90, d, sigma=10.0).problem()
    got = check(query, rows)
    monkeypatch.setenv(env.BACKEND, "triton")
    for other in env.PRECISIONS:  # the argument counts, whatever the environment says
        x, data = query.x.to(DEVICE), rows.data.to(DEVICE)
        p = memokern.posterior(x, data, 10.0, precision=other)
        assert torch.equal(p.mean.cpu(), got.mean) == (other == precision)
        torch.testing.assert_close(p.mean.cpu(), got.mean, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="precision must be auto, tf32x3 or ieee, not 'tf32'"):
        posterior(query._replace(precision="tf32"), rows)
    monkeypatch.setenv(env.PRECISION, "tf32")
    with pytest.raises(RuntimeError, match="MEMOKERN_PRECISION must be one of tf32x3, ieee"):
        posterior(query, rows)


def test_rows_are_marked_only_where_rounding_matters(monkeypatch) -> None:
    """At large sigma no row is evaluated again; at small sigma few are. If none ever were, the
    weights of near rows would be wrong, which the tests of every noise level find."""
    marks = []
    launch = finish.launch

    def spy(q, b0, b, parts, into):
        # exact_kernel wrote the last parts. s is the sum of at most `rows` ones.
        states = parts.states.view(-1)[: parts.n_states * 6 * b].view(-1, 6, b)
        marks.append(states[-1, 2].clone())
        launch(q, b0, b, parts, into)

    monkeypatch.setattr(finish, "launch", spy)
    for sigma in (30.0, 1.0):
        posterior(*Case(2, 100, 10, sigma=sigma).problem())
    assert (marks[0] == 0).all() and (marks[1] > 0).all()


@pytest.fixture
def marks(monkeypatch):
    """The share of rows and queries that each sweep in one pass left to exact evaluation."""
    shares = []
    launch = kernels.Variant.launch

    def spy(self, grid, device, **args):
        launch(self, grid, device, **args)
        if self.kernel is fused.sweep_kernel:
            # A bit for each row and query, of as many queries and words as the launch has.
            marked = args["marks"][: args["B"] * args["words"]].cpu()
            bits = torch.arange(32, dtype=torch.int32)
            count = ((marked[:, None] >> bits) & 1).sum()
            shares.append(int(count) / (args["B"] * args["N"]))

    monkeypatch.setattr(kernels.Variant, "launch", spy)
    return shares


@pytest.mark.parametrize(("d", "most"), [(40, 0.01), (200, 0.3)])
def test_a_row_is_marked_by_its_share_of_all_weight(d: int, most: float, marks: list) -> None:
    """Where hundreds share the weight, the rounding of one logit is nothing. Beside the largest
    logit alone it looks like something: so judged, a fifth to all of these rows would be marked."""
    for sigma in (80.0, 10.0):
        query, rows = Case(3, 400, d, sigma=sigma).problem()
        compare.sums(posterior(query, rows), oracle.sums(query, rows), query, rows, F32, sigma)
    assert marks[0] == 0 and 0 < marks[1] <= most


@pytest.mark.parametrize("weighting", ["gaussian", "log"])
def test_in_chunks_too(weighting: str, monkeypatch) -> None:
    """Of x in the kernel of weights there are exact rows only: without it nothing may change."""
    launch = kernels.Variant.launch
    query, rows = Case(2, 200, 300, sigma=80.0, weighting=weighting).problem()
    want = posterior(query, rows)

    def blind(self, grid, device, **args):
        if self.kernel is weigh.weigh_kernel:
            args["x"] = torch.full_like(args["x"], math.nan)
        launch(self, grid, device, **args)

    monkeypatch.setattr(kernels.Variant, "launch", blind)
    compare.equal(posterior(query, rows), want)


@pytest.mark.parametrize("d", [40, 200])
def test_distances_at_high_sigma(d: int, marks: list) -> None:
    """sum w r^2 beside a bias in one pass, no row evaluated exactly: at sigma = 80 each unit of the
    bias is 12800 of it."""
    query, rows = Case(3, 300, d, sigma=80.0, bias="hole").problem()
    query = query._replace(x=oracle.values(rows)[:3].float() + 0.1)
    got, want = posterior(query, rows), oracle.reach(query, rows).square()
    compare.sums(got, oracle.sums(query, rows), query, rows, F32, d)
    assert marks == [0.0]
    squares = -2 * query.sigma.square() * (got.mean_logit - got.mean_bias)
    torch.testing.assert_close(squares, want, rtol=2e-6, atol=0)


# --- gradients ----------------------------------------------------------------------------------


@pytest.mark.long
def test_gradients_in_blocks_and_chunks(in_blocks) -> None:
    """Two blocks of queries, chunks and parts; the bias's sums run over all of them."""
    set_for, no_room = in_blocks
    query, rows = Case(18, 300, 20, BF16, sigma=3.0).problem()
    query = query._replace(bias=torch.linspace(-1, 1, 300, dtype=F64))
    set_for(18)
    got = posterior(query, rows)
    grads = random_like(cases.basic(got), 1)
    no_room(1 << 15)
    back = harness.backward("triton", query, rows, got, grads)
    want = oracle.gradients(query, rows, grads)
    compare.gradients(back, want, got, query, F32, "blocks")


@pytest.mark.long
def test_gradients_for_rows_in_blocks_and_chunks(in_blocks) -> None:
    """With a unit, and rows that have a stride."""
    set_for, no_room = in_blocks
    query, rows = Case(17, 270, 20, F16, sigma=3.0, alpha=0.8).problem()
    rows = Rows(torch.cat([rows.data, rows.data], 1)[:, 7:27], 0.7, 0.2)
    grads = random_like(BasicSums(query.x, *[query.sigma] * 4), 1)
    set_for(17)
    no_room(1 << 15)
    got = harness.backward_rows("triton", query, rows, grads)
    want = oracle.row_gradient(query, rows, grads)
    assert (got.double() - want).abs().max() <= 1e-3 * want.abs().max()


# --- the nearest rows ---------------------------------------------------------------------------


def test_few_groups_are_looked_at(monkeypatch) -> None:
    """The bound rules out nearly all groups; a limit that ruled out more would lose rows."""
    query, rows = Case(3, 2000, 64, sigma=0.2).problem()
    want = oracle.nearest(query.x, rows, 1)
    seen = []
    launch = kernels.Variant.launch

    def spy(self, grid, device, **args):
        launch(self, grid, device, **args)
        if "most" in args:
            seen.append((args["least"] <= args["most"][:, None]).sum(1))

    monkeypatch.setattr(kernels.Variant, "launch", spy)
    assert torch.equal(harness.nearest("triton", query.x, rows, 1)[1], want[1])
    assert seen[0].max() <= 2  # of 32
    monkeypatch.setattr(nearest_launch, "key_error", lambda size, *_: 0 * size - 1.0)
    assert not torch.equal(harness.nearest("triton", query.x, rows, 1)[1], want[1])


def test_keys_err_less_than_they_are_allowed_to() -> None:
    """The least keys against float64, and the proven bound above their errors by a good factor."""
    query, rows = harness.moved(Case(20, 500, 300, sigma=1.0, offset=3.0).problem(), DEVICE)
    c = centred(rows)
    xc = query.x.to(F64) - c.center
    key = 0.5 * c.sq_norms - xc @ (rows.data.to(F64) - c.center).T
    want = torch.stack([part.amin(1) for part in key.split(kernels.GROUP, 1)], 1)
    for precision in ("ieee", "tf32x3"):
        least = torch.empty(20, want.shape[1], device=DEVICE)
        kernels.groups_variant(F32, False, precision).launch(
            (want.shape[1],), DEVICE, xc=xc.to(F32), rows=rows.data, offset=c.offset,
            half_sq=c.half_sq, least=least, B=20, N=500, D=300, stride_n=300, scale=1.0,
        )  # fmt: skip
        size = xc.square().sum(1).sqrt()
        allowed = nearest_launch.key_error(size, c, 300, 1.0, precision)
        assert ((least.to(F64) - want).abs() <= 0.2 * allowed[:, None]).all()


def test_the_nearest_rows_in_turns(monkeypatch) -> None:
    """Seven queries at a time, of rows that are ragged."""
    monkeypatch.setattr(nearest_launch, "_WORKSPACE", 4 * 5 * 7)
    query, rows = Case(17, 290, 37).problem()
    distance, index = harness.nearest("triton", query.x, rows, 3)
    want, order = oracle.nearest(query.x, rows, 3)
    assert torch.equal(index, order)
    torch.testing.assert_close(distance, want, rtol=1e-12, atol=1e-24)


# --- scans --------------------------------------------------------------------------------------


def test_a_scan_in_turns(monkeypatch) -> None:
    """Some queries at a time, some of them given up: the same lists."""
    values = normal(100, 40, seed=1) * torch.linspace(3, 0.1, 40, dtype=F64)
    rows = Rows(values.float())
    index = PlainIndex(rows, dims=(8, 12, 16, 24), edges=(8, 10, 12, 16, 24, 32))
    rows = index.rows_with_norms(rows)
    query = query_of((values[:9] + 0.1 * normal(9, 40)).float(), 0.1)
    query.sigma[3], query.sigma[6] = 0.0, 50.0
    bounds = index.bounds(query, most_listed=50)
    want = harness.bound_scan("triton", query, rows, bounds)
    monkeypatch.setattr(scan_launch, "_PAIRS", 5 * 100)
    got = harness.bound_scan("triton", query, rows, bounds)
    compare.equal((*got.lists, *got[1:]), (*want.lists, *want[1:]))
    assert (got.level == 0).tolist() == [i in (3, 6) for i in range(9)]


def test_a_capture_is_refused(monkeypatch) -> None:
    """It waits for the device: in a CUDA graph CUDA's own error would say less."""
    call = Call("cuda", F32, F32, 1, 4, 3)
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    backends = (BACKEND, get("reference"))
    assert [b.refuses("bound_scan", call) for b in backends] == [None, None]
    monkeypatch.setattr(protocol, "_captures", lambda: True)
    for backend in backends:
        refused = backend.refuses("bound_scan", call)
        assert refused is not None and "cannot be captured in a CUDA graph: sweep" in refused
        assert backend.refuses("posterior", call) is None
    with pytest.raises(RuntimeError, match=r"no backend runs this bound_scan.*sweep densely there"):
        protocol.choose("bound_scan", call)


def test_sizes_and_types_that_are_refused() -> None:
    refuses, usual = get("triton").refuses, Call(DEVICE.type, F32, F32, 2, 4, 3)
    assert refuses("posterior", usual) is None
    assert "at most 134,217,728 queries" in str(refuses("posterior", usual._replace(b=2**27 + 1)))
    assert "at most 2,147,467,264 rows" in str(refuses("posterior", usual._replace(n=2**31 - 1)))
    query, rows = Case(2, 4, 3).problem()
    for x_dtype, dtype in ((F64, F32), (F32, F64)):  # not asked whether it refuses
        asked = query._replace(x=query.x.to(x_dtype)), rows._replace(data=rows.data.to(dtype))
        with pytest.raises(TypeError, match="take float32 queries and rows of float32, bfloat16"):
            BACKEND.posterior(*harness.moved(asked, DEVICE))
