"""The nearest rows by Triton: exact, whatever rounding does to the products that rule rows out."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import F32, F64, Flat, far, make
from triton_interpreter import DEVICE

pytest.importorskip("triton")

from memokern.backends.protocol import Call
from memokern.backends.triton.core.centering import centred
from memokern.backends.triton.nearest import kernels, launch
from memokern.calls import Rows

triton = Flat("triton")

ROW_TYPES = [F32, torch.bfloat16, torch.float16, torch.uint8]


def nearest(x, rows, k, center=None, sq_norms=None, scale=1.0, shift=0.0):
    args = (v if v is None else v.to(DEVICE) for v in (x, rows, center, sq_norms))
    x, rows, center, sq_norms = args
    dist, index = triton.nearest(x, rows, k, center, sq_norms, scale, shift)
    return dist.cpu(), index.cpu()


def truth(x, rows, k, scale=1.0, shift=0.0):
    y = rows.to(F64) * scale + shift
    r2 = torch.stack([(q - y).square().sum(1) for q in x.to(F64)])
    value, order = torch.sort(r2, dim=1, stable=True)
    return value[:, :k], order[:, :k]


def check(got, want):
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-24)


@pytest.mark.parametrize(
    ("b", "dtype"), [*((1, dtype) for dtype in ROW_TYPES), (17, F32), (17, torch.uint8)]
)
def test_nearest(b: int, dtype: torch.dtype) -> None:
    for n, d, offset in ((1, 1, 0.0), (33, 7, 0.0), (300, 40, 0.0), (300, 40, 500.0)):
        x, rows, scale, shift = make(b, n, d, dtype, 0.3, offset=offset)
        if n > 20:
            rows[n // 2] = rows[3]  # a tie: the lower index first
            x[0] = (rows[3].to(F64) * scale + shift).to(F32)
        for k in {1, min(2, n)}:
            check(nearest(x, rows, k, None, None, scale, shift), truth(x, rows, k, scale, shift))
    # All rows are candidates.
    check(nearest(x[:1], rows, 50, None, None, scale, shift), truth(x[:1], rows, 50, scale, shift))


def test_far_offsets() -> None:
    x, rows, scale, shift = make(4, 4, 70, torch.uint8, 0.1)
    check(nearest(x, far(rows, DEVICE), 2, None, None, scale, shift),
          truth(x, rows, 2, scale, shift))  # fmt: skip


def test_few_groups_are_looked_at(monkeypatch) -> None:
    """The bound rules out nearly all groups; a limit that ruled out more would lose rows."""
    x, rows, *_ = make(3, 2000, 64, F32, 0.2)
    seen = []
    run = kernels.Variant.launch

    def spy(self, grid, device, **args):
        run(self, grid, device, **args)
        if "most" in args:
            seen.append((args["least"] <= args["most"][:, None]).sum(1))

    monkeypatch.setattr(kernels.Variant, "launch", spy)
    check(nearest(x, rows, 1), truth(x, rows, 1))
    assert seen[0].max() <= 2  # of 32
    monkeypatch.setattr(launch, "key_error", lambda size, *_: 0 * size - 1.0)
    assert not torch.equal(nearest(x, rows, 1)[1], truth(x, rows, 1)[1])


def test_keys_err_less_than_they_are_allowed_to() -> None:
    """The least keys against float64, and the proven bound above their errors by a good factor."""
    x, rows, *_ = make(20, 500, 300, F32, 1.0, offset=3.0)
    x, rows = x.to(DEVICE), rows.to(DEVICE)
    c = centred(Rows(rows))
    xc = x.to(F64) - c.center
    key = 0.5 * c.sq_norms - xc @ (rows.to(F64) - c.center).T
    want = torch.stack([part.amin(1) for part in key.split(kernels.GROUP, 1)], 1)
    for precision in ("ieee", "tf32x3"):
        least = torch.empty(20, want.shape[1], device=DEVICE)
        variant = kernels.groups_variant(F32, False, precision)
        on = (xc.to(F32), rows, c.offset, c.half_sq)
        names = ("xc", "rows", "offset", "half_sq")
        variant.launch(
            (want.shape[1],), DEVICE, **dict(zip(names, on, strict=True)), least=least,
            B=20, N=500, D=300, stride_n=300, scale=1.0,
        )  # fmt: skip
        size = xc.square().sum(1).sqrt()
        allowed = launch.key_error(size, c, 300, 1.0, precision)
        assert ((least.to(F64) - want).abs() <= 0.2 * allowed[:, None]).all()


@pytest.mark.parametrize("b", [1, 4])
def test_where_rounding_is_coherent(b: int) -> None:
    """Equal features: every addition rounds the same way. A bound that takes roundings as
    independent loses the nearest row here; a worst-case one cannot."""
    d, n = 2048, 130
    g = torch.Generator().manual_seed(0)
    levels = 1 + 2e-3 * torch.rand(n, generator=g)
    rows = levels[:, None].expand(n, d).contiguous()
    x = (levels[:b] + 1e-7).clone()[:, None].expand(b, d).contiguous()
    got = nearest(x, rows, 3, torch.zeros(d), rows.double().square().sum(1))
    value, order = truth(x, rows, 3)
    assert torch.equal(got[1], order)
    torch.testing.assert_close(got[0], value, rtol=1e-11, atol=0)


@pytest.mark.parametrize("far", [1e20, 1e35])
def test_far_queries(far: float) -> None:
    """Products that overflow in float32 are never formed into an answer."""
    rows = torch.randn(100, 20, generator=torch.Generator().manual_seed(0))
    rows[71] = far
    x = torch.full((3, 20), far)
    x[:, 0] *= 0.5
    dist, index = nearest(x, rows, 1)
    assert (index == 71).all()
    torch.testing.assert_close(dist, torch.full((3, 1), (0.5 * far) ** 2, dtype=F64))


def test_many_ties_and_queries_that_are_lost() -> None:
    rows = torch.ones(130, 5)
    x = torch.ones(3, 5)
    x[1, 2], x[2, 0] = math.nan, -math.inf
    dist, index = nearest(x, rows, 64)
    assert torch.equal(index, torch.arange(64).expand(3, 64))
    assert (dist[0] == 0).all() and dist[1:].isnan().all()


def test_shapes_that_are_ragged_and_rows_that_are_strided(monkeypatch) -> None:
    monkeypatch.setattr(launch, "_WORKSPACE", 4 * 5 * 7)  # seven queries at a time
    x, rows, *_ = make(17, 290, 37, F32, 0.5)
    wide = torch.full((290, 48), math.nan)
    wide[:, :37] = rows
    check(nearest(x, wide[:, :37], 3), truth(x, rows, 3))
    none = nearest(x[:0], rows, 3)
    assert none[0].shape == none[1].shape == (0, 3)


def test_what_the_kernels_do_not_take_and_what_nobody_does() -> None:
    x, rows, *_ = make(2, 80, 4, F32, 0.3)
    usual = Call(DEVICE.type, F32, F32, 2, 80, 4, 64)
    assert triton.backend.refuses("nearest", usual) is None
    many = triton.backend.refuses("nearest", usual._replace(k=70))
    assert many == "it finds at most 64 neighbours, and 70 are asked for"
    with pytest.raises(ValueError, match="k must lie between 1 and the number of rows, 80"):
        nearest(x, rows, 81)
    with pytest.raises(ValueError, match="expected x"):
        nearest(x[:, :2], rows, 1)
    with pytest.raises(ValueError, match="each row must be contiguous"):
        nearest(x, rows.T.contiguous().T, 1)
