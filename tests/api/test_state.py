"""memokern.posterior_state and memokern.merge: a user with parts of a data set gets the same answer
as with the whole, at every sigma, 0 included, and the same gradients."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import memokern
from memokern import PosteriorState, TrainingSet
from memokern.calls import Rows
from tests import harness, oracle
from tests.cases import F32, F64, normal, query_of

SUMS = ("mean", "log_z", "mean_logit", "mean_bias", "weight_sq", "residual")
EXACT = [name for name in harness.ON_CPU if name != "triton"]


@pytest.fixture(params=harness.ON_CPU)
def backend(request):
    with harness.preferred(request.param):
        yield request.param


def data_of(dtype=F64, n=24, d=5, b=4):
    """Rows of which some are repeated beyond the middle, and queries: a row, one near, one far."""
    rows = normal(n, d, seed=1)
    rows[n - 3], rows[n - 4] = rows[1], rows[5]
    x = rows[[1, 5, 2, 0]][:b] + torch.tensor([0.0, 0.01, 1.0, 30.0])[:b, None] * normal(b, d)
    return x.to(dtype), rows.to(dtype)


def in_parts(x, rows, cuts, sigma, *args, bias=None, **kwargs) -> PosteriorState:
    """The merged states of the rows cut there."""
    states = []
    for first, last in itertools.pairwise([0, *cuts, len(rows)]):
        mine = None if bias is None else bias[first:last]
        states.append(memokern.posterior_state(x, rows[first:last], sigma, *args, bias=mine,
                                               **kwargs))  # fmt: skip
    return memokern.merge(*states)


def same(got, want, rtol, atol) -> None:
    for name in SUMS:
        a, e = getattr(got, name), getattr(want, name)
        torch.testing.assert_close(a, e, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


BIASES = {
    "none": None,
    "normal": normal(24, seed=4),
    "holes": torch.where(torch.arange(24) % 3 == 0, -math.inf, normal(24, seed=4)),
    "half": torch.where(torch.arange(24) < 12, -math.inf, normal(24, seed=4)),
}


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("weighting", ["gaussian", "log"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
@pytest.mark.one_of(2)
def test_parts_are_the_whole_at_every_sigma(backend, dtype, weighting, bias) -> None:
    """Ties over the boundary, hits in one part, parts of which no row is left."""
    if backend == "triton" and dtype == F64:
        pytest.skip("float64 goes to the reference, whose tests these are")
    x, rows = data_of(dtype)
    b = BIASES[bias]
    tol = 1e-11 if dtype == F64 else 1e-4
    sigmas = (0.0, 1e-200, 1e-3, 0.5, 100.0) if weighting == "gaussian" else (1.0,)
    for sigma, cuts in itertools.product(sigmas, ([12], [1, 5, 23])):
        if backend == "triton" and (sigma in (1e-200, 1e-3)) != (len(cuts) == 1):
            continue  # interpreted: one way to cut for each sigma
        got = in_parts(x, rows, cuts, sigma, 0.9, 1.3, bias=b, weighting=weighting).posterior()
        want = memokern.posterior(x, rows, sigma, 0.9, 1.3, bias=b, weighting=weighting)
        same(got, want, tol, tol)
        assert got.n == want.n == 24 and got.dim == want.dim == 5
        total = torch.as_tensor(want.log_weight_total, dtype=F64)
        torch.testing.assert_close(got.log_weight_total, total)
        truth = oracle.sums(query_of(x, sigma, 0.9, 1.3, b, weighting), Rows(rows))
        for a, e in zip((getattr(got, n) for n in SUMS), truth, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)


def test_everything_that_follows_from_the_sums(backend) -> None:
    x, rows = data_of(F32)
    got = in_parts(x, rows, [7, 8], 0.6, 0.8).posterior()
    want = memokern.posterior(x, rows, 0.6, 0.8)
    for name in ("score", "eps", "v", "log_density", "ess", "entropy", "residual"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.velocity(), want.velocity(), rtol=1e-4, atol=1e-4)


@pytest.mark.long_on("triton")
def test_order_and_grouping_do_not_matter(backend) -> None:
    x, rows = data_of(F32)
    a, b, c = (memokern.posterior_state(x, part, 0.4) for part in rows.split([10, 1, 13]))
    merge = memokern.merge
    ways = (merge(a, b, c), merge(merge(a, b), c), merge(a, merge(b, c)), merge(c, a, b))
    for way in ways[1:]:
        same(way.posterior(), ways[0].posterior(), 1e-5, 1e-5)
    assert merge(a).posterior().mean.equal(a.posterior().mean)
    each = rows.split(5)
    one = functools.reduce(merge, (memokern.posterior_state(x, part, 0.4) for part in each))
    same(one.posterior(), ways[0].posterior(), 1e-4, 1e-4)


@pytest.mark.parametrize("batch", [(), (0,), (2, 3)])
def test_any_batch_image_shape_and_data_set(backend, batch) -> None:
    """Training sets with log weights, uint8 and half precision beside float32."""
    images = (normal(20, 2, 3, seed=1) * 30 + 128).clamp(0, 255).to(torch.uint8)
    weights = normal(20, seed=2)
    whole = TrainingSet(images, log_weights=weights)
    x = whole.dequantize(normal(*batch, 2, 3)).float()
    sigma = 0.5 if batch != (2, 3) else 0.5 + torch.rand(2, 1)
    parts = [
        memokern.posterior_state(x, TrainingSet(images[at], log_weights=weights[at]), sigma)
        for at in (slice(0, 9), slice(9, 20))
    ]
    got, want = memokern.merge(*parts).posterior(), memokern.posterior(x, whole, sigma)
    assert got.mean.shape == x.shape and got.log_z.shape == batch
    same(got, want, 1e-4, 1e-5)
    torch.testing.assert_close(got.log_density, want.log_density, rtol=1e-4, atol=1e-4)
    values = whole[:]
    mixed = memokern.merge(
        memokern.posterior_state(x, TrainingSet(images[:9]), sigma),
        memokern.posterior_state(x, values[9:].half(), sigma),
    ).posterior()
    same(mixed, memokern.posterior(x, values, sigma), 2e-3, 2e-3)


def test_a_part_without_rows_that_count(backend) -> None:
    x, rows = data_of(F32)
    bias = torch.full((10,), -math.inf, dtype=F64)
    for sigma in (0.0, 0.5):
        empty = memokern.posterior_state(x, rows[:10], sigma, bias=bias)
        assert empty.log_weight_total == -math.inf
        alone = empty.posterior()
        assert alone.log_z.isneginf().all() and alone.mean.isnan().all()
        assert memokern.merge(empty, empty).posterior().log_z.isneginf().all()
        rest = memokern.posterior_state(x, rows[10:], sigma)
        for both in (memokern.merge(empty, rest), memokern.merge(rest, empty)):
            same(both.posterior(), rest.posterior(), 1e-6, 1e-6)
            assert both.n == 24
            torch.testing.assert_close(both.log_weight_total, rest.log_weight_total)


def test_a_lost_query_stays_lost(backend) -> None:
    x, rows = data_of(F32)
    x[1, 2] = math.nan
    for sigma in (0.0, 0.5):
        got = in_parts(x, rows, [12], sigma).posterior()
        want = memokern.posterior(x, rows, sigma)
        for name in SUMS:
            assert getattr(got, name)[1].isnan().all()
        torch.testing.assert_close(got.mean, want.mean, rtol=1e-5, atol=1e-5, equal_nan=True)


# --- gradients ----------------------------------------------------------------------------------


def leaves(bias: bool):
    x, rows = data_of(b=3)
    numbers = [torch.tensor([0.7, 0.4, 1.5], dtype=F64) + 0.1 * i for i in range(3)]
    b = [normal(24, seed=4)] if bias else []
    return [v.clone().requires_grad_() for v in (x[1:], *[n[:2] for n in numbers], *b)], rows


def loss_of(p):
    """Of every sum, and what is made of them."""
    return (
        p.mean.square().sum() + p.log_z.sum() + 0.3 * p.mean_logit.sum() + p.mean_bias.sum()
        + p.weight_sq.sum() + p.log_density.sum()
    )  # fmt: skip


@pytest.mark.parametrize("weighting", ["gaussian", "log"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", EXACT)
def test_gradients_of_parts_are_those_of_the_whole(name, bias, weighting) -> None:
    """For x, sigma, alpha, temperature, bias, and for the rows; second ones too."""
    inputs, rows = leaves(bias)
    data = rows.clone().requires_grad_()

    def gradients(call):
        x, sigma, alpha, temperature, *b = inputs
        how = {"bias": b[0] if b else None, "weighting": weighting}
        first = torch.autograd.grad(
            loss_of(call(x, data, sigma, alpha, temperature, **how)), [*inputs, data],
            allow_unused=True,
        )  # fmt: skip
        again = torch.autograd.grad(
            loss_of(call(x, rows, sigma, alpha, temperature, **how)), inputs, create_graph=True,
            allow_unused=True,
        )  # fmt: skip
        again = [g for g in again if g is not None and g.requires_grad]
        total = sum(g.square().sum() for g in again)
        return [*first, *torch.autograd.grad(total, inputs, allow_unused=True)]

    def parts(x, values, sigma, alpha, temperature, **how):
        return in_parts(x, values, [5, 13], sigma, alpha, temperature, **how).posterior()

    with harness.preferred(name):
        got, want = gradients(parts), gradients(memokern.posterior)
    for a, e in zip(got, want, strict=True):
        if e is None or a is None:
            assert (e is None or not e.any()) and (a is None or not a.any())
            continue
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-8 * e.abs().max().item())


def test_gradients_in_float32(backend) -> None:
    """Of each backend's own kernels."""
    x, rows = data_of(F32)
    x = x[2:].requires_grad_()
    bias = normal(24, seed=4).requires_grad_()

    def gradients(call):
        return torch.autograd.grad(loss_of(call(x, rows, 0.8, 0.9, 1.2, bias=bias)), (x, bias))

    got = gradients(lambda q, r, *a, bias: in_parts(q, r, [12], *a, bias=bias).posterior())
    for a, e in zip(got, gradients(memokern.posterior), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4 * e.abs().max().item())


