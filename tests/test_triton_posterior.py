"""The posterior by Triton's kernels against an oracle in float64 that shares nothing with them."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import F32, F64, Flat, column, compare, far, make, oracle
from triton_interpreter import DEVICE

pytest.importorskip("triton")

import memokern
from memokern.backends.protocol import Call
from memokern.backends.triton.core import machine
from memokern.backends.triton.core import rows as stored
from memokern.backends.triton.posterior import finish, planner
from memokern.util import env

triton = Flat("triton")
ROW_TYPES = [F32, torch.bfloat16, torch.float16, torch.uint8]


def on_device(*tensors):
    return [None if t is None else t.to(DEVICE) for t in tensors]


def run(x, rows, sigma, alpha=1.0, temperature=1.0, bias=None, scale=1.0, shift=0.0,
        kernel="gaussian", cached=False):  # fmt: skip
    """-> the five results on the CPU, and the columns."""
    b = x.shape[0]
    center = sq = None
    if cached:
        y = rows.to(F64) * scale + shift
        center = y.mean(0).to(F32)
        sq = (y - center.to(F64)).square().sum(1)
    columns = [
        v if isinstance(v, torch.Tensor) else column(v, b) for v in (sigma, alpha, temperature)
    ]
    args = on_device(x, rows, *columns, bias, center, sq)
    got = triton.posterior(*args, scale, shift, kernel)
    return [v.cpu() for v in got], columns


def check(x, rows, scale, shift, sigma, *, alpha=1.0, temperature=1.0, bias=None,
          kernel="gaussian", cached=False):  # fmt: skip
    got, columns = run(x, rows, sigma, alpha, temperature, bias, scale, shift, kernel, cached)
    assert got[0].dtype == x.dtype and all(v.dtype == F64 for v in got[1:])
    want = oracle(x, rows, *columns, bias, scale, shift, kernel)
    compare(got, want, rows, scale, shift, F32)
    return got


@pytest.fixture
def in_chunks(monkeypatch):
    """Every sweep in chunks, also of few features."""
    monkeypatch.setattr(planner, "one_pass", lambda *_: None)


@pytest.mark.parametrize("dtype", ROW_TYPES)
@pytest.mark.parametrize("d", [1, 63, 100, 256])
def test_tails_of_features(d: int, dtype: torch.dtype) -> None:
    x, rows, scale, shift = make(3, 33, d, dtype, 0.5)
    check(x, rows, scale, shift, 0.5, cached=d == 63)


@pytest.mark.parametrize("d,dtype", [(5, F32), *((300, t) for t in ROW_TYPES)])
def test_tails_of_features_in_chunks(d: int, dtype: torch.dtype, in_chunks: None) -> None:
    x, rows, scale, shift = make(3, 33, d, dtype, 0.5)
    check(x, rows, scale, shift, 0.5, cached=d == 5)


@pytest.mark.parametrize("b,n", [(1, 65), (17, 32), (65, 9)])
def test_tails_of_rows_and_queries(b: int, n: int) -> None:
    x, rows, scale, shift = make(b, n, 5, F32, 0.7, seed=n)
    check(x, rows, scale, shift, 0.7)


@pytest.mark.parametrize("dtype", ROW_TYPES)
def test_many_queries_of_many_features(dtype: torch.dtype) -> None:
    """In one pass, whose first product streams the features."""
    x, rows, scale, shift = make(17, 40, 200, dtype, 0.7)
    bias = torch.linspace(-1, 1, 40, dtype=F64)
    check(x, rows, scale, shift, 0.7, bias=bias)


@pytest.mark.parametrize("b,n", [(1, 1), (2, 257), (17, 20)])
def test_tails_of_rows_and_queries_in_chunks(b: int, n: int, in_chunks: None) -> None:
    x, rows, scale, shift = make(b, n, 5, torch.bfloat16, 0.7, seed=n)
    check(x, rows, scale, shift, 0.7)


@pytest.mark.parametrize("dtype", ROW_TYPES)
@pytest.mark.parametrize("kernel", ["gaussian", "log"])
def test_bias_temperature_alpha(dtype: torch.dtype, kernel: str) -> None:
    bias = torch.randn(70, dtype=F64, generator=torch.Generator().manual_seed(5))
    bias[::3] = -math.inf
    for alpha in (-1.3, 0.0):
        x, rows, scale, shift = make(2, 70, 19, dtype, 0.8, alpha=alpha)
        check(x, rows, scale, shift, 0.8, alpha=alpha, temperature=1.7, bias=bias, kernel=kernel)


@pytest.mark.parametrize(
    "sigma,d",
    [(1e-3, 40), (0.1, 40), (1.0, 40), (80.0, 40), (1e3, 40), (1e-3, 300), (1.0, 300), (80.0, 300)],
)
def test_every_noise_level(sigma: float, d: int) -> None:
    for repeat in (None, sigma / 30):
        x, rows, scale, shift = make(2, 20, d, F32, sigma, repeat=repeat)
        check(x, rows, scale, shift, sigma, cached=repeat is None)
    x, rows, scale, shift = make(2, 20, d, F32, sigma, offset=1000.0)
    check(x, rows, scale, shift, sigma)
    x, rows, scale, shift = make(2, 20, d, torch.uint8, sigma)
    check(x, rows, scale, shift, sigma)


@pytest.mark.parametrize("precision", ["tf32x3", "ieee"])
@pytest.mark.parametrize("d", [20, 300])
def test_precisions(precision: str, d: int, monkeypatch) -> None:
    monkeypatch.setenv(env.PRECISION, precision)
    x, rows, scale, shift = make(2, 90, d, F32, 1.0)
    got = check(x, rows, scale, shift, 1.0)
    monkeypatch.setenv(env.BACKEND, "triton")
    for other in env.PRECISIONS:  # the argument counts, whatever the environment says
        p = memokern.posterior(*on_device(x, rows), 1.0, precision=other)
        assert torch.equal(p.mean.cpu(), got[0]) == (other == precision)
        torch.testing.assert_close(p.mean.cpu(), got[0], rtol=1e-4, atol=1e-5)
    one = torch.ones(2, dtype=F64)
    args = on_device(x, rows, one, one, one, None, None, None)
    with pytest.raises(ValueError, match="precision must be auto, tf32x3 or ieee, not 'tf32'"):
        triton.posterior(*args, scale, shift, "gaussian", "tf32")
    monkeypatch.setenv(env.PRECISION, "tf32")
    with pytest.raises(RuntimeError, match="MEMOKERN_PRECISION must be one of tf32x3, ieee"):
        run(x, rows, 1.0)


@pytest.mark.parametrize(
    "d,dtype", [(2, F32), (130, torch.float16), *((300, t) for t in ROW_TYPES)]
)
def test_many_rows_with_weight(d: int, dtype: torch.dtype) -> None:
    """Equal weights: what is lost of each sum adds up over the rows."""
    g = torch.Generator().manual_seed(0)
    n = 500
    rows = (
        torch.randint(0, 256, (n, d), dtype=dtype, generator=g)
        if dtype == torch.uint8
        else (1 + torch.randn(n, d, generator=g)).to(dtype)
    )
    got, _ = run(torch.zeros(1, d), rows, 1e5)
    want = rows.double().mean(0)
    assert (got[0].double() - want).abs().max() <= 4e-6 * rows.double().abs().max()
    torch.testing.assert_close(got[4].item(), 1 / n, rtol=1e-5, atol=0)


def test_far_queries_and_mixed_levels() -> None:
    """Every query has its own noise level, and may be far from all rows."""
    for d in (33, 140):
        x, rows, _, _ = make(7, 32, d, F32, 1.0)
        x[::2] *= 50
        sigma = torch.logspace(-3, 3, 7, dtype=F64)
        alpha = torch.linspace(0.1, 1, 7, dtype=F64)
        got, columns = run(x, rows, sigma, alpha)
        compare(got, oracle(x, rows, *columns, None, 1.0, 0.0, "gaussian"), rows, 1.0, 0.0, F32)


@pytest.mark.parametrize("d", [5, 300])
def test_identities(d: int) -> None:
    """Shifted biases shift log Z; duplicated data leave the mean; equal rows weigh the same."""
    x, rows, _, _ = make(2, 50, d, F32, 0.6)
    bias = torch.linspace(-1, 1, 50, dtype=F64)
    first, _ = run(x, rows, 0.6, bias=bias)
    moved, _ = run(x, rows, 0.6, bias=bias + 3)
    torch.testing.assert_close(moved[1], first[1] + 3, rtol=0, atol=1e-5)
    torch.testing.assert_close(moved[0], first[0], rtol=0, atol=1e-5)
    twice, _ = run(x, rows.repeat(2, 1), 0.6, bias=bias.repeat(2))
    torch.testing.assert_close(twice[0], first[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(twice[1], first[1] + math.log(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(twice[4], first[4] / 2, rtol=1e-4, atol=0)


@pytest.mark.parametrize("d,dtype", [(1, F32), (40, torch.bfloat16), (140, F32), (300, F32)])
def test_limit_of_small_sigma(d: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(70, d, generator=g).to(dtype)
    rows[60] = rows[7]
    x = rows[torch.arange(3) + 5].float() + 1e-3 * torch.randn(3, d, generator=g)
    x[-1] = rows[7].float()
    bias = torch.zeros(70, dtype=F64)
    bias[60] = math.log(3)
    got, _ = run(x, rows, 0.0, bias=bias)
    r2 = (x[:, None].double() - rows[None].double()).square().sum(-1)
    near = r2.argmin(1)
    torch.testing.assert_close(got[0], rows[near].float(), rtol=1e-6, atol=1e-6)
    assert torch.isneginf(got[1][:-1]).all() and torch.isneginf(got[2][:-1]).all()
    torch.testing.assert_close(got[1][-1].item(), math.log(4))
    torch.testing.assert_close(got[3][-1].item(), 0.75 * math.log(3))
    torch.testing.assert_close(got[4][-1].item(), 0.25**2 + 0.75**2)
    # The log kernel gives all weight to an exact hit, whatever sigma.
    got, _ = run(x[-1:], rows, 1.0, bias=bias, kernel="log")
    torch.testing.assert_close(got[0], rows[7:8].float(), rtol=1e-6, atol=1e-6)
    assert got[1].item() == math.inf
    torch.testing.assert_close(got[4].item(), 0.25**2 + 0.75**2)


@pytest.mark.parametrize("d", [2, 300])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_lost_queries_stay_alone(d: int, value: float) -> None:
    x, rows, _, _ = make(3, 40, d, F32, 0.5)
    clean, _ = run(x, rows, 0.5)
    dirty = x.clone()
    dirty[1, 1] = value
    got, _ = run(dirty, rows, 0.5)
    keep = torch.arange(3) != 1
    for a, e in zip(got, clean, strict=True):
        assert torch.isnan(a[1]).all()
        assert torch.equal(a[keep], e[keep])


def test_empty_single_and_strided() -> None:
    rows = torch.randn(5, 3)
    got, _ = run(torch.empty(0, 3), rows, 1.0)
    assert got[0].shape == (0, 3) and got[1].shape == (0,)
    got, _ = run(torch.randn(4, 3), rows[:1], 1.0)
    torch.testing.assert_close(got[0], rows[:1].expand(4, 3), rtol=1e-6, atol=0)
    wide = torch.randn(50, 40)
    x = torch.randn(7, 12)[:, ::2]
    first, _ = run(x, wide[::2, 3:9], 1.0)
    again, _ = run(x.contiguous(), wide[::2, 3:9].contiguous(), 1.0)
    for a, e in zip(first, again, strict=True):
        assert torch.equal(a, e)


def test_refusals() -> None:
    x, rows = torch.randn(2, 3), torch.randn(4, 3)
    with pytest.raises(TypeError, match="int32"):
        run(x, rows.to(torch.int32), 1.0)
    with pytest.raises(ValueError, match="contiguous"):
        run(x, torch.randn(3, 4).T, 1.0)
    with pytest.raises(ValueError, match="expected x"):
        run(x, torch.randn(4, 5), 1.0)
    with pytest.raises(ValueError, match="sigma"):
        run(x, rows, column(1.0, 3))
    for x_dtype, dtype in ((F64, F32), (F32, F64)):
        with pytest.raises(TypeError, match="take float32 queries and rows of float32, bfloat16"):
            run(x.to(x_dtype), rows.to(dtype), 1.0)
    usual = Call(DEVICE.type, F32, F32, 2, 4, 3)
    refuses = triton.backend.refuses
    assert refuses("posterior", usual) is None
    assert refuses("posterior", usual._replace(x=F64)) == "it has no kernel for float64"
    assert refuses("posterior", usual._replace(rows=F64)) == "it has no kernel for float64"
    assert "at most 134,217,728 queries" in refuses("posterior", usual._replace(b=2**27 + 1))
    assert "at most 2,147,467,264 rows" in refuses("posterior", usual._replace(n=2**31 - 1))
    assert "no torch.func transforms" in refuses("posterior", usual._replace(transform=True))
    assert "second derivatives" in refuses("posterior_double_backward", usual)


@pytest.mark.parametrize("dtype", ROW_TYPES)
def test_rows_through_descriptors(dtype: torch.dtype, in_chunks: None, monkeypatch) -> None:
    """The same bits as by pointers, at ragged edges of rows and features, in chunks; NaN beyond a
    view's own features stays outside."""
    monkeypatch.setattr(planner, "chunked", lambda *_: planner.Chunked(True, 3, 256, 1, 1))
    x, rows, scale, shift = make(3, 300, 140, dtype, 0.5)
    wide = torch.full((300, 160), 77).to(dtype) if dtype == torch.uint8 else torch.full(
        (300, 160), math.nan, dtype=dtype)  # fmt: skip
    wide[:, :140] = rows
    results = []
    for knows in (False, True):
        monkeypatch.setattr(stored, "has_descriptors", lambda _, k=knows: k)
        results.append(run(x, wide[:, :140], 0.5, scale=scale, shift=shift)[0])
    assert all(torch.equal(a, e) for a, e in zip(*results, strict=True))
    compare(results[1], oracle(x, rows, *(column(v, 3) for v in (0.5, 1.0, 1.0)), None, scale,
                               shift, "gaussian"), rows, scale, shift, F32)  # fmt: skip


