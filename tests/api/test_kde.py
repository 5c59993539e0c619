"""Kernel density estimates against their definition, far out and in many dimensions too."""

from __future__ import annotations

import math

import pytest
import torch

import memokern
from memokern import TrainingSet, kde

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def left_one_out(rows: torch.Tensor, h: float, bias: torch.Tensor | None = None) -> torch.Tensor:
    """By definition: the density of the others at each row, from one set of rows per query."""
    found = []
    for i in range(len(rows)):
        keep = torch.arange(len(rows)) != i
        others = None if bias is None else bias[keep]
        flat = rows[keep].flatten(1).double()
        logit = -(rows[i].flatten().double() - flat).square().sum(1) / (2 * h * h)
        weight = torch.zeros(len(flat)).double() if others is None else others.double()
        value = (logit + weight).logsumexp(0) - weight.logsumexp(0)
        found.append(value - flat.shape[1] * (math.log(2 * math.pi) / 2 + math.log(h)))
    return torch.stack(found)


def test_it_is_the_density_and_the_score_of_the_mixture():
    rows, x = normal(20, 3), normal(7, 3, seed=1)
    weights = normal(20, seed=2)
    for bias in (None, weights):
        got = kde.log_density(x, rows, 0.4, bias=bias)
        torch.testing.assert_close(got, memokern.log_density(x, rows, 0.4, bias=bias))
        got = kde.score(x, rows, 0.4, bias=bias)
        torch.testing.assert_close(got, memokern.score(x, rows, 0.4, bias=bias))


@pytest.mark.parametrize("n", [2, 3, 31, 32, 33, 64, 130])
def test_leaving_one_out_is_the_density_of_the_others(n):
    rows = normal(n, 2, 3)
    for h in (0.05, 0.7, 40.0):
        got = kde.log_density(rows, rows, h, leave_one_out=True)
        torch.testing.assert_close(got, left_one_out(rows, h), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
def test_leaving_one_out_of_stored_rows_with_weights(dtype):
    rows = (normal(40, 6) * 60).clamp(-127, 127)
    rows = (rows + 127).to(torch.uint8) if dtype == torch.uint8 else rows.to(dtype) / 60
    bias = normal(40, seed=3) * 5
    data = TrainingSet(rows, log_weights=bias)
    values = data[:].double()
    x = data[:]
    for h in (0.1, 1.0):
        got = kde.log_density(x, data, h, leave_one_out=True)
        tolerance = 1e-4 if dtype != torch.float64 else 1e-10
        torch.testing.assert_close(
            got, left_one_out(values, h, bias), rtol=tolerance, atol=tolerance
        )
        more = normal(40, seed=5)
        got = kde.log_density(x, data, h, leave_one_out=True, bias=more)
        right = left_one_out(values, h, bias + more)
        torch.testing.assert_close(got, right, rtol=tolerance, atol=tolerance)


def test_bytes_in_a_tensor_are_pixels():
    rows = torch.randint(0, 256, (35, 4), dtype=torch.uint8)
    x = rows.double() * (2 / 255) - 1
    got = kde.log_density(x, rows, 0.3, leave_one_out=True)
    torch.testing.assert_close(got, left_one_out(x, 0.3), rtol=1e-6, atol=1e-6)


def test_leaving_one_out_of_a_set_with_an_index():
    digits = TrainingSet.digits().subset(slice(0, 100))
    plain = kde.log_density(digits[:], digits, 0.3, leave_one_out=True)
    digits.build_index(progress=False)
    torch.testing.assert_close(kde.log_density(digits[:], digits, 0.3, leave_one_out=True), plain)


def test_scores_and_gradients_where_one_is_left_out():
    rows, h = normal(9, 3), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    bias = normal(9, seed=4).requires_grad_()
    x = rows.clone().requires_grad_()
    value = kde.log_density(x, rows, h, leave_one_out=True, bias=bias)
    grad_x, grad_h, grad_bias = torch.autograd.grad(value.sum(), (x, h, bias))
    score = kde.score(rows, rows, 0.5, leave_one_out=True, bias=bias.detach())
    torch.testing.assert_close(grad_x, score, rtol=1e-10, atol=1e-10)
    step = 1e-6
    for name, grad in (("h", grad_h), ("bias", grad_bias[2])):
        values = []
        for sign in (1, -1):
            moved = bias.detach().clone()
            moved[2] += sign * step * (name == "bias")
            width = 0.5 + sign * step * (name == "h")
            values.append(kde.log_density(rows, rows, width, leave_one_out=True, bias=moved).sum())
        torch.testing.assert_close(grad, (values[0] - values[1]) / (2 * step), rtol=1e-6, atol=1e-6)


def test_a_bandwidth_for_each_query():
    rows = normal(6, 2)
    h = torch.linspace(0.2, 1.5, 6, dtype=torch.float64)
    got = kde.log_density(rows, rows, h, leave_one_out=True)
    right = torch.stack([left_one_out(rows, float(w))[i] for i, w in enumerate(h)])
    torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_underflows_is_finite_in_logarithms(dtype):
    """2000 dimensions, where the density at a typical point is e^-2800 and less, and a point a
    thousand bandwidths away. torch-kde and code that takes exp first say -inf."""
    rows = normal(50, 2000, dtype=dtype)
    x = torch.cat(
        [normal(3, 2000, seed=1, dtype=dtype), 1e3 + normal(1, 2000, seed=2, dtype=dtype)]
    )
    x.requires_grad_()
    h = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    value = kde.log_density(x, rows, h)
    square = (x.detach().double()[:, None] - rows.double()).square().sum(-1)
    right = (-square / 2).logsumexp(1) - math.log(50) - 1000 * math.log(2 * math.pi)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(value.detach(), right, rtol=tolerance, atol=0)
    for grad in torch.autograd.grad(value.sum(), (x, h)):
        assert bool(torch.isfinite(grad).all())
    alone = kde.log_density(rows, rows, 1.0, leave_one_out=True)
    assert bool(torch.isfinite(alone).all())
    # The own row of a far bandwidth would hide what is left.
    tiny = kde.log_density(rows, rows, 1e-3, leave_one_out=True)
    torch.testing.assert_close(tiny, left_one_out(rows, 1e-3), rtol=tolerance, atol=0)


def test_the_bandwidth_of_cross_validation_is_near_the_rule_for_normal_data():
    """200 standard normal numbers: Silverman's rule says 1.06 n^(-1/5) = 0.37."""
    rows = normal(200, 1)
    widths = torch.tensor([0.03, 0.1, 0.2, 0.4, 0.8, 2.0])
    value = [
        float(kde.log_density(rows, rows, float(h), leave_one_out=True).mean()) for h in widths
    ]
    best = float(widths[int(torch.tensor(value).argmax())])
    assert best in (pytest.approx(0.2), pytest.approx(0.4))


def test_wrong_arguments():
    rows = normal(4, 2)
    with pytest.raises(ValueError, match=r"x as the rows in their order, \[4"):
        kde.log_density(rows[:3], rows, 1.0, leave_one_out=True)
    with pytest.raises(ValueError, match="at least 2 rows"):
        kde.score(rows[:1], rows[:1], 1.0, leave_one_out=True)
    for function in (kde.log_density, kde.score):
        for left in (False, True):
            with pytest.raises(ValueError, match="bandwidth > 0"):
                function(rows, rows, 0.0, leave_one_out=left)
    bias = torch.tensor([0.0, -math.inf, -math.inf, -math.inf])
    with pytest.raises(ValueError, match="one row has all the weight"):
        kde.log_density(rows, rows, 1.0, leave_one_out=True, bias=bias)
