"""Certified pruning in the compiled kernels: the lists against all logits, the sums against lists.

What bound_scan proves is checked literally, in float64, against every row; the sums over a list
against the dense formulas restricted to it, and their gradient against autograd through these.
"""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import F32, F64, ROW_TYPES, column, cpu, make
from support_cases import (
    DIMS,
    EDGES,
    Plain,
    U,
    check_lists,
    lists,
    logits,
    lying_bounds,
    near,
    on_lists,
    scan,
    spread,
)


@pytest.mark.parametrize("half", [True, False], ids=["float16", "float32"])
@pytest.mark.parametrize("kind", ["random", "clustered", "duplicated"])
def test_lists_keep_their_promise(kind: str, half: bool) -> None:
    shapes = [(1, 20, 3), (50, 40, 1), (777, 33, 65), (1300, 48, 17), (1024, 40, 2)]
    for seed, (n, d, b) in enumerate(shapes):
        rows = spread(n, d, seed, kind)
        y = rows.to(F64)
        index = Plain(y, [k for k in DIMS if k < d], EDGES, half, ["pca", "random"][seed % 2])
        bias = torch.randn(n, dtype=F64, generator=torch.Generator().manual_seed(seed)) * 3
        if n > 1:
            bias[:: max(n // 7, 2)] = -math.inf
        few = 0
        for i, sigma in enumerate((1e-3, 0.1, 0.5, 1.0, 3.0, 1e3)):
            alpha, temperature = (1.0, 0.4, 0.0, -0.7)[(i + seed) % 4], (1.0, 0.3, 4.0)[i % 3]
            x = near(rows, b, sigma, alpha, seed, F64 if i % 2 else F32)
            how = (column(sigma, b), column(alpha, b), column(temperature, b))
            for with_bias in (None, bias):
                found = scan(x, rows, index, *how, with_bias, 1.0, 0.0)
                assert bool((found[3] >= 1).all())  # the cap is all rows: none is given up
                check_lists(found, logits(x, y, *how, with_bias), 1e-6)
                few += found[1].numel() < b * n
        assert n == 1 or few >= 4  # small sigma: most rows are dropped


def test_only_what_the_bounds_allow_is_listed() -> None:
    """At small sigma a query's own row is left alone; bounds by every coordinate are exact."""
    rows = spread(1500, 48, 3)
    index = Plain(rows.to(F64), [8, 16, 48], [8, 16, 48], False, "pca")
    for sigma in (0.05, 0.3, 1.0):
        x = near(rows, 40, sigma, 1.0, 5)
        how = (column(sigma, 40), column(1.0, 40), column(1.0, 40))
        _, listed, threshold, _ = scan(x, rows, index, *how, None, 1.0, 0.0)
        # No band is left beyond the last level: what is listed is what is above the threshold,
        # but for the margin 2 (K + nb + 16) u |xc| y_max in <x, y> and the like in the squares.
        t = logits(x, rows.to(F64), *how, None)
        size = 4 * (48 + 90) * 2.0**-24 * (x.norm(dim=1).max().item() + index.y_max + 9) ** 2
        loose = (t > (threshold - size / sigma**2)[:, None]).sum()
        assert len(listed) <= loose


def test_a_bound_that_lies_is_noticed() -> None:
    lying_bounds(400, 30, cpu)


@pytest.mark.parametrize("cap", [20, 200, 2000])
def test_queries_of_any_noise_in_one_batch(cap: int) -> None:
    """Sorted by it, sampled, some given up, the others put together anew: each list keeps its
    promise, and where all rows may be listed nobody is given up."""
    rows = spread(2000, 48, 3)
    index = Plain(rows.to(F64), DIMS, EDGES, True, "pca")
    g = torch.Generator().manual_seed(cap)
    for b in (1, 40, 150):
        sigma = torch.exp(2 * torch.randn(b, dtype=F64, generator=g) - 1)
        x = (near(rows, b, 0.0, 1.0, b, F64) + sigma[:, None] * torch.randn(
            b, 48, dtype=F64, generator=g)).to(F32)  # fmt: skip
        how = (sigma, column(1.0, b), column(1.0, b))
        found = scan(x, rows, index, *how, None, 1.0, 0.0, cap=cap)
        check_lists(found, logits(x, rows.to(F64), *how, None), 1e-6)
        level = found[3]
        if cap == 2000:
            assert bool((level > 0).all())
        elif b == 150:  # the noisiest are given up, the least noisy are not
            assert level[sigma.argmax()] == 0 and level[sigma.argmin()] > 0


def test_given_up() -> None:
    rows = spread(600, 40, 1)
    index = Plain(rows.to(F64), DIMS, EDGES, True, "pca")
    x = near(rows, 9, 0.1, 1.0, 0)
    x[1, 3], x[2, 0] = math.nan, math.inf
    sigma, alpha, temperature = column(0.1, 9), column(1.0, 9), column(1.0, 9)
    sigma[3], alpha[4], temperature[5] = 0.0, math.nan, 0.0
    sigma[6], temperature[7] = 50.0, math.inf
    found = scan(x, rows, index, sigma, alpha, temperature, None, 1.0, 0.0, cap=100)
    start, _, threshold, level = found
    given_up = torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 0], dtype=torch.bool)  # 6: above the cap
    assert torch.equal(level == 0, given_up)
    assert bool((start.diff()[given_up] == 0).all()) and bool(threshold[given_up].isnan().all())
    t = logits(x[[0, 8]], rows.to(F64), *(v[[0, 8]] for v in (sigma, alpha, temperature)), None)
    pick = [*range(int(start[0]), int(start[1])), *range(int(start[8]), int(start[9]))]
    counts = torch.tensor([0, *start.diff()[[0, 8]].tolist()]).cumsum(0)
    check_lists((counts, found[1][pick], threshold[[0, 8]], level[[0, 8]]), t, 1e-6)
    # Lists longer than the buffer of the scan: climbed on the way, then given up.
    many = spread(9000, 24, 2)
    index = Plain(many.to(F64), [8, 12], EDGES, True, "pca")
    x = near(many, 3, 2.0, 1.0, 0)
    how = (column(30.0, 3), column(1.0, 3), column(1.0, 3))
    assert scan(x, many, index, *how, None, 1.0, 0.0, cap=50)[3].tolist() == [0, 0, 0]
    found = scan(x, many, index, *how, None, 1.0, 0.0)
    check_lists(found, logits(x, many.to(F64), *how, None), 1e-6)
    how = (column(1.5, 3), column(1.0, 3), column(1.0, 3))
    check_lists(scan(x, many, index, *how, None, 1.0, 0.0, cap=4000),
                logits(x, many.to(F64), *how, None), 1e-6)  # fmt: skip


