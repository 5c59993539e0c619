"""The public functions: the formulas, the limits, strange inputs, over every backend here.

In float64 where the backend takes it, else in float32: a backend is preferred, and what it refuses
is the reference's, as on a device of its own.
"""

from __future__ import annotations

import math

import pytest
import torch

import memokern
from memokern import TrainingSet
from memokern.calls import Rows
from tests import harness, oracle
from tests.cases import F32, F64, TAILS, normal, query_of


@pytest.fixture(params=harness.ON_CPU, autouse=True)
def backend(request):
    with harness.preferred(request.param):
        yield request.param


@pytest.fixture
def dtype(backend):
    return F32 if backend == "triton" else F64


@pytest.fixture
def close(dtype):
    """Asserts that two tensors are the same to the contract of the type."""
    tol = {F32: {"rtol": 1e-4, "atol": 1e-4}, F64: {}}[dtype]

    def check(got, want, **kwargs):
        torch.testing.assert_close(got, want, **{"check_dtype": dtype == F64} | tol | kwargs)

    return check


SIZES = [(TAILS[i], TAILS[(i + 5) % 12], TAILS[(i + 10) % 12]) for i in range(12)]


@pytest.mark.parametrize("weighting", ["gaussian", "log"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_posterior_is_the_definition(backend, dtype, size, weighting) -> None:
    """Every query has its own sigma, alpha and temperature."""
    b, n, d = size
    if backend == "triton" and size not in SIZES[::4]:
        pytest.skip("interpreted kernels: every fourth size")
    x, rows, bias = normal(b, d).to(dtype), normal(n, d, seed=1).to(dtype), normal(n, seed=2)
    s, a, t = (0.3 + normal(b, seed=i).abs() for i in (3, 4, 5))
    p = memokern.posterior(x, rows, s, a, t, bias=bias, weighting=weighting)
    want = oracle.sums(query_of(x, s, a, t, bias, weighting), Rows(rows))
    got = (p.mean, p.log_z, p.mean_logit, p.mean_bias, p.weight_sq, p.residual)
    tol = 1e-10 if dtype == F64 else 1e-4
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=tol, atol=tol)


def test_a_huge_common_offset_changes_nothing(backend) -> None:
    if backend == "triton":
        pytest.skip("float32 does not hold these rows; offsets are among the cases of the sweep")
    rows, x = normal(20, 6, seed=1), normal(5, 6)
    far = memokern.posterior(x + 2.0**20, rows + 2.0**20, 0.5)
    near = memokern.posterior(x, rows, 0.5)
    # The inputs themselves were rounded by 2^20 * 2^-53.
    torch.testing.assert_close(far.mean - 2.0**20, near.mean, rtol=0, atol=1e-8)
    torch.testing.assert_close(far.log_z, near.log_z, rtol=0, atol=1e-7)


def test_identities_of_the_sweep(dtype, close) -> None:
    rows, x, s, a = normal(12, 3, seed=1).to(dtype), normal(5, 3).to(dtype), 0.7, 0.8
    p = memokern.posterior(x, rows, s, a)
    w = memokern.weights(x, rows, s, a)
    close(w.sum(1), torch.ones(5, dtype=F64))
    close(w @ rows.double(), p.mean)
    close(-(w * w.log()).sum(1), p.entropy)
    close(1 / w.square().sum(1), p.ess)
    spread = (w[:, :, None] * (rows - p.mean[:, None]).square()).sum((1, 2))
    close(spread, p.covariance_trace)
    centres = torch.distributions.Normal(a * rows.double(), s)
    density = torch.logsumexp(centres.log_prob(x[:, None]).sum(-1), 1) - math.log(12)
    close(p.log_density, density)
    close(p.eps, -s * p.score)
    close(p.v, a * p.eps - s * p.mean)
    flow = memokern.posterior(x, rows, 0.4, 0.6)
    close(flow.velocity(), (flow.mean - x) / 0.4)


def test_weights_are_the_definition(dtype, close) -> None:
    rows, x, bias = normal(12, 3, seed=1).to(dtype), normal(2, 2, 3).to(dtype), normal(12, seed=2)
    bias[3] = -math.inf
    for weighting in ("gaussian", "log"):
        got = memokern.weights(x, rows, 0.6, 0.8, 1.5, bias=bias, weighting=weighting)
        query = query_of(x.reshape(4, 3), 0.6, 0.8, 1.5, bias, weighting)
        close(got, oracle.weights(query, Rows(rows)).reshape(2, 2, 12))
    x[0, 1] = rows[5]
    at_zero = memokern.weights(x, rows, 0.0, bias=bias)
    query = query_of(x.reshape(4, 3), 0.0, bias=bias)
    close(at_zero, oracle.weights(query, Rows(rows)).reshape(2, 2, 12))


def test_score_and_divergence_are_derivatives_of_the_density(dtype, close) -> None:
    rows = normal(12, 3, seed=1).to(dtype)
    x = normal(3).to(dtype).requires_grad_()
    p = memokern.posterior(x, rows, 0.7, 0.8, bias=normal(12, seed=4))
    (score,) = torch.autograd.grad(p.log_density, x, create_graph=True)
    close(score, p.score)
    div = sum(torch.autograd.grad(score[i], x, retain_graph=True)[0][i] for i in range(3))
    close(div, p.divergence)


def test_temperature_divergence(dtype, close) -> None:
    rows = normal(12, 3, seed=1).to(dtype)
    x = normal(3).to(dtype).requires_grad_()
    p = memokern.posterior(x, rows, 0.7, 0.8, 2.5)
    grads = [torch.autograd.grad(p.score[i], x, retain_graph=True)[0][i] for i in range(3)]
    close(sum(grads), p.divergence)


@pytest.mark.long_on("triton")
def test_jvp_is_symmetric_and_differentiable(dtype, close) -> None:
    rows = normal(12, 3, seed=1).to(dtype)
    x, v, u = (normal(5, 3, seed=i).to(dtype) for i in (0, 2, 3))
    a = (memokern.jvp(x, rows, v, 0.7, 0.8, 1.5) * u).sum()
    b = (memokern.jvp(x, rows, u, 0.7, 0.8, 1.5) * v).sum()
    close(a, b)
    with torch.no_grad():
        assert not memokern.jvp(x, rows, v, 0.7).requires_grad
    if dtype == F64:
        assert torch.autograd.gradcheck(
            lambda q, t: memokern.jvp(q, rows, t, 0.7), (x.requires_grad_(), v.requires_grad_())
        )


def test_the_limit_sigma_to_zero() -> None:
    rows = torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 0.0], [9.0, 9.0]])
    x = torch.tensor([[0.4, 0.1], [1.0, 5.0], [2.0, 0.0]])
    p = memokern.posterior(x, rows, 0.0)
    want = torch.tensor([[0.0, 0.0], [4 / 3, 0.0], [2.0, 0.0]])
    torch.testing.assert_close(p.mean, want)
    torch.testing.assert_close(p.ess, torch.tensor([1.0, 3.0, 2.0], dtype=F64))
    assert p.log_z[:2].isneginf().all() and math.isclose(p.log_z[2].item(), math.log(2))
    torch.testing.assert_close(p.entropy, p.ess.log())
    assert p.covariance_trace.tolist() == [0, 0, 0]
    tiny = memokern.posterior(x[[0, 2]], rows, 1e-30)
    torch.testing.assert_close(tiny.mean, want[[0, 2]])
    out = torch.tensor([-torch.inf, 0.0, 0.0, 0.0], dtype=F64)
    torch.testing.assert_close(
        memokern.denoise(x[:1], rows, 0.0, bias=out), torch.tensor([[2.0, 0.0]])
    )
    shared = torch.tensor([0.0, math.log(3.0), 0.0, 0.0], dtype=F64)
    torch.testing.assert_close(
        memokern.denoise(x[1:2], rows, 0.0, bias=shared), torch.tensor([[8 / 5, 0.0]])
    )


