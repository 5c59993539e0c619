"""The whole backend without a GPU: its own plans and launches, on a driver that hands every launch
to the emulator, against the definition."""

from __future__ import annotations

import pytest
import torch

from memokern.backends.cuda import BACKEND
from memokern.backends.cuda.core import variant as variants
from memokern.backends.cuda.variants import shared_of
from memokern.calls import merge, to_sums
from memokern.calls.state import by_key
from tests import cases, compare, cuda_emulator, oracle
from tests.backends.cuda.fake_driver import Driver
from tests.cases import BF16, F16, F32, U8, Case

pytestmark = pytest.mark.skipif(
    cuda_emulator.missing() is not None, reason=str(cuda_emulator.missing())
)
D = 272


ROWS = [U8, *(pytest.param(t, marks=pytest.mark.long) for t in (F32, BF16, F16))]


@pytest.mark.parametrize("dtype", ROWS, ids=cases.name_of)
def test_as_the_definition(emulated: Driver, dtype: torch.dtype) -> None:
    """Rows whose norms are known and not, one block of queries and two, with a bias and without."""
    for case in (
        Case(3, 300, D, dtype, sigma=0.5, alpha=0.9, temperature=1.3, bias="holes"),
        Case(19, 40, D, dtype, sigma=0.0),
    ):
        query, rows = case.problem()
        rows = cases.with_norms(rows) if case.b == 3 else rows
        got = BACKEND.posterior(query, rows)
        compare.sums(got, oracle.sums(query, rows), query, rows, F32, str(case))
    sweeps = [x.variant for x in emulated.launches if x.entry == "memokern_sweep"]
    assert [x.entry for x in emulated.launches].count("memokern_sq_norms") == 1
    assert dict(variants.ROW_CODES)[dtype] == dict(sweeps[0].macros)["MK_ROWS"]


@pytest.mark.long
@pytest.mark.parametrize("dtype", [U8, F32, BF16, F16], ids=cases.name_of)
def test_gradients_as_the_definition(emulated: Driver, dtype: torch.dtype) -> None:
    """Two blocks of queries, with a bias and without; rows whose norms are known and not."""
    for bias in (None, "hole"):
        case = Case(19, 90, D, dtype, sigma=0.7, alpha=0.9, temperature=1.3, bias=bias)
        query, rows = case.problem()
        rows = cases.with_norms(rows) if bias else rows
        sums = oracle.sums(query, rows)
        known = cases.basic(sums)._replace(mean=sums.mean.float())
        grads = cases.random_like(known, seed=2)
        got = BACKEND.posterior_backward(query, rows, known, grads)
        want = oracle.gradients(query, rows, grads)
        compare.gradients(got, want, sums, query, F32, str(case))


@pytest.mark.long
def test_states_of_parts_make_the_whole(emulated: Driver) -> None:
    query, rows = Case(3, 300, D, U8, sigma=0.7, bias="normal").problem()
    rows = cases.with_norms(rows)
    states = []
    for part in (slice(0, 90), slice(90, 300)):
        some = rows._replace(data=rows.data[part], sq_norms=rows.sq_norms[part])
        asked = query._replace(bias=query.bias[part])
        states.append(BACKEND.posterior_state(asked, some))
    got = to_sums(merge(*states, by_key(query)), query)
    compare.sums(got, oracle.sums(query, rows), query, rows, F32, "parts")


@pytest.mark.long
def test_every_shape_of_shared_memory_is_that_of_the_kernels() -> None:
    """The host's count of bytes against what the sources say, of all kinds of tiles: one of each
    number of queries, rows of a tile and type."""
    from memokern.backends.cuda.posterior import planner
    from memokern.backends.cuda.posterior.variants import sweep_variant

    seen: set[tuple[int, int, bool]] = set()
    for dtype in variants.ROW_CODES:
        for tile in [*planner.tiles(dtype), *planner.tiles(dtype, backward=True)]:
            if (tile.queries, tile.rows, tile.backward) in seen:
                continue
            seen.add((tile.queries, tile.rows, tile.backward))
            variant = sweep_variant(dtype, tile, True, False)
            library = cuda_emulator.library(variant.program, dict(variant.macros))
            gaps = 11 * library.memokern_gap()
            entry = variant.entries[0].encode()
            assert library.memokern_shared_bytes(entry) - gaps == shared_of(variant)
