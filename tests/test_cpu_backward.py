"""The gradients of the compiled kernels against autograd through the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import F32, F64, ROW_TYPES, cpu, gradients, make, run


@pytest.mark.parametrize("kernel", ["gaussian", "log"])
@pytest.mark.parametrize("dtype", ROW_TYPES)
def test_backward(dtype: torch.dtype, kernel: str) -> None:
    x_dtype = F64 if dtype == F64 else F32
    bias = torch.randn(90, dtype=F64, generator=torch.Generator().manual_seed(3))
    bias[5] = -math.inf
    for b, d, sigma, alpha in (
        (1, 3, 0.5, 1.0),
        (4, 33, 2.0, 0.6),
        (40, 17, 1.0, -0.8),
        (300, 2, 0.3, 1.0),
        (9, 300, 0.02, 1.0),
    ):
        for with_bias in (None, bias):
            x, rows, scale, shift = make(b, 90, d, dtype, sigma, alpha=alpha, x_dtype=x_dtype)
            got, columns = run(x, rows, sigma, alpha, 1.3, with_bias, scale, shift, kernel)
            g = torch.Generator().manual_seed(b)
            grads = [torch.randn(v.shape, dtype=v.dtype, generator=g) for v in got]
            back = cpu.posterior_backward(
                x, rows, *columns, with_bias, None, None, *got, *grads, scale, shift, kernel
            )
            want = gradients(x, rows, *columns, with_bias, scale, shift, kernel, grads)
            assert back[0].dtype == x.dtype
            assert back[4].shape == ((0,) if with_bias is None else (90,))
            for a, e in zip(back, want, strict=False):
                # float32 carries mean and products: 1e-4 of the largest gradient of the kind. The
                # oracle itself subtracts logits, hence 4 units in the last place of those.
                tol = (1e-4 if x_dtype == F32 else 1e-9) * (e.abs().max().item() + 1e-2)
                tol += 4 * 2.2e-16 * got[2].abs().max().item()
                assert (a.to(F64) - e).abs().max().item() <= tol, (kernel, b, d, sigma)


def test_backward_at_the_limit() -> None:
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    x = torch.tensor([[0.9, 0.1]])
    bias = torch.tensor([0.0, 0.0, math.log(3)], dtype=F64)
    got, columns = run(x, rows, 0.0, bias=bias)
    one, zero = torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)
    back = cpu.posterior_backward(
        x,
        rows,
        *columns,
        bias,
        None,
        None,
        *got,
        torch.ones(1, 2),
        one,
        one,
        zero,
        one,
        1.0,
        0.0,
        "gaussian",
    )
    assert torch.equal(back[0], torch.zeros(1, 2)) and back[1].item() == 0 and back[2].item() == 0
    w = torch.tensor([0.25, 0.75], dtype=F64)  # the tie: d sum w^2 / d b_n = 2 w_n (w_n - sum w^2)
    torch.testing.assert_close(back[4][1:], 2 * w * (w - w.square().sum()))
    assert back[4][0].item() == 0


@pytest.mark.parametrize("b", [1, 12])
@pytest.mark.parametrize("kernel,sigma", [("log", 1.0), ("gaussian", 1e-6)])
def test_backward_beside_a_row(b: int, kernel: str, sigma: float) -> None:
    """r = 1e-6: the gradient is made of differences that float32 sums would cancel."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 40, generator=g)
    x = rows[torch.arange(b)].double() + 1e-6 * torch.randn(b, 40, dtype=F64, generator=g)
    x = x.float()
    got, columns = run(x, rows, sigma, kernel=kernel)
    grads = [torch.randn(v.shape, dtype=v.dtype, generator=g) for v in got]
    rest = (1.0, 0.0, kernel)
    back = cpu.posterior_backward(x, rows, *columns, None, None, None, *got, *grads, *rest)
    want = gradients(x, rows, *columns, None, *rest, grads)
    for a, e in zip(back[:3], want, strict=False):
        assert (a.double() - e).abs().max() <= 1e-6 * e.abs().max() + 1e-9


def test_backward_of_float32_queries_on_float64_rows() -> None:
    """The mean that x's type rounded must not enter: rows are float64, and so is the gradient."""
    x, rows, _, _ = make(9, 60, 40, F64, 3.0)
    bias = torch.linspace(-1, 1, 60, dtype=F64)
    got, columns = run(x, rows, 3.0, bias=bias)
    g = torch.Generator().manual_seed(0)
    grads = [1e3 * torch.randn(got[0].shape, generator=g)]
    grads += [torch.randn(9, dtype=F64, generator=g) for _ in range(4)]
    rest = (1.0, 0.0, "gaussian")
    back = cpu.posterior_backward(x, rows, *columns, bias, None, None, *got, *grads, *rest)
    want = gradients(x, rows, *columns, bias, *rest, grads)
    for a, e in zip(back[1:], want[1:], strict=True):
        assert (a - e).abs().max() <= 1e-10 * e.abs().max()
    assert (back[0].double() - want[0]).abs().max() <= 1e-7 * want[0].abs().max()
