"""bound_scan and posterior_on_support: what they promise, derivatives, transforms, registration."""

import itertools
import math

import pytest
import torch
from index_cases import PlainIndex
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.library import opcheck

from memokern import TrainingSet
from memokern.backends import protocol as backends
from memokern.ops import listed as ops_support
from memokern.util import env

OPS = torch.ops.memokern
AVAILABLE = [
    row.name
    for row in backends.explain()
    if row.available
    and backends.get(row.name).refuses("cpu") is None
    and hasattr(backends.get(row.name), "bound_scan")
]


@pytest.fixture(params=AVAILABLE, autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setenv(env.BACKEND, request.param)
    return request.param


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- posterior_on_support -----------------------------------------------------------------------

COUNTS = [3, 1, 5]


def problem(dtype=torch.float64, bias=True, grad=True, b=3, n=9, d=2):
    """Three queries, each with its own list of rows."""
    x, rows = normal(b, d).to(dtype), normal(n, d, seed=1).to(dtype)
    g = torch.Generator().manual_seed(2)
    columns = [0.5 + torch.rand(b, generator=g).double() for _ in range(3)]
    inputs = [x, *columns] + ([normal(n, seed=3)] if bias else [])
    start = torch.tensor([0, *torch.tensor(COUNTS).cumsum(0).tolist()])
    index = torch.cat([torch.randperm(n, generator=g)[:c].sort().values for c in COUNTS])
    return rows, [v.requires_grad_(grad) for v in inputs], start, index


def run(rows, inputs, start, index):
    x, sigma, alpha, temperature, *rest = inputs
    bias = rest[0] if rest else None
    return OPS.posterior_on_support(
        x, rows, sigma, alpha, temperature, bias, start, index, 1.0, 0.0
    )  # fmt: skip


@pytest.mark.parametrize("rows_dtype", [torch.float64, torch.float32, torch.float16, torch.uint8])
@pytest.mark.parametrize("bias", [False, True])
def test_the_sums_are_those_of_a_sweep_over_the_listed_rows(rows_dtype, bias):
    rows, inputs, start, index = problem(bias=bias, grad=False)
    rows = (rows * 9 + 30).to(rows_dtype)
    x, sigma, alpha, temperature, *rest = inputs
    got = OPS.posterior_on_support(
        x, rows, sigma, alpha, temperature, rest[0] if rest else None, start, index, 0.1, -3.0
    )
    for b, (first, last) in enumerate(itertools.pairwise(start)):
        some = index[first:last]
        at = slice(b, b + 1)
        want = OPS.posterior(
            x[at], rows[some], sigma[at], alpha[at], temperature[at],
            rest[0][some] if rest else None, None, None, 0.1, -3.0, "gaussian",
        )  # fmt: skip
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g[at], w, rtol=1e-11, atol=1e-11)


def test_exact_hits_and_ties_are_exact_at_a_tiny_sigma():
    rows = torch.tensor([[1e3, 1.0], [1e3, 2.0], [1e3, 1.0]])
    x = torch.tensor([[1e3, 1.0], [1e3, 2.0]])
    one = torch.ones(2, dtype=torch.float64)
    start, index = torch.tensor([0, 3, 6]), torch.tensor([0, 1, 2, 0, 1, 2])
    mean, log_z, mean_logit, _, weight_sq = OPS.posterior_on_support(
        x, rows, 1e-5 * one, one, one, None, start, index, 1.0, 0.0
    )
    assert torch.equal(mean, x)
    assert weight_sq.tolist() == [0.5, 1.0]
    assert log_z.tolist() == [math.log(2), 0.0] and mean_logit.tolist() == [0.0, 0.0]


def test_a_list_without_rows_and_a_batch_without_queries():
    rows, inputs, start, index = problem(grad=False)
    start = torch.tensor([0, 3, 3, 8])
    mean, log_z, *_ = run(rows, inputs, start, index[:8])
    assert mean[1].isnan().all() and log_z[1] == -math.inf
    assert torch.isfinite(mean[[0, 2]]).all() and torch.isfinite(log_z[[0, 2]]).all()
    none = run(rows, [v[:0] for v in inputs[:4]], start[:1], index[:0])
    assert none[0].shape == (0, 2) and all(v.shape == (0,) for v in none[1:])