@pytest.mark.parametrize("left_out", [(), (3, 14), tuple(range(12))])
@pytest.mark.parametrize("name", EXACT)
@pytest.mark.one_of(6)
def test_finite_differences(name, left_out) -> None:
    """With rows left out too, and with a part of which nothing is left: nothing becomes NaN."""
    (x, sigma, alpha, temperature, bias), rows = leaves(True)
    kept = torch.tensor([n for n in range(24) if n not in left_out])
    free = bias.detach()[kept][:4].requires_grad_()

    def call(x, sigma, alpha, temperature, free):
        full = torch.full((24,), -math.inf, dtype=F64)
        full = full.index_put((kept,), torch.cat([free, bias.detach()[kept][4:]]))
        p = in_parts(x, rows, [12], sigma, alpha, temperature, bias=full).posterior()
        return p.mean, p.log_z, p.mean_logit, p.mean_bias, p.weight_sq, p.log_density

    inputs = (x[:1], sigma[:1], alpha[:1], temperature[:1], free)
    inputs = tuple(v.detach().clone().requires_grad_() for v in inputs)
    with harness.preferred(name):
        assert gradcheck(call, inputs)
        if name == EXACT[0]:
            assert gradgradcheck(call, inputs)


@pytest.mark.parametrize("name", EXACT)
def test_second_derivatives_with_rows_left_out_are_finite(name) -> None:
    """Of the whole: bias and sigma included. They were NaN once any bias was -inf."""
    (x, sigma, alpha, temperature, _), rows = leaves(True)
    bias = BIASES["holes"].clone().requires_grad_()
    inputs = (x, sigma, alpha, temperature, bias)
    with harness.preferred(name):
        p = memokern.posterior(x, rows, sigma, alpha, temperature, bias=bias)
        first = torch.autograd.grad(loss_of(p), inputs, create_graph=True)
        *others, of_bias = first
        total = torch.where(torch.isfinite(bias), of_bias, 0.0).square().sum()
        total = total + sum(g.square().sum() for g in others)
        second = torch.autograd.grad(total, inputs)
    kept = torch.isfinite(bias)
    for g in (*first, *second):
        assert torch.isfinite(g[kept] if g.shape == bias.shape else g).all()


