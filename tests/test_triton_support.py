"""Sums over lists of rows by Triton, and their gradient: against the formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import F32, F64, Flat, column, cpu, far, make
from support_cases import lists, on_lists
from triton_interpreter import DEVICE

pytest.importorskip("triton")

from memokern.calls import Query, RowLists, Rows

triton = Flat("triton")

ROW_TYPES = [F32, torch.bfloat16, torch.float16, torch.uint8]


def on_device(args):
    return [v.to(DEVICE) if isinstance(v, torch.Tensor) else v for v in args]


def sums(*args):
    return [v.cpu() for v in triton.posterior_listed(*on_device(args))]


def backward(*args):
    return [v.cpu() for v in triton.posterior_listed_backward(*on_device(args))]


@pytest.mark.parametrize("dtype", ROW_TYPES)
@pytest.mark.parametrize("biased", [False, True])
def test_sums_and_their_gradient(dtype: torch.dtype, biased: bool) -> None:
    bias = torch.randn(150, dtype=F64, generator=torch.Generator().manual_seed(3))
    bias[5] = -math.inf
    bias = bias if biased else None
    for b, d, sigma, alpha in ((1, 3, 0.5, 1.0), (9, 33, 2.0, -0.6), (2, 700, 0.05, 0.0)):
        x, rows, scale, shift = make(b, 150, d, dtype, sigma, alpha=alpha)
        how = [column(v, b) for v in (sigma, alpha, 1.3)]
        start, index = lists(150, b, d)
        rest = (start, index, scale, shift)
        leaves = [v.to(F64).requires_grad_() for v in (x, *how)]
        with_grad = None if bias is None else bias.clone().requires_grad_()
        want = on_lists(leaves[0], rows, *leaves[1:], with_grad, *rest)
        got = sums(x, rows, *how, bias, *rest)
        assert got[0].dtype == F32
        # All in float64; the mean is then rounded to float32. The oracle's own logits are rounded
        # too: 4 units in their last place.
        rounding = 9e-16 * want[2].abs().max().item()
        for i, (a, e) in enumerate(zip(got, want, strict=True)):
            tol = 1e-12 + rounding + (6e-8 if i == 0 else 0)
            assert (a.to(F64) - e).abs().max() <= tol * (1 + e.abs().max()), (i, b, d)
        g = torch.Generator().manual_seed(b)
        grads = [torch.randn(v.shape, dtype=v.dtype, generator=g) for v in got]
        back = backward(x, rows, *how, bias, start, index, *got, *grads, scale, shift)
        total = sum((v * u).sum() for v, u in zip(want, grads, strict=True))
        leaves += [] if with_grad is None else [with_grad]
        truth = torch.autograd.grad(total, leaves)
        for i, (a, e) in enumerate(zip(back, truth, strict=biased)):
            tol = 1e-10 + rounding + (6e-8 if i == 0 else 0)
            assert (a.to(F64) - e).abs().max() <= tol * (1 + e.abs().max()), (i, b, d)
        assert back[4].shape == ((150,) if biased else (0,))


def test_far_offsets() -> None:
    x, rows, *units = make(2, 4, 70, torch.uint8, 0.5)
    how = [column(v, 2) for v in (0.5, 0.9, 1.1)]
    lists = (torch.tensor([0, 2, 4]), torch.tensor([0, 3, 1, 3]))
    results = []
    for stored in (rows, far(rows, DEVICE)):
        got = sums(x, stored, *how, None, *lists, *units)
        results.append([*got, *backward(x, stored, *how, None, *lists, *got, *got, *units)])
    assert all(torch.equal(a, e) for a, e in zip(*results, strict=True))


def test_exact_hits_ties_limits_and_lost_queries() -> None:
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [5.0, 5.0]])
    x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [math.nan, 0.0], [0.0, 0.0]])
    start, index = torch.tensor([0, 3, 6, 8, 8]), torch.tensor([0, 1, 2, 0, 1, 2, 0, 3])
    bias = torch.tensor([0.0, 0.0, math.log(3), 0.0], dtype=F64)
    how = (torch.tensor([1e-5, 0.0, 1.0, 1.0], dtype=F64), column(1.0, 4), column(1.0, 4))
    got = sums(x, rows, *how, bias, start, index, 1.0, 0.0)
    assert torch.equal(got[0][:2], rows[[1, 1]]) and bool(got[0][2:].isnan().all())
    assert abs(got[1][0].item() - math.log(4)) < 1e-15 and got[1][3].item() == -math.inf
    assert got[1][1].item() == got[2][1].item() == -math.inf and got[1][2].isnan()
    torch.testing.assert_close(got[4][:2], column(0.0625 + 0.5625, 2))  # 1/4 and 3/4
    ones = [torch.ones_like(v) for v in got]
    back = backward(x, rows, *how, bias, start, index, *got, *ones, 1.0, 0.0)
    want = cpu.posterior_listed_backward(x, rows, *how, bias, start, index, *got, *ones, 1.0, 0.0)
    assert torch.equal(back[0][1], torch.zeros(2)) and back[1][1].item() == 0
    assert bool(back[0][2].isnan().all()) and bool(back[4][[0, 3]].isnan().all())
    for a, e in zip(back[:4], want[:4], strict=True):
        torch.testing.assert_close(a[:2], e[:2])
    torch.testing.assert_close(back[4][1:3], want[4][1:3])


def test_long_lists_in_parts_and_blocks() -> None:
    """More rows than a block of the weights' kernel holds, and sums in parts."""
    x, rows, scale, shift = make(2, 1300, 20, torch.uint8, 2.0)
    how = [column(v, 2) for v in (30.0, 0.9, 1.3)]
    start = torch.tensor([0, 1300, 1300 + 700])
    index = torch.cat([torch.arange(1300), torch.arange(300, 1000)])
    got = sums(x, rows, *how, None, start, index, scale, shift)
    want = on_lists(x, rows, *how, None, start, index, scale, shift)
    for i, (a, e) in enumerate(zip(got, want, strict=True)):
        tol = 1e-12 + 9e-16 * want[2].abs().max().item() + (6e-8 if i == 0 else 0)
        assert (a.to(F64) - e).abs().max() <= tol * (1 + e.abs().max())


