"""The compiled sweep against an oracle in float64 that shares nothing with it."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from kernel_cases import F32, F64, ROW_TYPES, check, column, compare, cpu, make, oracle, run
from torch import Tensor

TAILS = [1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63]


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


@pytest.mark.parametrize("b", [2, 12, 64])
def test_many_rows_with_weight(b: int) -> None:
    """Sums over 50,000 rows: added one by one to a float32 total, they would be off by 2e-5."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(50_000, 2, generator=g)
    x = rows[:b] + 0.7 * torch.randn(b, 2, generator=g)
    got, _ = run(x, rows, 0.7)
    r2 = (x.double()[:, None] - rows.double()).square().sum(-1)
    want = torch.softmax(-r2 / (2 * 0.7**2), 1) @ rows.double()
    assert (got[0].double() - want).abs().max().item() <= 5e-6 * want.abs().max().item()


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


@pytest.mark.parametrize("b", [1, 12, 64])
@pytest.mark.parametrize("d", [2, 40])
def test_far_rows_and_queries(b: int, d: int) -> None:
    """Squares that overflow in float32: exact distances decide, and nothing becomes NaN."""
    rows = torch.randn(50, d, generator=torch.Generator().manual_seed(0))
    rows[7] = 1e25
    rows[11] = -1e25
    x = torch.full((b, d), 1e25)
    got, _ = run(x, rows, 1e23)
    assert torch.equal(got[0], rows[7:8].expand(b, d))
    torch.testing.assert_close(got[1], torch.zeros(b, dtype=F64))
    got, _ = run(-x, rows, 0.0)
    assert torch.equal(got[0], rows[11:12].expand(b, d))
    x[:, 0] = 3e30
    got, _ = run(x, rows, 1e30)
    check(x, rows, 1.0, 0.0, 1e30)


@pytest.mark.parametrize("b,d", [(1, 40), (12, 40), (64, 3)])
def test_outputs_are_written_everywhere(b: int, d: int, poisoned: None) -> None:
    """Fresh memory is full of NaN here: what a kernel leaves out would show."""
    x, rows, _, _ = make(b, 70, d, F32, 0.5)
    bias = torch.zeros(70, dtype=F64)
    assert torch.isnan(torch.empty(5)).all()
    got, columns = run(x, rows, 0.5, bias=bias)
    grads = [torch.ones_like(v) for v in got]
    back = cpu.posterior_backward(
        x, rows, *columns, bias, None, None, *got, *grads, 1.0, 0.0, "gaussian"
    )
    distance, index = cpu.nearest(x, rows, 2, None, None, 1.0, 0.0)
    assert all(torch.isfinite(v).all() for v in (*got, *back, distance))
    assert ((index >= 0) & (index < 70)).all()


@pytest.fixture
def poisoned():
    """Deterministic mode fills new tensors with NaN, and integers with their largest value."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def hooks():
    """The module of hooks, which a development build has, and the instruction set in use."""
    return pytest.importorskip("memokern._testing"), cpu.backend.isa()


def merged(a: Tensor, b: Tensor) -> Tensor:
    """The kernels' merge of two states (key, m, s, st, sb, sw2, *acc), each [6 + D]."""
    testing, isa = hooks()
    out, other, factors = a.clone(), b.clone(), torch.empty(2, dtype=F64)
    testing.merge(isa, out.data_ptr(), other.data_ptr(), factors.data_ptr())
    both = torch.stack([a[6:], b[6:]])
    scaled = torch.where(factors[:, None] == 0, 0.0, factors[:, None] * both)
    return torch.cat([out[:6], scaled.sum(0)])


def state(logits: Tensor, bias: Tensor, y: Tensor, key: float = 0.0) -> Tensor:
    """The state of some rows, by its definition."""
    m = logits.max()
    w = torch.exp(logits - m)
    sums = [w.sum(), (w * (logits - m)).sum(), (w * bias).sum(), w.square().sum()]
    return torch.cat([torch.stack([torch.tensor(key, dtype=F64), m, *sums]), w @ y])


def test_merge_is_a_monoid() -> None:
    """Parts join to the whole, in any grouping and order; the empty state changes nothing."""
    g = torch.Generator().manual_seed(0)
    logits, bias = 30 * torch.randn(12, dtype=F64, generator=g), torch.randn(12, dtype=F64)
    y = torch.randn(12, 4, dtype=F64, generator=g)
    parts = [state(logits[i], bias[i], y[i]) for i in torch.arange(12).split([3, 4, 5])]
    a, b, c = parts
    whole = state(logits, bias, y)
    close = {"rtol": 1e-13, "atol": 1e-13}
    torch.testing.assert_close(merged(merged(a, b), c), whole, **close)
    torch.testing.assert_close(merged(a, merged(b, c)), whole, **close)
    torch.testing.assert_close(merged(c, merged(b, a)), whole, **close)
    empty = torch.tensor([math.inf, -math.inf, *[0.0] * 8], dtype=F64)
    assert torch.equal(merged(a, empty), a) and torch.equal(merged(empty, a), a)
    assert torch.equal(merged(empty, empty), empty)
    # Only the smallest key counts: sigma = 0, where it is the squared distance.
    near = state(logits[:3], bias[:3], y[:3], key=0.5)
    far = state(logits[3:], bias[3:], y[3:], key=2.0)
    assert torch.equal(merged(near, far), near) and torch.equal(merged(far, near), near)


@pytest.mark.parametrize("double", [False, True])
def test_exponential(double: bool) -> None:
    """The stated bounds, on a dense set of arguments of the range that the sweeps use."""
    testing, isa = hooks()
    dtype = F64 if double else F32
    x = torch.cat(
        [torch.linspace(-86.9, 0, 1_000_003, dtype=F64), -torch.logspace(-12, 0, 10_001, dtype=F64)]
    ).to(dtype)
    y = torch.full_like(x, math.nan)
    for two, exact, bound in ((False, torch.exp, 2e-7), (True, torch.exp2, 2.7e-7)):
        testing.exp(isa, double, x.data_ptr(), y.data_ptr(), x.numel(), two)
        want = exact(x.to(F64))
        assert ((y.to(F64) - want).abs() / want).max().item() < (1e-15 if double else bound), two
    tiny = torch.tensor([-1e4, -math.inf, math.nan], dtype=dtype)
    out = torch.full_like(tiny, 7.0)
    testing.exp(isa, double, tiny.data_ptr(), out.data_ptr(), 3, False)
    assert out[0] == 0 and out[1] == 0 and torch.isnan(out[2])
