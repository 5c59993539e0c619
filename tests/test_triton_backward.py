"""The gradients of Triton's kernels against autograd through the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import F32, F64, Flat, column, cpu, far, gradients, make
from test_triton_posterior import ROW_TYPES, on_device, run, triton
from triton_interpreter import DEVICE

pytest.importorskip("triton")

from memokern import ops
from memokern.backends.protocol import Call, choose
from memokern.backends.triton.core import machine
from memokern.backends.triton.posterior import planner
from memokern.calls import Query, Rows
from memokern.util import env

reference = Flat("reference")


def backward(x, rows, columns, bias, got, grads, scale=1.0, shift=0.0, kernel="gaussian"):
    args = on_device(x, rows, *columns, bias, None, None, *got, *grads)
    return [v.cpu() for v in triton.posterior_backward(*args, scale, shift, kernel)]


def random_like(values, seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(v.shape, dtype=v.dtype, generator=g) for v in values]


def cases():
    """B, D, sigma, alpha and the bias of 30 rows: one of them left out, or none at all."""
    bias = torch.randn(30, dtype=F64, generator=torch.Generator().manual_seed(3))
    bias[5] = -math.inf
    return (1, 3, 0.5, 1.0, None), (3, 33, 2.0, -0.6, bias), (2, 300, 0.02, 1.0, bias)


@pytest.mark.parametrize("kernel", ["gaussian", "log"])
@pytest.mark.parametrize("dtype", ROW_TYPES)
def test_backward(dtype: torch.dtype, kernel: str) -> None:
    for b, d, sigma, alpha, with_bias in cases():
        x, rows, scale, shift = make(b, 30, d, dtype, sigma, alpha=alpha)
        got, columns = run(x, rows, sigma, alpha, 1.3, with_bias, scale, shift, kernel)
        grads = random_like(got, b)
        back = backward(x, rows, columns, with_bias, got, grads, scale, shift, kernel)
        want = gradients(x, rows, *columns, with_bias, scale, shift, kernel, grads)
        assert back[0].dtype == F32 and all(v.dtype == F64 for v in back[1:])
        assert back[4].shape == ((0,) if with_bias is None else (30,))
        for a, e in zip(back, want, strict=False):
            # As for the CPU's kernels: float32 carries mean and products, 1e-4 of the largest
            # gradient of the kind; the oracle subtracts logits.
            tol = 1e-4 * (e.abs().max().item() + 1e-2)
            tol += 4 * 2.2e-16 * got[2].abs().max().item()
            assert (a.to(F64) - e).abs().max().item() <= tol, (kernel, b, d, sigma)


@pytest.mark.parametrize("d", [5, 300])
def test_far_offsets(d: int) -> None:
    x, rows, *units = make(2, 4, d, torch.uint8, 0.5)
    got, columns = run(x, rows, 0.5, 0.9, 1.1, None, *units)
    want, found = (
        backward(x, stored, columns, None, got, got, *units) for stored in (rows, far(rows, DEVICE))
    )
    assert all(torch.equal(a, e) for a, e in zip(found, want, strict=True))


def test_several_blocks_and_chunks(monkeypatch) -> None:
    """Two blocks of queries, chunks and parts; the bias's sums run over all of them."""
    x, rows, _, _ = make(18, 300, 20, torch.bfloat16, 3.0)
    monkeypatch.setattr(planner, "FEW_QUERIES", 18)  # low tiles: 16 queries, then the last two
    bias = torch.linspace(-1, 1, 300, dtype=F64)
    got, columns = run(x, rows, 3.0, bias=bias)
    grads = random_like(got, 1)
    monkeypatch.setattr(planner, "WORKSPACE", 1)
    monkeypatch.setattr(machine, "of", lambda _: machine.Machine(4, 1 << 15))
    back = backward(x, rows, columns, bias, got, grads)
    want = gradients(x, rows, *columns, bias, 1.0, 0.0, "gaussian", grads)
    for a, e in zip(back, want, strict=True):
        assert (a.to(F64) - e).abs().max() <= 1e-4 * (e.abs().max() + 1e-2)