@pytest.mark.parametrize(
    "tied",
    [
        False,
        pytest.param(True, marks=pytest.mark.xfail(
            strict=True, reason="log_z is infinite, and has no gradient for the bias: so how ties"
            " are shared between parts has none")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", EXACT)
def test_at_sigma_zero_gradients_are_those_of_the_whole(name, tied) -> None:
    """Only the bias moves anything, by the shares of rows that are equally near."""
    x, rows = data_of()
    if not tied:  # within one part only
        rows[20:22], rows[2] = normal(2, 5, seed=8), rows[3]
        x[0] = rows[2] + 0.01
    x, bias = x.requires_grad_(), normal(24, seed=4).requires_grad_()

    def gradients(call):
        p = call(x, rows, 0.0, bias=bias)
        total = (p.mean * normal(4, 5, seed=9)).sum() + p.weight_sq.sum() + p.mean_bias.sum()
        return torch.autograd.grad(total, (x, bias))

    with harness.preferred(name):
        got = gradients(lambda q, r, s, bias: in_parts(q, r, [12], s, bias=bias).posterior())
        want = gradients(memokern.posterior)
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)
    assert not want[0].any() and want[1].any()


# --- errors -------------------------------------------------------------------------------------


def test_states_that_do_not_belong_together() -> None:
    x, rows = data_of(F32)
    a = memokern.posterior_state(x, rows, 0.5)

    def refused(words: str, error=ValueError, **how) -> None:
        asked = {"x": x, "data": rows, "sigma": 0.5} | how
        other = memokern.posterior_state(**asked)
        with pytest.raises(error, match=words):
            memokern.merge(a, other)

    refused("same queries, and their x differs", x=x + 1)
    refused("same queries, and their sigma differs", sigma=0.6)
    refused("same queries, and their alpha differs", alpha=0.9)
    refused("same queries, and their temperature differs", temperature=2.0)
    refused("one weighting, got gaussian and log", weighting="log")
    refused("same queries: x is", x=x[:2])
    refused("same queries: x is", x=x.double())
    refused("same queries: x is", x=x[None])
    with pytest.raises(TypeError, match="got Posterior"):
        memokern.merge(a, a.posterior())
    # Equal ones need not be the same tensor, and what is NaN is equal to NaN.
    x[0, 0] = math.nan
    b, c = (memokern.posterior_state(x.clone(), rows, 0.5) for _ in range(2))
    assert memokern.merge(b, c).n == 48


def test_a_state_is_shown_and_kept(backend) -> None:
    """It is what was asked, and no call changes it."""
    x, rows = data_of(F32)
    state = memokern.posterior_state(x, rows, 0.5, 0.9)
    assert state.x is x and state.n == 24 and state.weighting == "gaussian"
    assert state.sigma.tolist() == [0.5] * 4 and state.alpha.tolist() == [0.9] * 4
    before = [v.clone() for v in state.state]
    memokern.merge(state, state).posterior()
    assert all(torch.equal(a, b) for a, b in zip(before, state.state, strict=True))
    twice = memokern.merge(state, state).posterior()
    torch.testing.assert_close(twice.mean, state.posterior().mean)
    torch.testing.assert_close(twice.log_density, state.posterior().log_density)