def test_exact_hits_take_all_the_weight_of_the_log_weighting() -> None:
    rows = torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    p = memokern.posterior(torch.tensor([[2.0, 0.0]]), rows, 1.0, weighting="log")
    torch.testing.assert_close(p.mean, torch.tensor([[2.0, 0.0]]))
    assert p.weight_sq.item() == 0.5 and p.log_z.isposinf().all()


def test_a_query_that_is_not_finite_spoils_only_itself() -> None:
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


def test_far_queries_and_huge_values_stay_finite() -> None:
    rows, x = normal(9, 4, seed=1).float(), 1e15 * normal(3, 4).float()
    p = memokern.posterior(x, rows, 1e-3)
    assert torch.isfinite(p.mean).all() and torch.isfinite(p.log_z).all()
    assert memokern.nearest(x, rows).index[:, 0].shape == (3,)


def test_alpha_zero_knows_nothing(dtype, close) -> None:
    rows, x = normal(9, 4, seed=1).to(dtype), normal(3, 4).to(dtype)
    p = memokern.posterior(x, rows, 0.5, 0.0)
    close(p.mean, rows.mean(0).expand(3, 4))


@pytest.mark.parametrize("batch", [(), (0,), (2, 3), (2, 0)])
def test_any_batch_and_image_shape(batch, dtype) -> None:
    rows = normal(7, 2, 3, 4, seed=1).to(dtype)
    x = normal(*batch, 2, 3, 4).to(dtype)
    p = memokern.posterior(x, rows, 0.5 if batch != (2, 3) else 0.5 + torch.rand(2, 1))
    assert p.mean.shape == x.shape and p.log_z.shape == batch and p.divergence.shape == batch
    assert p.score.shape == x.shape
    near = memokern.nearest(x, TrainingSet(rows), k=2)
    assert near.distance.shape == (*batch, 2) == near.index.shape
    assert memokern.weights(x, rows, 0.5).shape == (*batch, 7)