def test_a_query_with_nan_leaves_the_others_alone():
    rows, inputs, start, index = problem(grad=False)
    want = run(rows, inputs, start, index)
    inputs[0] = inputs[0].clone()
    inputs[0][1, 1] = math.nan
    got = run(rows, inputs, start, index)
    for g, w in zip(got, want, strict=True):
        assert g[1].isnan().all()
        assert torch.equal(g[[0, 2]], w[[0, 2]])


@pytest.mark.parametrize("bias", [False, True])
def test_first_and_second_derivatives(bias):
    rows, inputs, start, index = problem(bias=bias)
    assert gradcheck(lambda *args: run(rows, args, start, index), inputs)
    assert gradgradcheck(lambda *args: run(rows, args, start, index), inputs)


def test_what_has_no_derivative_says_so():
    rows, inputs, start, index = problem()
    leaf = rows.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient for the rows"):
        run(leaf, inputs, start, index)[1].sum().backward()
    grad = run(rows, inputs, start, index)[1].sum()
    for _ in range(2):
        (grad,) = torch.autograd.grad(grad.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no further derivative"):
        torch.autograd.grad(grad.sum(), inputs[0])
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode tangent"):
        dual = forward_ad.make_dual(inputs[0].detach(), torch.ones_like(inputs[0]))
        run(rows, [dual, *inputs[1:]], start, index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck_of_the_sums(dtype, bias):
    rows, inputs, start, index = problem(dtype, bias)
    args = (inputs[0], rows, *inputs[1:4], inputs[4] if bias else None, start, index)
    opcheck(OPS.posterior_on_support.default, (*args, 1.0, 0.0))
    out = [v.detach() for v in OPS.posterior_on_support(*args, 1.0, 0.0)]
    grads = [torch.ones_like(v).requires_grad_() for v in out]
    opcheck(OPS.posterior_on_support_backward.default, (*args, *out, *grads, 1.0, 0.0))
    inner = OPS.posterior_on_support_backward(*args, *out, *grads, 1.0, 0.0)
    inner = [torch.ones_like(v) for v in inner]
    # Its own derivative is refused, on purpose, so only what does not need one is checked.
    only = ("test_schema", "test_faketensor")
    double = (*args, grads, inner, 1.0, 0.0)
    opcheck(OPS.posterior_on_support_double_backward.default, double, test_utils=only)


def test_vmap_of_the_sums():
    rows, (x, *rest), start, index = problem(grad=False)
    many = torch.stack([x, x + 1])
    got = torch.func.vmap(lambda q: run(rows, [q, *rest], start, index))(many)
    each = [run(rows, [q, *rest], start, index) for q in many]
    for g, column in zip(got, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(g, torch.stack(column))


# --- bound_scan ---------------------------------------------------------------------------------


def indexed(n=60, d=16, dtype=torch.float32, storage=torch.float16):
    rows = (normal(n, d, seed=5) * torch.logspace(0, -1, d)).to(dtype)
    data = TrainingSet(rows)
    return data, PlainIndex(data, storage=storage)


def scan(data, index, x, sigma, alpha=1.0, temperature=1.0, bias=None, eps=1e-6, cap=None):
    s, a, t = (
        torch.as_tensor(v, dtype=torch.float64).expand(len(x)).contiguous()
        for v in (sigma, alpha, temperature)
    )
    p = index.project(x, a)
    return OPS.bound_scan(
        x, data.rows, s, a, t, bias, data.center, data.sq_norms, data.scale, data.shift,
        index.coarse, index.fine, *p, list(index.dims), list(index.first_band), eps,
        data.n if cap is None else cap,
    )  # fmt: skip


def logits(data, x, sigma, alpha=1.0, temperature=1.0, bias=None):
    y = data.rows.double() * data.scale + data.shift
    r2 = (x.double()[:, None] - alpha * y).square().sum(2)
    b = 0.0 if bias is None else bias
    return (-r2 / (2 * sigma**2) + b) / temperature


@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("alpha", [1.0, 0.5, -0.7])
@pytest.mark.parametrize("biased", [False, True])
def test_what_is_not_listed_lies_below_the_threshold(sigma, alpha, biased):
    data, index = indexed()
    bias = 3 * normal(data.n, seed=8) if biased else None
    if bias is not None:
        bias[::7] = -math.inf
    x = (alpha * data.rows[:6] + sigma * normal(6, 16, seed=6)).float()
    start, listed, threshold, level = scan(data, index, x, sigma, alpha, 0.8, bias)
    t = logits(data, x, sigma, alpha, 0.8, bias)
    assert start.dtype == listed.dtype == level.dtype == torch.int64
    assert start[0] == 0 and start[-1] == len(listed) and (level > 0).all()
    for b in range(len(x)):
        mine = listed[start[b] : start[b + 1]]
        assert len(mine) > 0 and (mine.diff() > 0).all()
        rest = torch.ones(data.n, dtype=torch.bool)
        rest[mine] = False
        assert (t[b][rest] <= threshold[b]).all()
        if bias is not None:
            assert torch.isfinite(bias[mine]).all()
    # A slack for the rounding of this test's own logarithms.
    weight = data.n * torch.exp(threshold - torch.logsumexp(t, 1))
    assert (weight <= 1e-6 * (1 + 1e-9)).all()


def test_small_sigma_keeps_few_rows_and_large_sigma_climbs_the_whole_ladder():
    data, index = indexed(n=400)
    x = data.rows[:20] + 0.02 * normal(20, 16, seed=6).float()
    start, _, _, level = scan(data, index, x, 0.02)
    assert start[-1] < 40
    assert level.min() >= 1 and level.max() <= len(index.dims)
    _, _, _, wide = scan(data, index, x, 0.5)
    assert wide.max() == len(index.dims)


def test_queries_that_cannot_be_bounded_are_given_up():
    data, index = indexed()
    x = data.rows[:6].clone()
    x[1, 3], x[2, 0] = math.nan, math.inf
    sigma = torch.tensor([0.1, 0.1, 0.1, 0.0, 50.0, 0.1])
    start, listed, _, level = scan(data, index, x, sigma, cap=12)
    assert (level == 0).tolist() == [False, True, True, True, True, False]
    count = start.diff()
    assert (count[1:5] == 0).all() and count[0] > 0 and count[5] > 0
    assert len(listed) == start[-1]
    alone = scan(data, index, x[5:], 0.1, cap=12)
    assert torch.equal(listed[start[5] :], alone[1])


def test_no_queries():
    data, index = indexed()
    start, listed, threshold, level = scan(data, index, data.rows[:0], 1.0)
    assert start.tolist() == [0] and len(listed) == len(threshold) == len(level) == 0


@pytest.mark.parametrize("storage", [torch.float16, torch.float32])
def test_opcheck_of_the_scan(storage):
    data, index = indexed(storage=storage)
    x = data.rows[:3]
    one = torch.ones(3, dtype=torch.float64)
    p = index.project(x, one)
    args = (
        x.clone().requires_grad_(), data.rows, 0.2 * one, one, one, normal(data.n), data.center,
        data.sq_norms, data.scale, data.shift, index.coarse, index.fine, *p, list(index.dims),
        list(index.first_band), 1e-6, data.n,
    )  # fmt: skip
    opcheck(OPS.bound_scan.default, args)
    assert not any(v.requires_grad for v in OPS.bound_scan(*args))


def test_the_scan_compiles_with_its_unknown_size():
    data, index = indexed()
    x = data.rows[:3]

    def rows_kept(q):
        return scan(data, index, q, 0.2)[1] * 2

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(rows_kept, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), rows_kept(x))


def test_the_scan_under_vmap_is_an_error_that_helps():
    data, index = indexed()
    many = torch.stack([data.rows[:3], data.rows[3:6]])
    with pytest.raises(RuntimeError, match="Fold the mapped axis"):
        torch.func.vmap(lambda q: scan(data, index, q, 0.2)[0])(many)


def test_names_are_the_dispatchers():
    assert ops_support.bound_scan is OPS.bound_scan
    assert ops_support.posterior_on_support is OPS.posterior_on_support


def test_a_backend_without_an_operation_is_not_chosen(monkeypatch):
    monkeypatch.setenv(env.BACKEND, "auto")
    device = torch.device("cpu")
    assert backends.choose(device, "posterior_on_mars").__name__.endswith("reference")
    monkeypatch.setenv(env.BACKEND, "reference")
    with pytest.raises(RuntimeError, match="it has no posterior_on_mars"):
        backends.choose(device, "posterior_on_mars")