def test_at_the_limit() -> None:
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    x = torch.tensor([[0.9, 0.1], [0.9, 0.1], [math.nan, 0.0]])
    bias = torch.tensor([0.0, 0.0, math.log(3)], dtype=F64)
    got, columns = run(x[:1], rows, 0.0, bias=bias)
    one, zero = torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)
    grads = [torch.ones(1, 2), one, one, zero, one]
    back = backward(x[:1], rows, columns, bias, got, grads)
    assert torch.equal(back[0], torch.zeros(1, 2)) and back[1].item() == 0 and back[2].item() == 0
    w = torch.tensor([0.25, 0.75], dtype=F64)  # the tie: d sum w^2 / d b_n = 2 w_n (w_n - sum w^2)
    torch.testing.assert_close(back[4][1:], 2 * w * (w - w.square().sum()))
    assert back[4][0].item() == 0
    # A query that is not finite has no gradient, and its neighbours theirs.
    got, columns = run(x, rows, 0.5)
    back = backward(x, rows, columns, None, got, [torch.ones_like(v) for v in got])
    assert torch.isnan(back[0][2]).all() and all(torch.isnan(v[2]) for v in back[1:4])
    assert torch.isfinite(back[0][:2]).all() and torch.equal(back[0][0], back[0][1])


@pytest.mark.parametrize("kernel", ["gaussian", "log"])
@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_exact_hits(kernel: str, sigma: float) -> None:
    """Where log_z is finite at sigma = 0, and infinite in the log kernel: as the CPU's kernels."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(9, 4, generator=g)
    rows[5] = rows[2]
    x, bias = rows[2:3].clone(), torch.randn(9, dtype=F64, generator=g)
    got, columns = run(x, rows, sigma, temperature=1.3, bias=bias, kernel=kernel)
    grads = random_like(got, 2)
    args = (x, rows, *columns, bias, None, None, *got, *grads, 1.0, 0.0, kernel)
    want = cpu.posterior_backward(*args)
    back = backward(x, rows, columns, bias, got, grads, kernel=kernel)
    for a, e in zip(back, want, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel,sigma", [("log", 1.0), ("gaussian", 1e-6)])
def test_beside_a_row(kernel: str, sigma: float) -> None:
    """r = 1e-6: the gradient is made of differences that float32 sums would cancel."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 40, generator=g)
    x = (rows[:2].double() + 1e-6 * torch.randn(2, 40, dtype=F64, generator=g)).float()
    got, columns = run(x, rows, sigma, kernel=kernel)
    grads = random_like(got, 0)
    back = backward(x, rows, columns, None, got, grads, kernel=kernel)
    want = gradients(x, rows, *columns, None, 1.0, 0.0, kernel, grads)
    # <g, y - mean> has the rounding of the mean, which is float32; where the logits are linear in
    # r^2 it drops out.
    rounded = 2**-24 * grads[0].norm() * got[0].norm() if kernel == "log" else 0.0
    for a, e in zip(back[:3], want, strict=False):
        assert (a.double() - e).abs().max() <= (1e-6 + rounded) * e.abs().max() + 1e-9


def backward_rows(x, rows, columns, bias, grads, kernel="gaussian", scale=1.0, shift=0.0):
    args = on_device(x, rows, *columns, bias, None)
    grads = on_device(*grads)
    return triton.posterior_backward_rows(*args, grads, scale, shift, kernel).cpu()


def want_rows(x, rows, columns, bias, grads, kernel="gaussian", scale=1.0, shift=0.0):
    """The reference's, in float64."""
    return reference.posterior_backward_rows(
        x.to(F64), rows.to(F64), *columns, bias, None, grads, scale, shift, kernel
    )


@pytest.mark.parametrize("kernel", ["gaussian", "log"])
@pytest.mark.parametrize("dtype", ROW_TYPES[:3])
def test_rows(dtype: torch.dtype, kernel: str) -> None:
    for b, d, sigma, alpha, with_bias in cases():
        x, rows, _, _ = make(b, 30, d, dtype, sigma, alpha=alpha)
        columns = [column(v, b) for v in (sigma, alpha, 1.3)]
        grads = random_like([x, *columns, columns[0]], b)
        got = backward_rows(x, rows, columns, with_bias, grads, kernel)
        want = want_rows(x, rows, columns, with_bias, grads, kernel)
        assert got.dtype == dtype and got.shape == rows.shape
        # As for the other gradients, and what a row's own type rounds.
        largest = want.abs().max().item()
        tol = 1e-4 * largest + torch.finfo(dtype).eps * want.abs()
        assert ((got.to(F64) - want).abs() <= tol).all(), (kernel, b, d, sigma)


def test_rows_in_blocks_and_chunks(monkeypatch) -> None:
    """Two blocks of queries, chunks and parts; a unit; rows with a stride."""
    x, rows, _, _ = make(17, 270, 20, torch.float16, 3.0)
    rows = torch.cat([rows, rows], 1)[:, 7:27]
    columns = [column(v, 17) for v in (3.0, 0.8, 1.0)]
    grads = random_like([x, *columns, columns[0]], 1)
    monkeypatch.setattr(planner, "FEW_QUERIES", 17)
    monkeypatch.setattr(planner, "WORKSPACE", 1)
    monkeypatch.setattr(machine, "of", lambda _: machine.Machine(4, 1 << 15))
    got = backward_rows(x, rows, columns, None, grads, scale=0.7, shift=0.2)
    want = want_rows(x, rows, columns, None, grads, scale=0.7, shift=0.2)
    assert (got.to(F64) - want).abs().max() <= 1e-3 * want.abs().max()


