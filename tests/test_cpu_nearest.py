"""The nearest rows: exact, with ties to the lower index."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import F32, F64, ROW_TYPES, cpu, make


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


@pytest.mark.parametrize("b", [1, 12])
def test_nearest_where_rounding_is_coherent(b: int) -> None:
    """Equal features: every addition of a product rounds the same way, as far as it can go.

    A bound that takes roundings as independent loses the nearest row here; a worst-case one cannot.
    """
    d, n = 4096, 400
    g = torch.Generator().manual_seed(0)
    levels = 1 + 2e-3 * torch.rand(n, generator=g)
    rows = levels[:, None].expand(n, d).contiguous()
    x = (levels[:b] + 1e-7).clone()[:, None].expand(b, d).contiguous()
    origin, norms = torch.zeros(d), rows.double().square().sum(1)
    distance, index = cpu.nearest(x, rows, 3, origin, norms, 1.0, 0.0)
    r2 = torch.stack([(q - rows.double()).square().sum(1) for q in x.double()])
    value, order = torch.sort(r2, dim=1, stable=True)
    assert torch.equal(index, order[:, :3])
    torch.testing.assert_close(distance, value[:, :3], rtol=1e-11, atol=0)


@pytest.mark.parametrize("b", [1, 12])
@pytest.mark.parametrize("far", [1e20, 1e35])
def test_nearest_of_far_queries(b: int, far: float) -> None:
    """Products that overflow in float32 are never formed into an answer."""
    rows = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    rows[7] = far
    x = torch.full((b, 20), far)
    x[:, 0] *= 0.5
    distance, index = cpu.nearest(x, rows, 1, None, None, 1.0, 0.0)
    assert (index == 7).all()
    torch.testing.assert_close(distance, torch.full((b, 1), (0.5 * far) ** 2, dtype=F64))