def test_no_queries() -> None:
    rows = spread(30, 40, 1)
    index = Plain(rows.to(F64), DIMS, EDGES, True, "pca")
    none = (torch.empty(0, 40), rows), (column(1.0, 0),) * 3
    start, listed, threshold, level = scan(*none[0], index, *none[1], None, 1.0, 0.0)
    assert start.tolist() == [0]
    assert len(listed) == len(threshold) == len(level) == 0
    out = cpu.posterior_listed(*none[0], *none[1], None, start, listed, 1.0, 0.0)
    assert out[0].shape == (0, 40) and all(v.shape == (0,) for v in out[1:])


@pytest.mark.parametrize("b", [1, 5, 65])
def test_scan_threads(b: int) -> None:
    """Parts of rows and blocks of queries: each thread count proves, and two runs are the same."""
    rows = spread(3000, 40, 4)
    index = Plain(rows.to(F64), DIMS, EDGES, True, "pca")
    x = near(rows, b, 1.0, 1.0, 1)
    how = (column(1.0, b), column(1.0, b), column(1.0, b))
    t = logits(x, rows.to(F64), *how, None)
    threads, sums = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found = scan(x, rows, index, *how, None, 1.0, 0.0)
            check_lists(found, t, 1e-6)
            for one, two in zip(found, scan(x, rows, index, *how, None, 1.0, 0.0), strict=True):
                assert torch.equal(one, two)
            sums.append(cpu.posterior_listed(x, rows, *how, None, *found[:2], 1.0, 0.0))
    finally:
        torch.set_num_threads(threads)
    for other in sums[1:]:  # lists may differ by rows that carry 1e-6 of the weight together
        for a, e in zip(other, sums[0], strict=True):
            assert (a - e).abs().max() <= 2e-6 * (1 + e.abs().max())