@pytest.mark.parametrize("kernel,sigma", [("log", 1.0), ("gaussian", 1e-6)])
def test_rows_beside_a_query(kernel: str, sigma: float) -> None:
    """r = 1e-6, and an alpha that float32 does not hold: nothing may cancel."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 40, generator=g)
    alpha = 0.9 if kernel == "gaussian" else 1.0
    x = alpha * rows[:2].double() + 1e-6 * torch.randn(2, 40, dtype=F64, generator=g)
    x = x.float()
    columns = [column(v, 2) for v in (sigma, alpha, 1.0)]
    grads = random_like([x, *columns, columns[0]], 0)
    got = backward_rows(x, rows, columns, None, grads, kernel).double()
    want = want_rows(x, rows, columns, None, grads, kernel)
    for n in range(2):
        assert (got[n] - want[n]).abs().max() <= 1e-6 * want[n].abs().max()


def test_rows_follow_the_mean_alone() -> None:
    """One row has all the weight: what is left is g, and not what the mean's rounding does to it,
    which x - alpha y over sigma^2 would make large."""
    g = torch.Generator().manual_seed(0)
    rows = 10 + torch.randn(20, 300, generator=g)
    sigma = 1e-3
    x = (rows[3:4].double() + sigma * torch.randn(1, 300, dtype=F64, generator=g)).float()
    columns = [column(v, 1) for v in (sigma, 1.0, 1.0)]
    zero = torch.zeros(1, dtype=F64)
    grads = [torch.randn(1, 300, generator=g), zero, zero, zero, zero]
    got = backward_rows(x, rows, columns, None, grads)
    assert (got[3] - grads[0][0]).abs().max() <= 1e-4 * grads[0].abs().max()


@pytest.mark.parametrize("kernel,sigma", [("gaussian", 0.0), ("gaussian", 1.0), ("log", 1.0)])
def test_rows_of_exact_hits(kernel: str, sigma: float) -> None:
    """At a limit ties share g by their weights, and nothing else moves."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(9, 4, generator=g)
    rows[5] = rows[2]
    x = torch.cat([rows[2:3], rows[2:3] + 0.1, rows[2:3]])
    bias = torch.randn(9, dtype=F64, generator=g)
    columns = [column(v, 3) for v in (sigma, 1.0, 1.3)]
    grads = random_like([x, *columns, columns[0]], 2)
    if kernel == "log":  # log_z is infinite, and so is its gradient in the reference
        for v in grads[1:3]:
            v[::2] = 0
    got = backward_rows(x, rows, columns, bias, grads, kernel)
    want = want_rows(x, rows, columns, bias, grads, kernel)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(got, backward_rows(x, rows, columns, bias, grads, kernel))
    x[0] = math.nan
    assert torch.isnan(backward_rows(x, rows, columns, bias, grads, kernel)).all()


def test_through_the_operation(monkeypatch) -> None:
    """The registered operation, float32, all inputs."""
    monkeypatch.setenv(env.BACKEND, "triton")
    assert choose("posterior", Call(DEVICE.type, F32, F32, 2, 12, 5)) is triton.backend
    x, rows, _, _ = make(2, 12, 5, F32, 0.7)
    columns = [column(v, 2) for v in (0.7, 0.9, 1.2)]
    bias = torch.linspace(-1, 1, 12, dtype=F64)
    leaves = [v.to(DEVICE).requires_grad_() for v in (x, rows, *columns, bias)]
    x, rows, *rest = leaves
    out = ops.posterior(Query(x, *rest), Rows(rows))
    weights = random_like([v.cpu() for v in out], 4)
    total = sum((v * w.to(DEVICE)).sum() for v, w in zip(out, weights, strict=True))
    got = torch.autograd.grad(total, leaves)
    monkeypatch.setenv(env.BACKEND, "reference")
    x, rows, *rest = leaves
    out = ops.posterior(Query(x, *rest), Rows(rows))
    total = sum((v * w.to(DEVICE)).sum() for v, w in zip(out, weights, strict=True))
    for a, e in zip(got, torch.autograd.grad(total, leaves), strict=True):
        assert (a - e).abs().max() <= 1e-4 * (e.abs().max() + 1e-2)
