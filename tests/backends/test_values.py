"""The value of a stored row has one definition: the number that a training set shows. Copies of
rows are at distance 0 wherever a row is evaluated, whatever its type, its scale and its shift."""

from __future__ import annotations

import pytest
import torch

from memokern import TrainingSet, memorization, nearest
from memokern.calls import RowLists, Rows
from tests import cases, harness, oracle
from tests.cases import BF16, F16, F32, F64, U8
from tests.harness import every_backend

# uint8 images, digits, pixels as they are, a small unit far from zero; other types with a scale.
UNITS = [
    (U8, 2 / 255, -1.0), (U8, 0.125, -1.0), (U8, 1.0, 0.0), (U8, 0.01, 55.0),
    (F32, 0.01, 100.0), (BF16, 0.3, 0.7), (F16, -0.3, 0.0), (F64, 0.3, 0.7),
]  # fmt: skip
units = pytest.mark.parametrize(
    ("dtype", "scale", "shift"), UNITS, ids=[f"{cases.name_of(t)}-{s:.3g}-{h}" for t, s, h in UNITS]
)


def stored(n: int, d: int, dtype: torch.dtype, scale: float, shift: float) -> Rows:
    if dtype == U8:
        g = torch.Generator().manual_seed(n)
        return Rows(torch.randint(0, 256, (n, d), dtype=U8, generator=g), scale, shift)
    data = cases.normal(n, d, seed=n) - (shift / scale if dtype == F32 else 0)
    return Rows(data.to(dtype), scale, shift)


@units
@every_backend
@pytest.mark.parametrize("d", [3, 40])
def test_copies_are_at_distance_0(backend, dtype, scale, shift, d):
    rows = stored(20, d, dtype, scale, shift)
    rows = cases.with_norms(rows) if d == 40 else rows
    shown = TrainingSet(rows.data, scale=scale, shift=shift)[:3]
    assert torch.equal(shown.to(F64), oracle.values(rows)[:3])
    for x in (shown, shown.to(F64)):
        if harness.refusal(backend, "nearest", x, rows) is not None:
            continue
        sq, index = harness.nearest(backend, x, rows, 2)
        assert sq[:, 0].tolist() == [0.0] * 3 and index[:, 0].tolist() == [0, 1, 2]
        want, _ = oracle.nearest(x, rows, 2)
        torch.testing.assert_close(sq, want, rtol=1e-11, atol=0)
        query = cases.query_of(x, 0.0)
        lists = RowLists(torch.arange(4) * 20, torch.arange(20).repeat(3))
        for found in (
            harness.posterior(backend, query, rows), harness.listed(backend, query, rows, lists)
        ):  # fmt: skip
            assert found.log_z.tolist() == [0.0] * 3  # at distance 0 the logit is the bias
            torch.testing.assert_close(found.mean, x, rtol=3e-7, atol=3e-7)


@units
@every_backend
@pytest.mark.parametrize("d", [5, 40])
def test_a_scale_and_a_shift_that_cancel_cost_no_digits(backend, dtype, scale, shift, d):
    """Raw numbers of 1e4 for values of 0.01: the mean errs by 1e-5 of the rows' largest value."""
    rows = stored(60, d, dtype, scale, shift)
    y = oracle.values(rows)
    spread = y.std()
    for b in (2, 9):
        x = (y[:b] + spread * cases.normal(b, d, seed=2)).to(F64 if dtype == F64 else F32)
        if harness.refusal(backend, "posterior", x, rows) is not None:
            continue
        if backend == "triton" and (b > 2 or d > 5 or dtype not in (F32, U8)):
            continue
        for sigma in (0.3, 3.0):
            query = cases.query_of(x, sigma * float(spread))
            got, want = harness.posterior(backend, query, rows), oracle.sums(query, rows)
            assert (got.mean - want.mean).norm() <= 1e-5 * want.mean.norm()


@pytest.mark.parametrize("method", ["dense", "pruned"])
def test_the_public_functions_agree(method):
    images = TrainingSet(torch.randint(0, 256, (200, 3, 8, 8), dtype=U8)).build_index()
    assert nearest(images[:9], images, method=method).distance.tolist() == [[0.0]] * 9
    twice = images.subset(torch.arange(200).repeat(2))
    assert memorization.collapse(images[:5], twice, tol=1e-9, method="dense").fraction == 1.0


@harness.plain_backends
def test_the_gradient_of_a_distance_is_that_of_the_values(backend):
    rows = stored(12, 4, U8, 2 / 255, -1.0)
    x = oracle.values(rows)[:2].to(F32).requires_grad_()
    if harness.device_of(backend).type != "cpu":
        pytest.skip("its tensors do not lie on the CPU")
    with harness.preferred(backend):
        found = nearest(x, TrainingSet(rows.data), k=2).distance.square()
    (grad,) = torch.autograd.grad(found[:, 0].sum(), x)
    assert not grad.any()