def test_no_queries_and_empty_lists() -> None:
    x, rows, *_ = make(2, 10, 4, F32, 1.0)
    how = [column(1.0, 2) for _ in range(3)]
    none = torch.zeros(0, dtype=torch.int64)
    got = sums(x, rows, *how, None, torch.zeros(3, dtype=torch.int64), none, 1.0, 0.0)
    assert got[0].isnan().all() and (got[1] == -math.inf).all()
    got = sums(x[:0], rows, *(v[:0] for v in how), None, none.new_zeros(1), none, 1.0, 0.0)
    assert got[0].shape == (0, 4) and all(v.shape == (0,) for v in got[1:])
    back = backward(x[:0], rows, *(v[:0] for v in how), None, none.new_zeros(1), none, *got, *got,
                    1.0, 0.0)  # fmt: skip
    assert back[0].shape == (0, 4) and back[4].shape == (0,)


def test_arguments_are_checked() -> None:
    x, rows, *_ = make(2, 10, 4, F64, 1.0, x_dtype=F64)
    how = [column(1.0, 2) for _ in range(3)]
    args = (torch.tensor([0, 2, 4]), torch.tensor([0, 1, 2, 3]), 1.0, 0.0)
    with pytest.raises(TypeError, match="take float32 queries and rows of"):
        sums(x, rows, *how, None, *args)
    log = Query(x.to(F32), *how, weighting="log")
    with pytest.raises(ValueError, match="has the weighting \"gaussian\" only, not 'log'"):
        triton.backend.posterior_listed(log, Rows(rows.to(F32)), RowLists(*args[:2]))
    for start, index in (([0, 2, 1], [0]), ([0, 1, 2], [0, 10]), ([0, 1, 2], [0, -1])):
        with pytest.raises(ValueError, match="start must go from 0"):
            sums(x.to(F32), rows.to(F32), *how, None, torch.tensor(start), torch.tensor(index),
                 1.0, 0.0)  # fmt: skip
    with pytest.raises(ValueError, match=r"sigma must have shape \[2\]"):
        sums(x.to(F32), rows.to(F32), how[0][:1], *how[1:], None, *args)
