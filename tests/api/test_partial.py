"""Parts of the data, swept apart, give the posterior of the whole."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import memokern
from tests import cases, harness

NAMES = ("mean", "log_z", "mean_logit", "mean_bias", "weight_sq")


@pytest.fixture(params=harness.ON_CPU, autouse=True)
def backend(request):
    with harness.preferred(request.param):
        yield request.param


def halves(x: Tensor, rows: Tensor, at: int, *args, bias=None, **kwargs) -> memokern.PosteriorState:
    parts = []
    for where in (slice(0, at), slice(at, None)):
        mine = None if bias is None else bias[where]
        parts.append(memokern.posterior_state(x, rows[where], *args, bias=mine, **kwargs))
    return memokern.merge(*parts)


def same(got: memokern.Posterior, want: memokern.Posterior, rtol: float, atol: float) -> None:
    for name in NAMES:
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=rtol, atol=atol)
    assert got.n == want.n
    torch.testing.assert_close(
        torch.as_tensor(got.log_weight_total), torch.as_tensor(want.log_weight_total).double()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighting", ["gaussian", "log"])
@pytest.mark.parametrize("sigma", [0.0, 1e-200, 1e-30, 1e-3, 0.1, 1.0, 1e3])
def test_two_halves_are_one_set(sigma: float, weighting: str, dtype: torch.dtype) -> None:
    rows, x = cases.normal(13, 5, seed=1).to(dtype), cases.normal(6, 5).to(dtype)
    rows[9] = rows[2]  # equally near, in both halves
    x[0], x[1] = rows[2], rows[4] + 1e-6  # a hit of both halves, and one that nearly is
    x[2, 1] = math.nan
    bias = cases.normal(13, seed=3)
    bias[5] = -math.inf
    args = (sigma, 0.9, 1.5)
    got = halves(x, rows, 6, *args, bias=bias, weighting=weighting).posterior()
    want = memokern.posterior(x, rows, *args, bias=bias, weighting=weighting)
    tol = 1e-5 if dtype == torch.float32 else 1e-10
    for name in NAMES:
        a, b = getattr(got, name).double(), getattr(want, name).double()
        torch.testing.assert_close(a, b, rtol=tol, atol=tol, equal_nan=True)


def test_a_half_without_weight_and_one_that_has_none_at_all() -> None:
    rows, x = cases.normal(8, 3, seed=1), cases.normal(4, 3)
    bias = torch.zeros(8, dtype=torch.float64)
    bias[5:] = -math.inf
    for sigma in (0.0, 0.5):
        left = memokern.posterior_state(x, rows[:5], sigma)
        # A part is refused where no row is left; its state is the neutral one.
        with pytest.raises(ValueError, match="no row is left"):
            memokern.posterior_state(x, rows[5:], sigma, bias=bias[5:])
        want = memokern.posterior(x, rows, sigma, bias=bias)
        for name in NAMES:
            torch.testing.assert_close(getattr(left.posterior(), name), getattr(want, name))


def test_any_number_of_parts_in_any_order() -> None:
    rows, x = cases.normal(40, 4, seed=1), cases.normal(2, 3, 4)
    parts = [memokern.posterior_state(x, part, 0.3) for part in rows.split(7)]
    want = memokern.posterior(x, rows, 0.3)
    same(memokern.merge(*parts).posterior(), want, 1e-10, 1e-10)
    same(memokern.merge(*reversed(parts)).posterior(), want, 1e-10, 1e-10)
    assert memokern.merge(parts[0]) == parts[0] or memokern.merge(parts[0]).n == parts[0].n


def test_gradients_go_through_the_parts() -> None:
    rows, x = cases.normal(9, 3, seed=1), cases.normal(2, 3)
    leaves = [x, *(torch.tensor(v, dtype=torch.float64) for v in (0.6, 0.9, 1.3))]
    leaves = [v.clone().requires_grad_() for v in (*leaves, cases.normal(9, seed=4))]
    seeds = [cases.normal(2, 3, seed=7), *(cases.normal(2, seed=8 + i) for i in range(4))]

    def pull(p: memokern.Posterior) -> list[Tensor]:
        total = sum((getattr(p, n) * g).sum() for n, g in zip(NAMES, seeds, strict=True))
        return list(torch.autograd.grad(total, leaves))

    *args, bias = leaves
    got = pull(halves(args[0], rows, 4, *args[1:], bias=bias).posterior())
    want = pull(memokern.posterior(args[0], rows, *args[1:], bias=bias))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_gradcheck_and_gradgradcheck() -> None:
    rows = cases.normal(5, 2, seed=1)

    def sums(x: Tensor, sigma: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        p = halves(x, rows, 2, sigma, bias=bias).posterior()
        return p.mean, p.log_z, p.mean_logit, p.weight_sq

    inputs = (cases.normal(2, 2), torch.tensor(0.7, dtype=torch.float64), cases.normal(5, seed=2))
    inputs = tuple(v.requires_grad_() for v in inputs)
    assert torch.autograd.gradcheck(sums, inputs)
    assert torch.autograd.gradgradcheck(sums, inputs)


def test_what_cannot_be_merged_is_an_error() -> None:
    rows, x = torch.randn(6, 3), torch.randn(2, 3)
    state = memokern.posterior_state(x, rows, 0.5)
    with pytest.raises(ValueError, match="at least one"):
        memokern.merge()
    with pytest.raises(TypeError, match="posterior_state"):
        memokern.merge(state, memokern.posterior(x, rows, 0.5))  # type: ignore[arg-type]
    for other, message in (
        (memokern.posterior_state(x + 1, rows, 0.5), "x differs"),
        (memokern.posterior_state(x, rows, 0.6), "sigma differs"),
        (memokern.posterior_state(x, rows, 0.5, 2.0), "alpha differs"),
        (memokern.posterior_state(x, rows, 0.5, weighting="log"), "weighting"),
        (memokern.posterior_state(x[:1], rows, 0.5), "same queries"),
        (memokern.posterior_state(x.double(), rows, 0.5), "same queries"),
    ):
        with pytest.raises(ValueError, match=message):
            memokern.merge(state, other)