@pytest.mark.parametrize("dtype", ROW_TYPES)
def test_sums_and_their_gradient(dtype: torch.dtype) -> None:
    x_dtype = F64 if dtype == F64 else F32
    bias = torch.randn(150, dtype=F64, generator=torch.Generator().manual_seed(3))
    bias[5] = -math.inf
    for b, d, sigma, alpha in ((1, 3, 0.5, 1.0), (4, 33, 2.0, 0.6), (40, 17, 1.0, -0.8),
                               (9, 530, 3.0, 1.0), (2, 700, 0.05, 0.0)):  # fmt: skip
        for with_bias in (None, bias):
            x, rows, scale, shift = make(b, 150, d, dtype, sigma, alpha=alpha, x_dtype=x_dtype)
            how = [column(v, b) for v in (sigma, alpha, 1.3)]
            start, index = lists(150, b, d)
            rest = (start, index, scale, shift)
            leaves = [v.to(F64).requires_grad_() for v in (x, *how)]
            with_grad = None if with_bias is None else with_bias.clone().requires_grad_()
            want = on_lists(leaves[0], rows, *leaves[1:], with_grad, *rest)
            got = cpu.posterior_listed(x, rows, *how, with_bias, *rest)
            assert got[0].dtype == x_dtype
            for i, (a, e) in enumerate(zip(got, want, strict=True)):
                # All in float64, whatever x is; the mean is then rounded to its type. The oracle's
                # logits are rounded too: 4 units in their last place.
                tol = 1e-12 + 9e-16 * want[2].abs().max().item()
                tol += 6e-8 if i == 0 and x_dtype == F32 else 0
                assert (a.to(F64) - e).abs().max() <= tol * (1 + e.abs().max()), (i, b, d)
            g = torch.Generator().manual_seed(b)
            grads = [torch.randn(v.shape, dtype=v.dtype, generator=g) for v in got]
            back = cpu.posterior_listed_backward(
                x, rows, *how, with_bias, start, index, *got, *grads, scale, shift
            )
            total = sum((v * u).sum() for v, u in zip(want, grads, strict=True))
            leaves += [] if with_grad is None else [with_grad]
            for i, (a, e) in enumerate(
                zip(back, torch.autograd.grad(total, leaves), strict=with_grad is not None)
            ):
                tol = 1e-10 + 9e-16 * want[2].abs().max().item()
                tol += 6e-8 if i == 0 and x_dtype == F32 else 0
                assert (a.to(F64) - e).abs().max() <= tol * (e.abs().max() + 1), (i, b, d)
            assert back[4].shape == ((0,) if with_bias is None else (150,))


def test_support_exact_hits_ties_and_limits() -> None:
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0], [5.0, 5.0]])
    x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [math.nan, 0.0], [0.0, 0.0]])
    start, index = torch.tensor([0, 3, 6, 8, 8]), torch.tensor([0, 1, 2, 0, 1, 2, 0, 3])
    bias = torch.tensor([0.0, 0.0, math.log(3), 0.0], dtype=F64)
    how = (torch.tensor([1e-5, 0.0, 1.0, 1.0], dtype=F64), column(1.0, 4), column(1.0, 4))
    got = cpu.posterior_listed(x, rows, *how, bias, start, index, 1.0, 0.0)
    assert torch.equal(got[0][:2], rows[[1, 1]]) and bool(got[0][2:].isnan().all())
    assert abs(got[1][0].item() - math.log(4)) < 1e-15 and got[1][3].item() == -math.inf
    torch.testing.assert_close(got[4][:2], column(0.0625 + 0.5625, 2))  # 1/4 and 3/4
    ones = [torch.ones_like(v) for v in got]
    back = cpu.posterior_listed_backward(
        x, rows, *how, bias, start, index, *got, *ones, 1.0, 0.0
    )
    assert torch.equal(back[0][1], torch.zeros(2)) and back[1][1].item() == 0
    assert bool(back[0][2].isnan().all()) and back[4][0].isnan()  # the query that is NaN


