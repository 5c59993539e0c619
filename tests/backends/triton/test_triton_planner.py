"""The planner: every size is planned, within the stated bounds, and the same each time."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from memokern.backends import protocol, triton
from memokern.backends.protocol import Call
from memokern.backends.triton import BACKEND
from memokern.backends.triton import variants as listing
from memokern.backends.triton.core.machine import Machine
from memokern.backends.triton.posterior import fused, marked, planner, products
from memokern.backends.triton.posterior.weigh import chunk_size, chunk_sizes
from memokern.util import env

H100 = Machine(132, 50 << 20)
MACHINES = [Machine(1, 1 << 20), Machine(108, 40 << 20), H100, Machine(304, 4 << 20)]
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8]
SIZES = [
    (b, n, d)
    for b in (1, 7, 16, 17, 64, 1024, 65_536)
    for n in (1, 100, 50_000, 1_281_167, 10_000_000)
    for d in (1, 2, 16, 64, 65, 128, 256, 3072, 196_608)
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("machine", MACHINES)
def test_every_size(machine: Machine, dtype: torch.dtype) -> None:
    for b, n, d in SIZES:
        for weighting in ("gaussian", "log"):
            for unaligned in (False, True):
                one = planner.one_pass(b, n, d, dtype, machine, weighting, unaligned)
                assert (one is None) == (weighting == "log" or d > 256)
                if one is not None:
                    check_one_pass(one, b, n, d, dtype, unaligned)
            for kept in (1, 2):
                plan = planner.chunked(b, n, d, dtype, machine, weighting, kept)
                assert plan == planner.chunked(b, n, d, dtype, machine, weighting, kept)
                check_chunked(plan, b, n, d, dtype, machine, weighting, kept)


def check_one_pass(plan, b, n, d, dtype, unaligned):
    tile = fused.tile(dtype, plan.features, plan.few_queries, unaligned)
    assert d <= plan.features and plan.few_queries == (b <= planner.FEW_QUERIES)
    assert 1 <= plan.run * tile.n <= fused.PART and 1 <= plan.queries <= b
    parts, words = -(-n // (plan.run * tile.n)), fused.words(n, tile)
    assert 1 <= plan.exact_parts <= words and n <= 32 * words
    each = (parts + plan.exact_parts) * (4 * d + 48) + 4 * words
    held = plan.queries * each
    # A tile of queries is the least that is held; parts grow where there are few queries.
    assert plan.queries <= tile.b or held <= 2 * planner.WORKSPACE
    assert parts * plan.queries * d < 2**40 and words < 2**31


def check_chunked(plan, b, n, d, dtype, machine, weighting, kept):
    first = products.dot_products_tile(plan.few_queries, dtype, "tf32x3")
    assert chunk_size(plan.rows) in chunk_sizes(weighting, kept) and 1 <= plan.queries <= b
    size = planner.element_size(dtype)
    fits = plan.rows * d * size <= machine.l2_bytes // 2
    assert plan.rows % first.n == 0 and (fits or plan.rows == first.n)
    if plan.rows < chunk_sizes(weighting, kept)[0]:  # no more than must be
        assert 2 * plan.rows * d * size > machine.l2_bytes // 2
    held = 4 * kept * plan.queries * plan.rows
    assert plan.queries <= first.b or held <= planner.WORKSPACE
    assert 1 <= plan.parts_d <= max(16, d // 512) and 1 <= plan.parts_n <= 16
    # Parts make up for tiles that are few, and are no more than that takes.
    tiles = -(-plan.queries // first.b) * -(-min(plan.rows, n) // first.n)
    assert tiles * plan.parts_d < 4 * machine.multiprocessors or plan.parts_d == 1
    # Parts are made of whole steps, and there are as many as planned or fewer, none empty.
    for total, parts, step in ((d, plan.parts_d, first.d), (min(plan.rows, n), plan.parts_n, 32)):
        part = planner.part_size(total, parts, step)
        count = -(-total // part)
        assert part % step == 0 and count <= parts and (count - 1) * part < total


def test_one_query_fills_the_machine() -> None:
    """A program for each multiprocessor at least, where there are rows enough."""
    for dtype in TYPES:
        one = planner.one_pass(1, 1_000_000, 16, dtype, H100, "gaussian")
        tile = fused.tile(dtype, one.features, one.few_queries)
        assert -(-1_000_000 // (one.run * tile.n)) >= H100.multiprocessors
        plan = planner.chunked(1, 50_000, 3072, dtype, H100)
        tiles = plan.rows // products.dot_products_tile(True, dtype, "tf32x3").n
        assert tiles * plan.parts_d >= H100.multiprocessors


def test_wide_rows_fill_the_machine_too() -> None:
    for dtype in TYPES:
        plan = planner.chunked(1, 1_281_167, 196_608, dtype, H100)
        tiles = plan.rows // products.dot_products_tile(True, dtype, "tf32x3").n
        assert tiles * plan.parts_d >= H100.multiprocessors


def test_what_is_planned_is_listed() -> None:
    """Every variant that a plan asks for is among those that are compiled ahead of time."""
    names = {v.name for v in listing.variants()}
    assert len(names) == len(listing.variants())
    for dtype in TYPES:
        for d in fused.FEATURES:
            for few_queries in (True, False):
                for p in products.precisions(dtype):
                    for unaligned in (False, True):
                        v = fused.sweep_variant(dtype, d, few_queries, p, unaligned)
                        assert v.name in names and v.name.endswith("unaligned") == unaligned
            assert marked.exact_variant(dtype, d).name in names


def test_who_runs_what_and_why_not(monkeypatch) -> None:
    monkeypatch.setattr(triton, "interpreted", lambda: True)  # on a machine with a GPU it is not
    call = Call("cpu", torch.float32, torch.float32, 1, 1, 1)
    monkeypatch.setenv(env.BACKEND, "triton")
    assert protocol.choose("posterior", call) is BACKEND
    with pytest.raises(RuntimeError, match=r"triton does not: .* these are on meta.*unset it"):
        protocol.choose("posterior", call._replace(device="meta"))
    for double in (call._replace(x=torch.float64), call._replace(rows=torch.float64)):
        with pytest.raises(RuntimeError, match="triton does not: it has no kernel for float64"):
            protocol.choose("posterior", double)
    with pytest.raises(RuntimeError, match="second derivatives are taken in plain PyTorch"):
        protocol.choose("posterior_double_backward", call)
    monkeypatch.setenv(env.BACKEND, "auto")
    assert protocol.choose("posterior", call) is not BACKEND
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    BACKEND.unavailable.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    call = call._replace(device="cuda")
    assert protocol.choose("posterior", call) is BACKEND
    for other in (call._replace(rows=torch.float64), call._replace(k=65)):
        assert protocol.choose("nearest", other).name == "reference"
    BACKEND.unavailable.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert BACKEND.unavailable() == "PyTorch sees no GPU"
    refused = BACKEND.refuses("posterior", call._replace(device="cpu"))
    assert refused == "it runs tensors on the GPU, and these are on cpu"
    assert protocol.choose("posterior", call).name == "reference"
    BACKEND.unavailable.cache_clear()
