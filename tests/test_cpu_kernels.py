"""The compiled kernels against an oracle in float64 that shares nothing with them."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from torch import Tensor

cpu = pytest.importorskip("memokern.backends.cpu")
if cpu.unavailable() is not None:
    pytest.skip(cpu.unavailable(), allow_module_level=True)

F32, F64 = torch.float32, torch.float64
ROW_TYPES = [F64, F32, torch.bfloat16, torch.float16, torch.uint8]
TAILS = [1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63]
# Relative to the largest |y|: the float32 kernels' contract; float64 with room for 2^10 sums.
MEAN_TOL = {F32: 1e-5, F64: 1e-12}


def column(value: float, b: int) -> Tensor:
    return torch.full((b,), value, dtype=F64)


def make(b: int, n: int, d: int, dtype: torch.dtype, sigma: float, *, alpha: float = 1.0,
         x_dtype: torch.dtype = F32,
         seed: int = 0, offset: float = 0.0, repeat: float | None = None):  # fmt: skip
    """Rows, their scale and shift, and queries alpha y + sigma z around some of them."""
    g = torch.Generator().manual_seed(seed)
    scale, shift = (2 / 255, -1.0) if dtype == torch.uint8 else (1.0, 0.0)
    if dtype == torch.uint8:
        rows = torch.randint(0, 256, (n, d), dtype=dtype, generator=g)
    else:
        rows = torch.randn(n, d, dtype=F64, generator=g) + offset
        if repeat is not None:  # near-duplicates of the first row
            rows[n // 2 :] = rows[0] + repeat * torch.randn(n - n // 2, d, dtype=F64, generator=g)
        rows = rows.to(dtype)
    y = rows.to(F64) * scale + shift
    pick = torch.arange(b) % n
    x = (alpha * y[pick] + sigma * torch.randn(b, d, dtype=F64, generator=g)).to(x_dtype)
    return x, rows, scale, shift


def oracle(x, rows, sigma, alpha, temperature, bias, scale, shift, kernel):
    """The formulas, densely, by direct differences; sigma > 0 and no exact hits."""
    b = torch.zeros(rows.shape[0], dtype=F64) if bias is None else bias
    kept = torch.isfinite(b)
    y, b = (rows.to(F64) * scale + shift)[kept], b[kept]
    xd = x.to(F64)
    r2 = torch.stack([(xd - alpha[:, None] * row).square().sum(1) for row in y], 1)
    d = x.shape[1]
    if kernel == "gaussian":
        logit = -r2 / (2 * sigma[:, None] ** 2)
    else:
        logit = -d / 2 * torch.log(r2 / d)
    logit = logit + b
    w = torch.softmax(logit / temperature[:, None], 1)
    log_z = temperature * torch.logsumexp(logit / temperature[:, None], 1)
    return w @ y, log_z, (w * logit).sum(1), (w * b).sum(1), w.square().sum(1)


def compare(got, want, rows, scale, shift, compute):
    largest = (rows.to(F64) * scale + shift).abs().max().item()
    assert all(torch.isfinite(v).all() for v in got)
    tol = MEAN_TOL[compute] * max(largest, 1e-30)
    assert (got[0].to(F64) - want[0]).abs().max().item() <= tol + (1e-12 if compute == F64 else 0)
    # Weights are right to 1e-4 in float32: so are the logarithm of their sum and sum w^2. A mean
    # of logits is off by the logits' own error and by 1e-4 of their spread.
    stat = 1e-4 if compute == F32 else 1e-9
    for a, e in zip(got[1:], want[1:], strict=True):
        assert ((a - e).abs() <= stat * (1 + e.abs())).all(), (a - e).abs().max()


def run(
    x,
    rows,
    sigma,
    alpha=1.0,
    temperature=1.0,
    bias=None,
    scale=1.0,
    shift=0.0,
    kernel="gaussian",
    cached=False,
):
    b = x.shape[0]
    center = sq = None
    if cached:
        y = rows.to(F64) * scale + shift
        center = y.mean(0).to(F64 if rows.dtype == F64 else F32)
        sq = (y - center.to(F64)).square().sum(1)
    columns = [column(v, b) for v in (sigma, alpha, temperature)]
    got = cpu.posterior(x, rows, *columns, bias, center, sq, scale, shift, kernel)
    return got, columns


def check(
    x,
    rows,
    scale,
    shift,
    sigma,
    *,
    alpha=1.0,
    temperature=1.0,
    bias=None,
    kernel="gaussian",
    cached=False,
):
    got, columns = run(x, rows, sigma, alpha, temperature, bias, scale, shift, kernel, cached)
    compute = F64 if F64 in (x.dtype, rows.dtype) else F32
    assert got[0].dtype == x.dtype
    want = oracle(x, rows, *columns, bias, scale, shift, kernel)
    compare(got, want, rows, scale, shift, F32 if x.dtype == F32 else compute)
    return got


@pytest.mark.parametrize("dtype", ROW_TYPES)
@pytest.mark.parametrize("d", TAILS)
def test_tails_of_features(d: int, dtype: torch.dtype) -> None:
    for b, n in ((1, 33), (5, 17), (13, 63)):
        x, rows, scale, shift = make(b, n, d, dtype, 0.5)
        check(x, rows, scale, shift, 0.5, cached=b == 5)


@pytest.mark.parametrize("n", TAILS)
def test_tails_of_rows_and_queries(n: int) -> None:
    for b in (1, 2, 7, 9, 63, 260):
        x, rows, scale, shift = make(b, n, 5, F32, 0.7, seed=n)
        check(x, rows, scale, shift, 0.7)
        x, rows, scale, shift = make(b, n, 5, F64, 0.7, x_dtype=F64, seed=n)
        check(x, rows, scale, shift, 0.7)


@pytest.mark.parametrize("x_dtype", [F32, F64])
@pytest.mark.parametrize("dtype", ROW_TYPES)
@pytest.mark.parametrize("kernel", ["gaussian", "log"])
def test_bias_temperature_alpha(dtype: torch.dtype, x_dtype: torch.dtype, kernel: str) -> None:
    bias = torch.randn(70, dtype=F64, generator=torch.Generator().manual_seed(5))
    bias[::3] = -math.inf
    for b in (3, 40):
        for alpha in (1.0, 0.7, -1.3, 0.0):
            x, rows, scale, shift = make(b, 70, 19, dtype, 0.8, alpha=alpha, x_dtype=x_dtype)
            check(
                x, rows, scale, shift, 0.8, alpha=alpha, temperature=1.7, bias=bias, kernel=kernel
            )


@pytest.mark.parametrize("sigma", [1e-3, 2e-3, 0.01, 0.1, 1.0, 5.0, 80.0, 1e3])
@pytest.mark.parametrize("b", [4, 24])
def test_every_noise_level(sigma: float, b: int) -> None:
    for repeat in (None, sigma / 30):
        x, rows, scale, shift = make(b, 150, 300, F32, sigma, repeat=repeat)
        check(x, rows, scale, shift, sigma, cached=repeat is None)
    x, rows, scale, shift = make(b, 150, 300, F32, sigma, offset=1000.0)
    check(x, rows, scale, shift, sigma)
    x, rows, scale, shift = make(b, 150, 2, F32, sigma)
    check(x, rows, scale, shift, sigma)
    x, rows, scale, shift = make(b, 150, 300, torch.uint8, sigma)
    check(x, rows, scale, shift, sigma)


def test_far_queries_and_mixed_levels() -> None:
    """Every query has its own noise level, and may be far from all rows."""
    x, rows, _, _ = make(40, 120, 33, F32, 1.0)
    x[::2] *= 50
    sigma = torch.logspace(-3, 3, 40, dtype=F64)
    alpha = torch.linspace(0.1, 1, 40, dtype=F64)
    one = torch.ones(40, dtype=F64)
    got = cpu.posterior(x, rows, sigma, alpha, one, None, None, None, 1.0, 0.0, "gaussian")
    compare(
        got, oracle(x, rows, sigma, alpha, one, None, 1.0, 0.0, "gaussian"), rows, 1.0, 0.0, F32
    )


@pytest.mark.parametrize("b,d", [(2, 30), (30, 30), (300, 2)])
def test_identities(b: int, d: int) -> None:
    """Shifted biases shift log Z; duplicated data leave the mean; equal rows weigh the same."""
    x, rows, _, _ = make(b, 50, d, F32, 0.6)
    bias = torch.linspace(-1, 1, 50, dtype=F64)
    first, _ = run(x, rows, 0.6, bias=bias)
    moved, _ = run(x, rows, 0.6, bias=bias + 3)
    torch.testing.assert_close(moved[1], first[1] + 3, rtol=0, atol=1e-5)
    torch.testing.assert_close(moved[0], first[0], rtol=0, atol=1e-5)
    twice, _ = run(x, rows.repeat(2, 1), 0.6, bias=bias.repeat(2))
    torch.testing.assert_close(twice[0], first[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(twice[1], first[1] + math.log(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(twice[4], first[4] / 2, rtol=1e-4, atol=0)


@pytest.mark.parametrize("b", [1, 3, 20])
@pytest.mark.parametrize("d", [1, 2, 40])
def test_limit_of_small_sigma(b: int, d: int) -> None:
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(300, d, generator=g)
    rows[200] = rows[7]
    x = rows[torch.arange(b) + 5] + 1e-3 * torch.randn(b, d, generator=g)
    x[-1] = rows[7]
    bias = torch.zeros(300, dtype=F64)
    bias[200] = math.log(3)
    got, _ = run(x, rows, 0.0, bias=bias)
    r2 = (x[:, None].double() - rows[None].double()).square().sum(-1)
    near = r2.argmin(1)
    torch.testing.assert_close(got[0], rows[near], rtol=1e-6, atol=1e-6)
    hit = r2.amin(1) == 0
    assert hit[-1]
    assert torch.isneginf(got[1][~hit]).all() and torch.isneginf(got[2][~hit]).all()
    torch.testing.assert_close(got[1][-1].item(), math.log(4))
    torch.testing.assert_close(got[3][-1].item(), 0.75 * math.log(3))
    torch.testing.assert_close(got[4][-1].item(), 0.25**2 + 0.75**2)
    # The log kernel gives all weight to an exact hit, whatever sigma.
    got, _ = run(x[-1:], rows, 1.0, bias=bias, kernel="log")
    torch.testing.assert_close(got[0], rows[7:8], rtol=1e-6, atol=1e-6)
    assert got[1].item() == math.inf
    torch.testing.assert_close(got[4].item(), 0.25**2 + 0.75**2)


@pytest.mark.parametrize("b", [3, 30, 200])
@pytest.mark.parametrize("d", [2, 40])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_lost_queries_stay_alone(b: int, d: int, value: float) -> None:
    x, rows, _, _ = make(b, 40, d, F32, 0.5)
    clean, _ = run(x, rows, 0.5)
    dirty = x.clone()
    dirty[1, 1] = value
    got, _ = run(dirty, rows, 0.5)
    keep = torch.arange(b) != 1
    for a, e in zip(got, clean, strict=True):
        assert torch.isnan(a[1]).all()
        assert torch.equal(a[keep], e[keep])
    distance, index = cpu.nearest(dirty, rows, 3, None, None, 1.0, 0.0)
    assert (torch.isnan(distance[1]).all()) if math.isnan(value) else True
    assert torch.isfinite(distance[keep]).all() and (index[keep] < 40).all()


def test_empty_single_and_strided() -> None:
    rows = torch.randn(5, 3)
    got, _ = run(torch.empty(0, 3), rows, 1.0)
    assert got[0].shape == (0, 3) and got[1].shape == (0,)
    assert cpu.nearest(torch.empty(0, 3), rows, 2, None, None, 1.0, 0.0)[0].shape == (0, 2)
    got, _ = run(torch.randn(4, 3), rows[:1], 1.0)
    assert torch.equal(got[0], rows[:1].expand(4, 3))
    wide = torch.randn(50, 40)
    x = torch.randn(7, 12)[:, ::2]
    first, _ = run(x, wide[::2, 3:9], 1.0)
    again, _ = run(x.contiguous(), wide[::2, 3:9].contiguous(), 1.0)
    for a, e in zip(first, again, strict=True):
        assert torch.equal(a, e)


def test_refusals() -> None:
    x, rows = torch.randn(2, 3), torch.randn(4, 3)
    one = column(1.0, 2)
    rest = (None, None, None, 1.0, 0.0, "gaussian")
    with pytest.raises(TypeError, match="int32"):
        cpu.posterior(x, rows.to(torch.int32), one, one, one, *rest)
    with pytest.raises(ValueError, match="contiguous"):
        cpu.posterior(x, torch.randn(3, 4).T, one, one, one, *rest)
    with pytest.raises(ValueError, match="expected x"):
        cpu.posterior(x, torch.randn(4, 5), one, one, one, *rest)
    with pytest.raises(ValueError, match="sigma"):
        cpu.posterior(x, rows, column(1.0, 3), one, one, *rest)
    with pytest.raises(ValueError, match="together"):
        cpu.posterior(x, rows, one, one, one, None, torch.zeros(3), None, 1.0, 0.0, "gaussian")
    with pytest.raises(ValueError, match="between 1"):
        cpu.nearest(x, rows, 5, None, None, 1.0, 0.0)


def test_far_offsets() -> None:
    """Rows more than 2^31 elements apart: one page of rows, seen with a stride of 2^30 elements."""
    stride, n, d = 1 << 30, 4, 5
    memory = torch.empty(stride * (n - 1) + d, dtype=torch.uint8)  # never touched but at the rows
    rows = memory.as_strided((n, d), (stride, 1))
    small = torch.randint(
        0, 256, (n, d), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    rows.copy_(small)
    x = (small[-1:].float() * 2 / 255 - 1) + 0.01
    for b in (1, 20):
        got, _ = run(x.repeat(b, 1), rows, 0.3, scale=2 / 255, shift=-1.0)
        want, _ = run(x.repeat(b, 1), small, 0.3, scale=2 / 255, shift=-1.0)
        assert torch.equal(got[0], want[0])
    assert cpu.nearest(x, rows, 1, None, None, 2 / 255, -1.0)[1].item() == n - 1


@pytest.mark.parametrize("b,d", [(1, 100), (30, 100), (600, 2)])
def test_threads(b: int, d: int) -> None:
    """Same threads, same bits; another number, the same within rounding; many at once."""
    x, rows, _, _ = make(b, 2000, d, F32, 3.0)
    before = torch.get_num_threads()
    try:
        results = {}
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results[threads], _ = run(x, rows, 3.0)
            again, _ = run(x, rows, 3.0)
            assert all(torch.equal(a, e) for a, e in zip(results[threads], again, strict=True))
        for threads in (2, 3):
            for a, e in zip(results[threads], results[1], strict=True):
                torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
        torch.set_num_threads(1)
        outputs: list = [None] * 4

        def work(i: int) -> None:
            torch.set_num_threads(1)
            outputs[i] = run(x, rows, 3.0)[0]

        workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        for out in outputs:
            assert all(torch.equal(a, e) for a, e in zip(out, results[1], strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("b,d", [(3, 40), (300, 3)])
def test_split_of_the_batch(b: int, d: int) -> None:
    """A batch evaluated in two halves gives the same within rounding."""
    x, rows, _, _ = make(b, 500, d, F32, 1.0)
    whole, _ = run(x, rows, 1.0)
    parts = [run(part, rows, 1.0)[0] for part in x.split(b // 2 + 1)]
    for a, e in zip(whole, (torch.cat(p) for p in zip(*parts, strict=True)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def gradients(x, rows, sigma, alpha, temperature, bias, scale, shift, kernel, grads):
    leaves = [v.to(F64).requires_grad_() for v in (x, sigma, alpha, temperature)]
    if bias is not None:
        leaves.append(bias.clone().requires_grad_())
    values = oracle(
        leaves[0], rows, *leaves[1:4], leaves[4] if bias is not None else None, scale, shift, kernel
    )
    total = sum((v * g).sum() for v, g in zip(values, grads, strict=True))
    got = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(v) if g is None else g for g, v in zip(got, leaves, strict=True)]


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


@pytest.mark.parametrize("dtype", ROW_TYPES)
@pytest.mark.parametrize("b", [1, 7, 40])
def test_nearest(dtype: torch.dtype, b: int) -> None:
    for n, d, offset in (
        (1, 1, 0.0),
        (33, 7, 0.0),
        (700, 40, 0.0),
        (700, 40, 500.0),
        (129, 300, 0.0),
    ):
        x, rows, scale, shift = make(b, n, d, dtype, 0.3, offset=offset)
        if n > 20:
            rows[n // 2] = rows[3]  # a tie: the lower index first
            x[0] = (rows[3].to(F64) * scale + shift).to(F32)
        y = rows.to(F64) * scale + shift
        r2 = torch.stack([(q - y).square().sum(1) for q in x.to(F64)])
        for k in {1, min(2, n), min(50, n)}:
            distance, index = cpu.nearest(x, rows, k, None, None, scale, shift)
            value, order = torch.sort(r2, dim=1, stable=True)
            torch.testing.assert_close(distance, value[:, :k], rtol=1e-12, atol=1e-24)
            assert torch.equal(index, order[:, :k])


@pytest.mark.parametrize("double", [False, True])
def test_exponential(double: bool) -> None:
    """The stated bound, on a dense set of arguments of the range that the sweep uses."""
    from memokern import _C

    dtype = F64 if double else F32
    x = torch.cat(
        [torch.linspace(-86.9, 0, 1_000_003, dtype=F64), -torch.logspace(-12, 0, 10_001, dtype=F64)]
    ).to(dtype)
    y = torch.full_like(x, math.nan)
    _C.exp(double, x.data_ptr(), y.data_ptr(), x.numel())
    want = torch.exp(x.to(F64))
    assert ((y.to(F64) - want).abs() / want).max().item() < (1e-15 if double else 2e-7)
    tiny = torch.tensor([-1e4, -math.inf, math.nan], dtype=dtype)
    out = torch.full_like(tiny, 7.0)
    _C.exp(double, tiny.data_ptr(), out.data_ptr(), 3)
    assert out[0] == 0 and out[1] == 0 and torch.isnan(out[2])