def test_support_threads() -> None:
    """One long list in pieces, and many: the pieces are joined as if there were none."""
    for b, dtype in ((1, torch.uint8), (30, F32)):
        x, rows, scale, shift = make(b, 1500, 60, dtype, 2.0)
        how = [column(v, b) for v in (2.0, 0.9, 1.3)]
        bias = torch.randn(1500, dtype=F64, generator=torch.Generator().manual_seed(0))
        start, index = lists(1500, b, 1)
        threads, results = torch.get_num_threads(), []
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                got = cpu.posterior_listed(x, rows, *how, bias, start, index, scale, shift)
                grads = [torch.ones_like(v) for v in got]
                results.append([*got, *cpu.posterior_listed_backward(
                    x, rows, *how, bias, start, index, *got, *grads, scale, shift)])  # fmt: skip
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            for a, e in zip(other, results[0], strict=True):
                tol = 2e-7 if a.dtype == F32 else 1e-12
                assert (a - e).abs().max() <= tol * (1 + e.abs().max())


def test_arguments_are_checked() -> None:
    rows = spread(30, 40, 1)
    index = Plain(rows.to(F64), DIMS, EDGES, True, "pca")
    x, how = rows[:2].clone(), (column(1.0, 2),) * 3
    with pytest.raises(ValueError, match="eps"):
        scan(x, rows, index, *how, None, 1.0, 0.0, eps=0.0)
    with pytest.raises(ValueError, match="coarse must be float32"):
        scan(x, rows, index, *how, None, 1.0, 0.0, coarse=index.coarse.to(F64))
    index.first_band = [0, 1, 2, 9]
    with pytest.raises(ValueError, match="bands"):
        scan(x, rows, index, *how, None, 1.0, 0.0)
    for start, listed in (([0, 2, 1], [0]), ([0, 1, 2], [0, 30]), ([0, 1, 2], [0, -1])):
        with pytest.raises(ValueError, match=r"start|index"):
            cpu.posterior_listed(
                x, rows, *how, None, torch.tensor(start), torch.tensor(listed), 1.0, 0.0
            )


@pytest.mark.parametrize("dtype", ROW_TYPES, ids=str)
@pytest.mark.parametrize("x_dtype", [F32, F64], ids=["float32", "float64"])
def test_the_last_level_is_the_product_of_all_features(
    dtype: torch.dtype, x_dtype: torch.dtype
) -> None:
    """Rows that differ only beyond the ladder, in 3000 features (more than one sum in float, or in
    32 bits, takes), and a threshold in their midst: every row above it is listed, and of those
    below only such as rounding cannot tell from it."""
    n, d, b, eps = 400, 3001, 6, 1e-6
    g = torch.Generator().manual_seed(5)
    values = torch.rand(n, d, dtype=F64, generator=g)
    values[:, :40] = values[:1, :40]
    scale, shift = (2 / 255, -1.0) if dtype == torch.uint8 else (1.0, 0.0)
    rows = (values * 255 if dtype == torch.uint8 else values).to(dtype)
    y = rows.to(F64) * scale + shift
    index = Plain(y, [8, 16], [8, 16], True, "axes")
    x = (y[:b] + 0.01 * torch.randn(b, d, dtype=F64, generator=g)).to(x_dtype)
    typical = torch.stack([(q.to(F64) - y).square().sum(1).median() for q in x])
    sigma = (typical / (2 * math.log(n / eps))).sqrt()
    how = (sigma, column(1.0, b), column(1.0, b))
    found = scan(x, rows, index, *how, None, scale, shift)
    t = logits(x, y, *how, None)
    check_lists(found, t, eps)
    start, listed, threshold, level = found
    # The error of a product (csrc/cpu/scan/full_product-inl.h), and of a bound (bounds-inl.h).
    pad = (shift - index.center).norm() + index.center.norm()
    length = (x.to(F64) - index.center).norm(dim=1)
    error = U * (length * (300 * index.y_max + 4 * pad) + 300 * index.y_max**2)
    if dtype == torch.uint8:  # no sharper than need be: kFullProductError
        error = error + 0.04 * sigma**2 * math.log(n / eps)
    for i in range(b):
        mine = listed[start[i] : start[i + 1]]
        assert 100 < len(mine) < 300 and level[i] > 0
        assert bool((t[i][mine] >= threshold[i] - 2 * error[i] / sigma[i] ** 2).all())
