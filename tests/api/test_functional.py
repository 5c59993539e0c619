"""The public functions: the formulas, the limits, strange inputs, on every backend here."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import memokern
from memokern import TrainingSet
from memokern.calls import Rows
from tests import cases, harness, oracle


@pytest.fixture(params=harness.ON_CPU, autouse=True)
def backend(request):
    with harness.preferred(request.param):
        yield request.param


def normal(*shape, seed=0, dtype=torch.float64):
    return cases.normal(*shape, seed=seed, dtype=dtype)


def truth(x, rows, sigma, alpha=1.0, temperature=1.0, bias=None, weighting="gaussian"):
    """The oracle's sums."""
    query = cases.query_of(x, sigma, alpha, temperature, bias, weighting)
    return oracle.sums(query, Rows(rows))


TAILS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63]


@pytest.mark.parametrize("weighting", ["gaussian", "log"])
@pytest.mark.parametrize("size", TAILS)
def test_posterior_is_the_definition(size, weighting):
    b, n, d = (TAILS[(TAILS.index(size) + i * 5) % len(TAILS)] for i in range(3))
    x, rows, bias = normal(b, d), normal(n, d, seed=1), normal(n, seed=2)
    s, a, t = (0.3 + normal(b, seed=i).abs() for i in (3, 4, 5))
    p = memokern.posterior(x, rows, s, a, t, bias=bias, weighting=weighting)
    want = truth(x, rows, s, a, t, bias, weighting)
    got = (p.mean, p.log_z, p.mean_logit, p.mean_bias, p.weight_sq)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
