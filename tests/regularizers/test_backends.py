"""Every regulariser by every backend beside the reference, gradients included."""

from __future__ import annotations

import pytest
import torch

from memokern import TrainingSet
from memokern.regularizers import (
    CovarianceTikhonov,
    EmpiricalBayes,
    GaussianSmoothing,
    NoiseUnconditioned,
    SmoothedBank,
    Temperature,
    Tikhonov,
    evaluate,
    parse,
)
from memokern.util import env
from tests import harness

F32 = torch.float32
REGULARIZERS = [
    None, Tikhonov(0.3), Tikhonov(lambda s: 0.1 * s),
    CovarianceTikhonov(0.2, torch.arange(1.0, 6.0), torch.eye(19)[:5]),
    EmpiricalBayes(-1.5), EmpiricalBayes(-3.0, normalized=True), Temperature(2.0),
    GaussianSmoothing(0.4, 4), SmoothedBank(0.6), NoiseUnconditioned(),
    parse("temperature:sigma_c=0.5+tikhonov:c=1e-2"),
]  # fmt: skip


def predict(name, reg, rows, x, monkeypatch):
    """x0, score, log-potential and the gradient of their sum for x, with the backend named."""
    monkeypatch.setenv(env.BACKEND, name)
    device = harness.device_of(name)
    data = TrainingSet(rows.to(device))
    left_out = torch.arange(len(rows), device=device) % 3 == 0  # as a mask of classes does
    bias = torch.where(left_out, -torch.inf, 0.1)
    at = x.to(device).requires_grad_()
    out = evaluate(at, data, 0.7, 0.8, regularizer=reg, bias=bias)
    potential = out.log_potential
    total = out.x0.square().sum() + (out.score * 0.3).sum()
    (grad,) = torch.autograd.grad(total, at)
    found = [out.x0, out.score, grad, *([] if potential is None else [potential])]
    return [v.detach().cpu() for v in found]


@pytest.mark.parametrize("backend", [n for n in harness.INSTALLED if n != "reference"])
@pytest.mark.parametrize(
    ("reg", "dtype"), [*((r, F32) for r in REGULARIZERS), (REGULARIZERS[-1], torch.uint8)], ids=repr
)
def test_as_the_reference(backend, reg, dtype, monkeypatch) -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(37, 19, generator=g)
    x = 0.8 * rows[:5] + 0.7 * torch.randn(5, 19, generator=g)
    if dtype == torch.uint8:
        rows = (127.5 + 40 * rows).clamp(0, 255).to(dtype)
        x = 0.3 * x
    got = predict(backend, reg, rows, x, monkeypatch)
    want = predict("reference", reg, rows, x.double(), monkeypatch)
    assert len(got) == len(want)
    for a, e in zip(got, want, strict=True):
        # float32 queries: a few roundings of 2^-24 in numbers up to |x| / sigma^2, and their sums.
        torch.testing.assert_close(a.double(), e.double(), rtol=2e-5, atol=2e-5)