def test_strides_do_not_matter() -> None:
    rows, x = normal(7, 9, seed=1).float(), normal(4, 9).float()
    want = memokern.denoise(x, rows, 0.5)
    odd_x = torch.stack([x, x])[:, :, :].transpose(0, 2).contiguous().transpose(0, 2)[0]
    wide = torch.cat([rows, rows], 1)[:, :9]
    assert not odd_x.is_contiguous() and not wide.is_contiguous()
    torch.testing.assert_close(memokern.denoise(odd_x, wide, 0.5), want, rtol=1e-6, atol=1e-6)
    columns = rows.T.contiguous().T
    torch.testing.assert_close(memokern.denoise(x, columns, 0.5), want, rtol=1e-6, atol=1e-6)
    assert torch.equal(memokern.nearest(odd_x, columns).index, memokern.nearest(x, rows).index)


def test_a_batch_can_be_split(backend) -> None:
    b = 8 if backend == "triton" else 40
    rows, x = normal(50, 20, seed=1).float(), normal(b, 20).float()
    whole = memokern.posterior(x, rows, 0.5)
    parts = [memokern.posterior(q, rows, 0.5) for q in x.split(7)]
    torch.testing.assert_close(whole.mean, torch.cat([p.mean for p in parts]), rtol=1e-5, atol=1e-6)
    again = memokern.posterior(x, rows, 0.5)
    assert torch.equal(whole.mean, again.mean) and torch.equal(whole.log_z, again.log_z)


def test_training_set_and_tensor_agree_and_weights_count(dtype, close) -> None:
    rows, x = normal(9, 4, seed=1).to(dtype), normal(3, 4).to(dtype)
    log_weights = normal(9, seed=2)
    log_weights[3] = -torch.inf
    p = memokern.posterior(x, TrainingSet(rows, log_weights=log_weights), 0.6, 0.9)
    q = memokern.posterior(x, rows, 0.6, 0.9, bias=log_weights)
    close(p.mean, q.mean)
    keep = [i for i in range(9) if i != 3]
    left = memokern.posterior(x, rows[keep], 0.6, 0.9, bias=log_weights[keep])
    close(p.mean, left.mean)
    close(p.log_density, left.log_density)


def test_nearest_is_exact_where_expanded_squares_are_not() -> None:
    rows = 1000 + torch.arange(40, dtype=F32)[:, None] * 1e-3 + torch.zeros(40, 64)
    x = rows[[7, 23]] + 2e-4
    near = memokern.nearest(x, rows, k=3)
    r = (x[:, None].double() - rows.double()).norm(dim=-1)
    want, index = r.sort(dim=1, stable=True)
    assert torch.equal(near.index, index[:, :3])
    torch.testing.assert_close(near.distance, want[:, :3], rtol=1e-12, atol=0)
    ties = memokern.nearest(torch.zeros(1, 2), torch.ones(5, 2), k=5)
    assert ties.index.tolist() == [[0, 1, 2, 3, 4]]