@pytest.mark.parametrize("sigma", [1e-3, 0.002, 0.05, 0.3, 1.0, 10.0, 80.0, 1e3])
def test_contract_at_every_sigma_with_near_duplicates(dtype, sigma):
    """Design: mean to 1e-5 relative, weights to 1e-4, in float32, near-duplicate rows included."""
    d, n = 96, 130
    rows = normal(n, d, seed=1, dtype=torch.float32)
    rows[1:6] = rows[0] + 1e-3 * normal(5, d, seed=2, dtype=torch.float32)
    rows[6] = rows[0]
    stored = (rows * 30 + 128).clamp(0, 255).to(dtype) if dtype == torch.uint8 else rows.to(dtype)
    data = TrainingSet(stored)
    values = stored.reshape(n, d).double() * data.scale + data.shift
    x = (values[[0, 0, 3, 50]] + sigma * normal(4, d, seed=3)).float()
    p = memokern.posterior(x, data, sigma)
    mean, log_z, mean_logit, _, weight_sq = truth(x, values, sigma)
    assert (p.mean - mean).norm() <= 1e-5 * mean.norm()
    torch.testing.assert_close(p.weight_sq, weight_sq, rtol=2e-4, atol=0)
    torch.testing.assert_close(p.log_z, log_z, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(p.mean_logit, mean_logit, rtol=1e-6, atol=1e-4)


def test_a_huge_common_offset_changes_nothing():
    rows, x = normal(20, 6, seed=1), normal(5, 6)
    far = memokern.posterior(x + 2.0**20, rows + 2.0**20, 0.5)
    near = memokern.posterior(x, rows, 0.5)
    # The inputs themselves were rounded by 2^20 * 2^-53.
    torch.testing.assert_close(far.mean - 2.0**20, near.mean, rtol=0, atol=1e-8)
    torch.testing.assert_close(far.log_z, near.log_z, rtol=0, atol=1e-7)


def test_identities_of_the_sweep():
    rows, x, s, a = normal(12, 3, seed=1), normal(5, 3), 0.7, 0.8
    p = memokern.posterior(x, rows, s, a)
    w = memokern.weights(x, rows, s, a)
    torch.testing.assert_close(w.sum(1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(w @ rows, p.mean)
    torch.testing.assert_close(-(w * w.log()).sum(1), p.entropy)
    torch.testing.assert_close(1 / w.square().sum(1), p.ess)
    spread = (w[:, :, None] * (rows - p.mean[:, None]).square()).sum((1, 2))
    torch.testing.assert_close(spread, p.covariance_trace)
    centres = torch.distributions.Normal(a * rows, s)
    density = torch.logsumexp(centres.log_prob(x[:, None]).sum(-1), 1) - math.log(12)
    torch.testing.assert_close(p.log_density, density)
    torch.testing.assert_close(p.eps, -s * p.score)
    torch.testing.assert_close(p.v, a * p.eps - s * p.mean)
    flow = memokern.posterior(x, rows, 0.4, 0.6)
    torch.testing.assert_close(flow.velocity(), (flow.mean - x) / 0.4)


def test_score_and_divergence_are_derivatives_of_the_density():
    rows = normal(12, 3, seed=1)
    x = normal(3).requires_grad_()
    p = memokern.posterior(x, rows, 0.7, 0.8, bias=normal(12, seed=4))
    (score,) = torch.autograd.grad(p.log_density, x, create_graph=True)
    torch.testing.assert_close(score, p.score)
    div = sum(torch.autograd.grad(score[i], x, retain_graph=True)[0][i] for i in range(3))
    torch.testing.assert_close(div, p.divergence)


def test_temperature_divergence():
    rows = normal(12, 3, seed=1)
    x = normal(3).requires_grad_()
    p = memokern.posterior(x, rows, 0.7, 0.8, 2.5)
    grads = [torch.autograd.grad(p.score[i], x, retain_graph=True)[0][i] for i in range(3)]
    torch.testing.assert_close(sum(grads), p.divergence)


def test_jvp_is_symmetric_and_differentiable():
    rows, x, v, u = normal(12, 3, seed=1), normal(5, 3), normal(5, 3, seed=2), normal(5, 3, seed=3)
    a = (memokern.jvp(x, rows, v, 0.7, 0.8, 1.5) * u).sum()
    b = (memokern.jvp(x, rows, u, 0.7, 0.8, 1.5) * v).sum()
    torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(
        lambda q, t: memokern.jvp(q, rows, t, 0.7), (x.requires_grad_(), v.requires_grad_())
    )
    with torch.no_grad():
        assert not memokern.jvp(x, rows, v, 0.7).requires_grad


def test_the_limit_sigma_to_zero():
    rows = torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 0.0], [9.0, 9.0]])
    x = torch.tensor([[0.4, 0.1], [1.0, 5.0], [2.0, 0.0]])
    p = memokern.posterior(x, rows, 0.0)
    want = torch.tensor([[0.0, 0.0], [4 / 3, 0.0], [2.0, 0.0]])
    torch.testing.assert_close(p.mean, want)
    torch.testing.assert_close(p.ess, torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64))
    assert p.log_z[:2].isneginf().all() and math.isclose(p.log_z[2].item(), math.log(2))
    torch.testing.assert_close(p.entropy, p.ess.log())
    assert p.covariance_trace.tolist() == [0, 0, 0]
    tiny = memokern.posterior(x[[0, 2]], rows, 1e-30)
    torch.testing.assert_close(tiny.mean, want[[0, 2]])
    out = torch.tensor([-torch.inf, 0.0, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(
        memokern.denoise(x[:1], rows, 0.0, bias=out), torch.tensor([[2.0, 0.0]])
    )
    shared = torch.tensor([0.0, math.log(3.0), 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(
        memokern.denoise(x[1:2], rows, 0.0, bias=shared), torch.tensor([[8 / 5, 0.0]])
    )


def test_exact_hits_take_all_the_weight_of_the_log_weighting():
    rows = torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    p = memokern.posterior(torch.tensor([[2.0, 0.0]]), rows, 1.0, weighting="log")
    torch.testing.assert_close(p.mean, torch.tensor([[2.0, 0.0]]))
    assert p.weight_sq.item() == 0.5 and p.log_z.isposinf().all()


def test_a_query_that_is_not_finite_spoils_only_itself():
    rows, x = normal(9, 4, seed=1).float(), normal(5, 4).float()
    clean = memokern.posterior(x, rows, 0.6)
    bad = x.clone()
    bad[1, 2], bad[3, 0] = torch.nan, torch.inf
    p = memokern.posterior(bad, rows, 0.6)
    for name in ("mean", "log_z", "mean_logit", "weight_sq"):
        got, want = getattr(p, name), getattr(clean, name)
        assert got[[1, 3]].isnan().all(), name
        torch.testing.assert_close(got[[0, 2, 4]], want[[0, 2, 4]])
    near = memokern.nearest(bad[:3], rows, k=2)
    assert near.distance[1].isnan().all() and near.index[1].tolist() == [0, 1]
    assert torch.equal(near.index[[0, 2]], memokern.nearest(x[[0, 2]], rows, k=2).index)


def test_far_queries_and_huge_values_stay_finite():
    rows, x = normal(9, 4, seed=1).float(), 1e15 * normal(3, 4).float()
    p = memokern.posterior(x, rows, 1e-3)
    assert torch.isfinite(p.mean).all() and torch.isfinite(p.log_z).all()
    index = memokern.nearest(x, rows).index[:, 0]
    assert index.shape == (3,)


def test_alpha_zero_knows_nothing():
    rows, x = normal(9, 4, seed=1), normal(3, 4)
    p = memokern.posterior(x, rows, 0.5, 0.0)
    torch.testing.assert_close(p.mean, rows.mean(0).expand(3, 4))


@pytest.mark.parametrize("batch", [(), (0,), (2, 3), (2, 0)])
def test_any_batch_and_image_shape(batch):
    rows = normal(7, 2, 3, 4, seed=1)
    x = normal(*batch, 2, 3, 4)
    p = memokern.posterior(x, rows, 0.5 if batch != (2, 3) else 0.5 + torch.rand(2, 1))
    assert p.mean.shape == x.shape and p.log_z.shape == batch and p.divergence.shape == batch
    assert p.score.shape == x.shape
    near = memokern.nearest(x, TrainingSet(rows), k=2)
    assert near.distance.shape == (*batch, 2) == near.index.shape
    assert memokern.weights(x, rows, 0.5).shape == (*batch, 7)


def test_strides_do_not_matter():
    rows, x = normal(7, 9, seed=1).float(), normal(4, 9).float()
    want = memokern.denoise(x, rows, 0.5)
    odd_x = torch.stack([x, x])[:, :, :].transpose(0, 2).contiguous().transpose(0, 2)[0]
    wide = torch.cat([rows, rows], 1)[:, :9]
    assert not odd_x.is_contiguous() and not wide.is_contiguous()
    torch.testing.assert_close(memokern.denoise(odd_x, wide, 0.5), want, rtol=1e-6, atol=1e-6)
    columns = rows.T.contiguous().T
    torch.testing.assert_close(memokern.denoise(x, columns, 0.5), want, rtol=1e-6, atol=1e-6)
    assert torch.equal(memokern.nearest(odd_x, columns).index, memokern.nearest(x, rows).index)


def test_a_batch_can_be_split():
    rows, x = normal(50, 20, seed=1).float(), normal(40, 20).float()
    whole = memokern.posterior(x, rows, 0.5)
    parts = [memokern.posterior(q, rows, 0.5) for q in x.split(7)]
    torch.testing.assert_close(whole.mean, torch.cat([p.mean for p in parts]), rtol=1e-5, atol=1e-6)
    again = memokern.posterior(x, rows, 0.5)
    assert torch.equal(whole.mean, again.mean) and torch.equal(whole.log_z, again.log_z)


def test_training_set_and_tensor_agree_and_weights_count():
    rows, x, log_weights = normal(9, 4, seed=1), normal(3, 4), normal(9, seed=2)
    log_weights[3] = -torch.inf
    p = memokern.posterior(x, TrainingSet(rows, log_weights=log_weights), 0.6, 0.9)
    q = memokern.posterior(x, rows, 0.6, 0.9, bias=log_weights)
    torch.testing.assert_close(p.mean, q.mean)
    keep = [i for i in range(9) if i != 3]
    left = memokern.posterior(x, rows[keep], 0.6, 0.9, bias=log_weights[keep])
    torch.testing.assert_close(p.mean, left.mean)
    torch.testing.assert_close(p.log_density, left.log_density)


def test_nearest_is_exact_where_expanded_squares_are_not():
    rows = 1000 + torch.arange(40, dtype=torch.float32)[:, None] * 1e-3 + torch.zeros(40, 64)
    x = rows[[7, 23]] + 2e-4
    near = memokern.nearest(x, rows, k=3)
    r = (x[:, None].double() - rows.double()).norm(dim=-1)
    want, index = r.sort(dim=1, stable=True)
    assert torch.equal(near.index, index[:, :3])
    torch.testing.assert_close(near.distance, want[:, :3], rtol=1e-12, atol=0)
    ties = memokern.nearest(torch.zeros(1, 2), torch.ones(5, 2), k=5)
    assert ties.index.tolist() == [[0, 1, 2, 3, 4]]


X, ROWS = torch.zeros(3, 4), torch.ones(5, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: memokern.score([0.0], ROWS, 1.0), TypeError, "expected x as a tensor"),
        (lambda: memokern.score(X.int(), ROWS, 1.0), TypeError, r"use x.float\(\)"),
        (lambda: memokern.score(X, ROWS.int(), 1.0), TypeError, "expected rows of type"),
        (lambda: memokern.score(X, "data.npy", 1.0), TypeError, "wrap arrays and files"),
        (lambda: memokern.score(X, ROWS[0], 1.0), ValueError, r"expected data \[N"),
        (lambda: memokern.score(X, ROWS[:0], 1.0), ValueError, "N >= 1"),
        (lambda: memokern.score(X[:, :3], ROWS, 1.0), ValueError, r"expected x \[\*batch, 4\]"),
        (lambda: memokern.score(X, ROWS, -1.0), ValueError, "sigma finite and >= 0, got -1"),
        (lambda: memokern.score(X, ROWS, math.nan), ValueError, "got nan"),
        (lambda: memokern.score(X, ROWS, torch.ones(2)), ValueError, "broadcasts to the batch"),
        (lambda: memokern.score(X, ROWS, "1"), TypeError, "sigma as a number"),
        (lambda: memokern.score(X, ROWS, 1.0, math.inf), ValueError, "expected alpha finite"),
        (lambda: memokern.score(X, ROWS, 1.0, 1.0, 0.0), ValueError, "temperature finite and > 0"),
        (lambda: memokern.score(X, ROWS, 1.0, bias=X), ValueError, r"expected bias \[5\]"),
        (lambda: memokern.score(X, ROWS, 1.0, bias=[0.0]), TypeError, "bias as a tensor"),
        (
            lambda: memokern.score(X, ROWS, 1.0, bias=torch.full((5,), torch.nan)),
            ValueError,
            "got NaN",
        ),
        (
            lambda: memokern.score(X, ROWS, 1.0, bias=torch.full((5,), -torch.inf)),
            ValueError,
            "no row is left",
        ),
        (lambda: memokern.score(X, ROWS, 1.0, method="fast"), ValueError, "auto, dense"),
        (lambda: memokern.posterior(X, ROWS, 1.0, weighting="box"), ValueError, "gaussian, log"),
        (lambda: memokern.nearest(X, ROWS, k=6), ValueError, "1 <= k <= N = 5"),
        (lambda: memokern.nearest(X, ROWS, k=1.5), TypeError, "k as an int"),
        (lambda: memokern.jvp(X, ROWS, X[:1], 1.0), ValueError, "v like x"),
        (
            lambda: memokern.weights(torch.zeros(1 << 26, 1), torch.ones(3, 1), 1.0),
            ValueError,
            "posterior",
        ),
        (lambda: memokern.score(X, ROWS.to("meta"), 1.0), ValueError, "move one with"),
    ],
)
def test_wrong_input_says_what_was_expected(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "sigma",
    [np.float32(0.5), np.array(0.5), np.full(3, 0.5), torch.full((3, 1), 0.5), torch.tensor([0.5])],
    ids=["float32", "array", "array-3", "tensor-3x1", "tensor-1"],
)
def test_numbers_per_query_may_be_anybodys(sigma):
    rows, x = normal(9, 4, seed=1).float(), normal(3, 4).float()
    for data in (rows, TrainingSet(rows)):
        want = memokern.posterior(x, data, 0.5)
        got = memokern.posterior(x, data, sigma)
        assert torch.equal(got.mean, want.mean) and torch.equal(got.log_z, want.log_z)
        torch.testing.assert_close(memokern.score(x, data, sigma), memokern.score(x, data, 0.5))


def test_the_nearest_distance_has_a_gradient_where_a_row_is_hit():
    rows = normal(6, 3, seed=1)
    x = torch.cat([rows[:1], normal(1, 3)]).requires_grad_()
    distance = memokern.nearest(x, rows, k=3).distance
    for column in range(3):
        (grad,) = torch.autograd.grad(distance[:, column].sum(), x, retain_graph=True)
        away = x.detach() - rows[memokern.nearest(x.detach(), rows, k=3).index[:, column]]
        length = away.norm(dim=1, keepdim=True)
        want = torch.where(length == 0, 0.0, away / torch.where(length == 0, 1.0, length))
        torch.testing.assert_close(grad, want)
    (square,) = torch.autograd.grad(distance.square().sum(), x)
    assert torch.isfinite(square).all()


def test_second_derivatives_are_finite_beside_rows_that_are_left_out():
    bias = torch.tensor([0.0, 0.0, 0.0, -torch.inf])
    x, rows = normal(2, 3).requires_grad_(), normal(4, 3, seed=1)
    (g,) = torch.autograd.grad(
        memokern.posterior(x, rows, 1.0, bias=bias).log_z.sum(), x, create_graph=True
    )
    (second,) = torch.autograd.grad(g.square().sum(), x)
    (h,) = torch.autograd.grad(
        memokern.posterior(x, rows[:3], 1.0).log_z.sum(), x, create_graph=True
    )
    (want,) = torch.autograd.grad(h.square().sum(), x)
    torch.testing.assert_close(second, want)


@pytest.mark.parametrize("b", [1, 3])
def test_one_graph_serves_a_sampler_that_gives_floats(b):
    data, x = TrainingSet(normal(20, 2, seed=1).float()), normal(b, 2).float()

    def step(x, s, n):
        return x + (n - s) * (x - memokern.denoise(x, data, s)) / s

    torch._dynamo.reset()
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counted)
    levels = [0.9, 0.8, 0.7, 0.6, 0.45, 0.3, 0.2, 0.15, 0.1, 0.05, 0.02, 0.01]
    for now, later in pairwise(levels):
        got, want = compiled(x, now, later), step(x, now, later)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert counted.frame_count <= 2