@pytest.mark.parametrize(
    ("d", "knows"), [(5, False), (140, False), (300, False), (300, True)],
)  # fmt: skip
def test_far_offsets(d: int, knows: bool, monkeypatch) -> None:
    """Rows more than 2^31 elements apart: one page of rows, seen with a stride of 2^30 elements."""
    monkeypatch.setattr(stored, "has_descriptors", lambda _: knows)
    small = make(1, 4, d, torch.uint8, 0.0)[1]
    x = (small[-1:].float() * 2 / 255 - 1) + 0.01
    got, _ = run(x, far(small, DEVICE), 0.3, scale=2 / 255, shift=-1.0)
    want, _ = run(x, small, 0.3, scale=2 / 255, shift=-1.0)
    assert torch.equal(got[0], want[0])


@pytest.mark.parametrize("d", [3, 300])
def test_far_rows_and_queries(d: int) -> None:
    """Squares that overflow in float32: exact distances decide, and nothing becomes NaN."""
    rows = torch.randn(20, d, generator=torch.Generator().manual_seed(0))
    rows[7] = 1e25
    rows[11] = -1e25
    x = torch.full((2, d), 1e25)
    got, _ = run(x, rows, 1e23)
    assert torch.equal(got[0], rows[7:8].expand(2, d))
    torch.testing.assert_close(got[1], torch.zeros(2, dtype=F64))
    got, _ = run(-x, rows, 0.0)
    assert torch.equal(got[0], rows[11:12].expand(2, d))
    x[:, 0] = 3e30
    check(x, rows, 1.0, 0.0, 1e30)


