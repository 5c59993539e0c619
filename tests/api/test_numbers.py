"""Numbers per query, the nearest rows' derivative, and ties over a boundary between parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import memokern
from memokern import TrainingSet
from tests import cases, harness


@pytest.fixture(params=harness.ON_CPU, autouse=True)
def backend(request):
    with harness.preferred(request.param):
        yield request.param


def normal(*shape, seed=0, dtype=torch.float64):
    return cases.normal(*shape, seed=seed, dtype=dtype)


@pytest.mark.parametrize(
    "sigma",
    [np.float32(0.5), np.array(0.5), np.full(3, 0.5), torch.full((3, 1), 0.5), torch.tensor([0.5])],
    ids=["float32", "array", "array-3", "tensor-3x1", "tensor-1"],
)
@pytest.mark.one_of(2)
def test_numbers_per_query_may_be_anybodys(sigma, backend):
    if backend == "triton" and not isinstance(sigma, torch.Tensor):
        pytest.skip("interpreted kernels: of what becomes the same tensors one is enough")
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


@pytest.mark.parametrize("power", [1020, 520, -540, -1000])
def test_distances_whose_squares_float64_cannot_hold(power, tmp_path):
    """Rows, distances and gradients are those of other units, with an index, or from a file too."""
    unit, k = 2.0**power, 6
    rows = normal(200, 3, seed=1)
    x = rows[:5] + 0.3 * normal(5, 3, seed=2)
    x[4] = rows[4]

    def answer(x, data):
        x = x.clone().requires_grad_()
        found = memokern.nearest(x, data, k)
        (grad,) = torch.autograd.grad(found.distance.sum(), x)
        assert torch.equal(memokern.nearest(x.detach(), data, k).distance, found.distance)
        return found.distance.detach(), found.index, grad

    want = answer(x, rows)
    TrainingSet(rows * unit).save(tmp_path / "rows.safetensors")
    for data in (
        rows * unit,
        TrainingSet(rows * unit),
        TrainingSet(rows, scale=unit),
        memokern.StreamedSet(tmp_path / "rows.safetensors", chunk_bytes=1536),
    ):
        distance, index, grad = answer(x * unit, data)
        assert torch.equal(index, want[1]), data
        torch.testing.assert_close(distance / unit, want[0], rtol=1e-15, atol=0)
        torch.testing.assert_close(grad, want[2])


def test_distances_of_all_sizes_beside_each_other():
    rows = torch.tensor([0.0, 3e-200, 1e-200, 1.0, 3e200, -2e200, 1e300], dtype=torch.float64)
    x = torch.tensor([0.0, 1e200, 2.5e-200], dtype=torch.float64)[:, None]
    got = memokern.nearest(x, rows[:, None], 7)
    order = [[0, 2, 1, 3, 5, 4, 6], [0, 1, 2, 3, 4, 5, 6], [1, 2, 0, 3, 5, 4, 6]]
    assert got.index.tolist() == order
    want = (x - rows[got.index]).abs()
    torch.testing.assert_close(got.distance, want, rtol=1e-15, atol=0)
    # Float32 rows, and queries that they are far from.
    near = memokern.nearest(x[1:2], torch.tensor([[1.0], [3e38]]), 2)
    assert near.distance.tolist() == [[1e200, 1e200]] and near.index.tolist() == [[0, 1]]


@pytest.mark.parametrize("sigma", [0.0, 1e-200, 1e-30, 1e-7])
def test_ties_over_a_boundary_share_by_their_bias(sigma, backend):
    """1e-30: the squared distance is so large a part of the logit that a bias would be lost beside
    it. In float32 the sweep takes it for 0."""
    rows, x, bias = normal(13, 5, seed=1).float(), normal(2, 5).float(), normal(13, seed=3)
    rows[9] = rows[2]
    x[0] = rows[2] + 0.01
    parts = [
        memokern.posterior_state(x, rows[at], sigma, bias=bias[at])
        for at in (slice(0, 6), slice(6, None))
    ]
    got = memokern.merge(*parts).posterior()
    want = memokern.posterior(x, rows, sigma, bias=bias)
    for name in ("mean", "mean_bias", "weight_sq", "ess"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name))
    assert 1.0 < float(want.ess[0]) <= 2.0
