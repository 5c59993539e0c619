"""The planner: every size is planned, within the stated bounds, and the same each time."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from memokern.backends import protocol as backends
from memokern.backends.triton import dense as triton
from memokern.backends.triton import variants as listing
from memokern.backends.triton.posterior import onepass, planner, products
from memokern.backends.triton.posterior.weigh import chunks, room
from memokern.util import env

H100 = planner.Machine(132, 50 << 20)
MACHINES = [planner.Machine(1, 1 << 20), planner.Machine(108, 40 << 20), H100,
            planner.Machine(304, 4 << 20)]  # fmt: skip
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8]
SIZES = [
    (b, n, d)
    for b in (1, 7, 16, 17, 64, 1024, 65_536)
    for n in (1, 100, 50_000, 1_281_167, 10_000_000)
    for d in (1, 2, 16, 64, 65, 128, 256, 3072, 196_608)
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("machine", MACHINES)
def test_every_size(machine: planner.Machine, dtype: torch.dtype) -> None:
    for b, n, d in SIZES:
        for kernel in ("gaussian", "log"):
            for unaligned in (False, True):
                one = planner.one_pass(b, n, d, dtype, machine, kernel, unaligned)
                assert (one is None) == (kernel == "log" or d > 256)
                if one is not None:
                    check_one_pass(one, b, n, d, dtype, unaligned)
            for kept in (1, 2):
                plan = planner.chunked(b, n, d, dtype, machine, kernel, kept)
                assert plan == planner.chunked(b, n, d, dtype, machine, kernel, kept)
                check_chunked(plan, b, n, d, dtype, machine, kernel, kept)


def check_one_pass(plan, b, n, d, dtype, unaligned):
    tile = onepass.tile(dtype, plan.features, plan.few, unaligned)
    assert d <= plan.features and plan.few == (b <= planner.FEW)
    assert 1 <= plan.run * tile.n <= onepass.PART and 1 <= plan.queries <= b
    parts, words = -(-n // (plan.run * tile.n)), onepass.words(n, tile)
    assert 1 <= plan.exact_parts <= words and n <= 32 * words
    each = (parts + plan.exact_parts) * (4 * d + 48) + 4 * words
    held = plan.queries * each
    # A tile of queries is the least that is held; parts grow where there are few queries.
    assert plan.queries <= tile.b or held <= 2 * planner.WORKSPACE
    assert parts * plan.queries * d < 2**40 and words < 2**31


def check_chunked(plan, b, n, d, dtype, machine, kernel, kept):
    dots = products.dots_tile(plan.few, dtype, "tf32x3")
    assert room(plan.rows) in chunks(kernel, kept) and 1 <= plan.queries <= b
    size = planner.element_size(dtype)
    fits = plan.rows * d * size <= machine.l2_bytes // 2
    assert plan.rows % dots.n == 0 and (fits or plan.rows == dots.n)
    if plan.rows < chunks(kernel, kept)[0]:  # no more than must be
        assert 2 * plan.rows * d * size > machine.l2_bytes // 2
    held = 4 * kept * plan.queries * plan.rows
    assert plan.queries <= dots.b or held <= planner.WORKSPACE
    assert 1 <= plan.parts_d <= max(16, d // 512) and 1 <= plan.parts_n <= 16
    # Parts make up for tiles that are few, and are no more than that takes.
    tiles = -(-plan.queries // dots.b) * -(-min(plan.rows, n) // dots.n)
    assert tiles * plan.parts_d < 4 * machine.multiprocessors or plan.parts_d == 1
    # Parts are made of whole steps, and there are as many as planned or fewer, none empty.
    for total, parts, step in ((d, plan.parts_d, dots.d), (min(plan.rows, n), plan.parts_n, 32)):
        part = planner.share(total, parts, step)
        count = -(-total // part)
        assert part % step == 0 and count <= parts and (count - 1) * part < total


def test_one_query_fills_the_machine() -> None:
    """A program for each multiprocessor at least, where there are rows enough."""
    for dtype in TYPES:
        one = planner.one_pass(1, 1_000_000, 16, dtype, H100, "gaussian")
        tile = onepass.tile(dtype, one.features, one.few)
        assert -(-1_000_000 // (one.run * tile.n)) >= H100.multiprocessors
        plan = planner.chunked(1, 50_000, 3072, dtype, H100)
        tiles = plan.rows // products.dots_tile(True, dtype, "tf32x3").n
        assert tiles * plan.parts_d >= H100.multiprocessors


def test_wide_rows_fill_the_machine_too() -> None:
    for dtype in TYPES:
        plan = planner.chunked(1, 1_281_167, 196_608, dtype, H100)
        tiles = plan.rows // products.dots_tile(True, dtype, "tf32x3").n
        assert tiles * plan.parts_d >= H100.multiprocessors


def test_what_is_planned_is_listed() -> None:
    """Every variant that a plan asks for is among those that are compiled ahead of time."""
    names = {v.name for v in listing.variants()}
    assert len(names) == len(listing.variants())
    for dtype in TYPES:
        for d in onepass.FEATURES:
            for few in (True, False):
                for p in products.precisions(dtype):
                    for unaligned in (False, True):
                        v = onepass.sweep_variant(dtype, d, few, p, unaligned)
                        assert v.name in names and v.name.endswith("unaligned") == unaligned
            assert onepass.exact_variant(dtype, d).name in names


def test_the_ladder(monkeypatch) -> None:
    """Who runs what, and why not."""
    monkeypatch.setattr(triton, "interpreted", lambda: True)  # on a machine with a GPU it is not
    monkeypatch.setenv(env.BACKEND, "triton")
    backends._choose.cache_clear()
    assert backends.choose_for("cpu", "posterior") is triton
    with pytest.raises(RuntimeError, match="these are on meta"):
        backends.choose_for("meta")
    with pytest.raises(RuntimeError, match="it has no fly"):
        backends.choose_for("cpu", "fly")
    monkeypatch.setenv(env.BACKEND, "auto")
    assert backends.choose_for("cpu") is not triton
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    backends._choose.cache_clear()
    assert backends.choose_for("cuda") is triton
    assert backends.choose_for("cuda", "fly").__name__.endswith("reference")
    backends._choose.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton.unavailable() == "PyTorch sees no GPU"
    assert triton.refuses("cpu") == "it runs tensors on the GPU, and these are on cpu"
    assert backends.choose_for("cuda").__name__.endswith("reference")
    backends._choose.cache_clear()