@pytest.mark.parametrize("d", [3, 140, 300])
def test_plans_change_only_the_order_of_sums(d: int, monkeypatch) -> None:
    """Other parts of rows, features and queries: the same results within rounding."""
    x, rows, _, _ = make(16, 150, d, torch.bfloat16, 3.0)
    x = torch.cat([x, x[:1]])
    monkeypatch.setattr(planner, "FEW_QUERIES", 17)  # low tiles: 16 queries, then the last
    whole, _ = run(x, rows, 3.0)
    monkeypatch.setattr(machine, "of", lambda _: machine.Machine(4, 1 << 18))
    monkeypatch.setattr(planner, "WORKSPACE", 1)
    other, _ = run(x, rows, 3.0)
    for a, e in zip(other, whole, strict=True):
        torch.testing.assert_close(a, e, rtol=2e-5, atol=2e-5)
        assert torch.equal(a[0], a[16])  # of the second launch, or tile


@pytest.mark.parametrize("d", [140, 300])
def test_outputs_are_written_everywhere(d: int) -> None:
    """Fresh memory is full of NaN here: what a kernel leaves out would show."""
    x, rows, _, _ = make(2, 70, d, F32, 0.5)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.isnan(torch.empty(5)).all()
        got, _ = run(x, rows, 0.5, bias=torch.zeros(70, dtype=F64))
        again, _ = run(x, rows, 0.5, bias=torch.zeros(70, dtype=F64))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(v).all() for v in got)
    assert all(torch.equal(a, e) for a, e in zip(got, again, strict=True))


def test_rows_are_marked_only_where_rounding_matters(monkeypatch) -> None:
    """At large sigma no row is evaluated again; at small sigma few are. If none ever were, the
    weights of near rows would be wrong, which test_every_noise_level finds."""
    marks = []
    launch = finish.launch

    def spy(q, b0, b, parts, into):
        # exact_kernel wrote the last parts. s is the sum of at most `rows` ones.
        states = parts.states.view(-1)[: parts.n_states * 6 * b].view(-1, 6, b)
        marks.append(states[-1, 2].clone())
        launch(q, b0, b, parts, into)

    monkeypatch.setattr(finish, "launch", spy)
    for sigma in (30.0, 1.0):
        x, rows, _, _ = make(2, 100, 10, F32, sigma)
        run(x, rows, sigma)
    assert (marks[0] == 0).all() and (marks[1] > 0).all()
