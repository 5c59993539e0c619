"""bound_scan by Triton: the lists against all logits, literally, in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import F32, F64, Flat, column
from support_cases import (
    DIMS,
    EDGES,
    Plain,
    check_lists,
    logits,
    lying_bounds,
    near,
    scan,
    spread,
)
from triton_interpreter import DEVICE

pytest.importorskip("triton")

from memokern.backends import triton
from memokern.backends.protocol import Call
from memokern.backends.triton.scan import launch as triton_scan


def bound_scan(*args):
    args = [v.to(DEVICE) if isinstance(v, torch.Tensor) else v for v in args]
    return tuple(v.cpu() for v in Flat("triton").bound_scan(*args))


TRITON = SimpleNamespace(bound_scan=bound_scan)


def test_a_capture_is_refused(monkeypatch) -> None:
    """It waits for the device: in a CUDA graph CUDA's own error would say less."""
    call = Call(DEVICE.type, F32, F32, 1, 4, 3)
    assert triton.BACKEND.refuses("bound_scan", call) is None
    monkeypatch.setattr(triton, "capturing", lambda device: device == torch.device(DEVICE.type))
    refused = triton.BACKEND.refuses("bound_scan", call)
    assert "cannot be captured in a CUDA graph: sweep densely" in refused
    assert triton.BACKEND.refuses("posterior", call) is None


@pytest.mark.parametrize("half", [True, False], ids=["float16", "float32"])
@pytest.mark.parametrize("kind", ["random", "clustered", "duplicated"])
def test_lists_keep_their_promise(kind: str, half: bool) -> None:
    few = 0
    for seed, (n, d, b, sigma) in enumerate([
        (1, 20, 3, 1e-3), (50, 40, 1, 1e3), (130, 33, 17, 0.1), (130, 33, 65, 1.0),
        (130, 48, 17, 3.0), (190, 33, 4, 0.5),
    ]):  # fmt: skip
        rows = spread(n, d, seed, kind)
        index = Plain(
            rows.to(F64), [k for k in DIMS if k < d], EDGES, half, ["pca", "random"][seed % 2]
        )
        bias = torch.randn(n, dtype=F64, generator=torch.Generator().manual_seed(seed)) * 3
        if n > 1:
            bias[:: n // 7] = -math.inf
        alpha, temperature = (1.0, 0.4, -0.7, 1.0)[seed % 4], (1.0, 0.3, 4.0)[seed % 3]
        x = near(rows, b, sigma, alpha, seed)
        how = (column(sigma, b), column(alpha, b), column(temperature, b))
        with_bias = bias if (half + seed) % 2 else None
        found = scan(x, rows, index, *how, with_bias, 1.0, 0.0, backend=TRITON)
        assert bool((found[3] >= 1).all())  # the cap is all rows: none is given up
        check_lists(found, logits(x, rows.to(F64), *how, with_bias), 1e-6)
        few += found[1].numel() < b * n / 2
    assert few >= 2  # small sigma: most rows are dropped


def test_only_what_the_bounds_allow_is_listed() -> None:
    """At small sigma a query's own row is left alone; bounds by every coordinate are exact."""
    rows = spread(500, 48, 3)
    index = Plain(rows.to(F64), [8, 16, 48], [8, 16, 48], False, "pca")
    for sigma in (0.05, 0.3):
        x = near(rows, 20, sigma, 1.0, 5)
        how = (column(sigma, 20), column(1.0, 20), column(1.0, 20))
        found = scan(x, rows, index, *how, None, 1.0, 0.0, backend=TRITON)
        # No band is left beyond the last level: what is listed is what is above the threshold,
        # but for the margin 2 (K + nb + 16) u |xc| y_max in <x, y> and the like in the squares.
        t = logits(x, rows.to(F64), *how, None)
        size = 4 * (48 + 90) * 2.0**-24 * (x.norm(dim=1).max().item() + index.y_max + 9) ** 2
        assert len(found[1]) <= (t > (found[2] - size / sigma**2)[:, None]).sum()
        assert sigma > 0.1 or len(found[1]) == 20


def test_a_bound_that_lies_is_noticed() -> None:
    lying_bounds(200, 20, TRITON)


def test_given_up(monkeypatch) -> None:
    rows = spread(100, 40, 1)
    index = Plain(rows.to(F64), DIMS, EDGES, True, "pca")
    x = near(rows, 9, 0.1, 1.0, 0)
    x[1, 3], x[2, 0] = math.nan, math.inf
    sigma, alpha, temperature = column(0.1, 9), column(1.0, 9), column(1.0, 9)
    sigma[3], alpha[4], temperature[5] = 0.0, math.nan, 0.0
    sigma[6], temperature[7] = 50.0, math.inf
    how = (sigma, alpha, temperature, None, 1.0, 0.0)
    found = scan(x, rows, index, *how, cap=50, backend=TRITON)
    start, listed, threshold, level = found
    given_up = torch.tensor([0, 1, 1, 1, 1, 1, 1, 1, 0], dtype=torch.bool)  # 6: above the cap
    assert torch.equal(level == 0, given_up)
    assert bool((start.diff()[given_up] == 0).all()) and bool(threshold[given_up].isnan().all())
    kept = [v[[0, 8]] for v in (sigma, alpha, temperature)]
    t = logits(x[[0, 8]], rows.to(F64), *kept, None)
    counts = torch.tensor([0, *start.diff()[[0, 8]].tolist()]).cumsum(0)
    check_lists((counts, listed, threshold[[0, 8]], level[[0, 8]]), t, 1e-6)
    # In several turns the result is the same.
    monkeypatch.setattr(triton_scan, "_PAIRS", 5 * 100)
    for a, e in zip(scan(x, rows, index, *how, cap=50, backend=TRITON), found, strict=True):
        assert torch.equal(a.nan_to_num(1.5), e.nan_to_num(1.5))


def test_uint8_rows_no_queries_and_what_is_refused() -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (200, 40), dtype=torch.uint8, generator=g)
    y = rows.to(F64) * (2 / 255) - 1
    index = Plain(y, DIMS, EDGES, True, "pca")
    x, how = near(y, 5, 0.3, 1.0, 0), (column(0.3, 5), column(1.0, 5), column(1.0, 5))
    found = scan(x, rows, index, *how, None, 2 / 255, -1.0, backend=TRITON)
    check_lists(found, logits(x, y, *how, None), 1e-6)
    assert len(found[1]) < 200
    none = scan(x[:0], rows, index, *(v[:0] for v in how), None, 2 / 255, -1.0, backend=TRITON)
    assert none[0].tolist() == [0] and all(len(v) == 0 for v in none[1:])
    for bad, words in (({"eps": 0.0}, "eps"), ({"cap": 0}, "most_listed"),
                       ({"coarse": index.coarse.to(F64)}, "coarse must be float32")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            scan(x, rows, index, *how, None, 1.0, 0.0, backend=TRITON, **bad)
