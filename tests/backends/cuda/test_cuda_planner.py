"""Plans fit the machine, whatever the problem."""

from __future__ import annotations

import itertools

import pytest
import torch

from memokern.backends.cuda import variants as listing
from memokern.backends.cuda.core.machine import KNOWN, Machine
from memokern.backends.cuda.core.variant import ROW_CODES
from memokern.backends.cuda.posterior import costs, planner, variants
from memokern.backends.cuda.posterior.tiles import DIVISIONS, holds_sums, room, shared_bytes

MACHINES = [
    Machine("sm_90a", 132, 227 << 10, 50 << 20), Machine("sm_90a", 78, 227 << 10, 50 << 20),
    Machine("sm_90a", 16, 227 << 10, 6 << 20), Machine("sm_100a", 148, 227 << 10, 126 << 20),
]  # fmt: skip
WIDTHS = (257, 272, 384, 511, 784, 1000, 3072, 3073, 8192, 12_288)


@pytest.mark.parametrize("rows", ROW_CODES, ids=str)
def test_a_plan_fits(rows: torch.dtype) -> None:
    listed = {v.name for v in listing.variants()}
    for machine, d, b, n in itertools.product(MACHINES, WIDTHS, (1, 17, 64), (1, 50_000)):
        for most in (8, 16):
            tile = planner.plan(b, n, d, rows, machine, most)
            if tile is None:
                assert d > most // 16 * planner.widest(rows) or most == 8
                continue
            assert d <= tile.cluster * tile.features and tile.cluster <= most
            assert shared_bytes(rows, tile) <= room(machine.shared, tile.resident)
            assert holds_sums(tile.features, tile.queries, tile.resident)
            assert tile.features % 16 == 0 and tile.rows % 16 == 0
            assert variants.sweep_variant(rows, tile, True, False).name in listed
            tile = planner.plan(b, n, d, rows, machine, most, rare=True)
            assert tile is not None and tile.queries == 16
            assert variants.sweep_variant(rows, tile, False, True).name in listed
            tile = planner.plan(b, n, d, rows, machine, most, backward=True)
            if tile is None:
                assert most == 8 or d > planner.widest(rows, backward=True)
                continue
            assert shared_bytes(rows, tile) <= machine.shared and tile.resident == 1
            for bulk, log in itertools.product((False, True), (False, True)):
                assert variants.sweep_variant(rows, tile, bulk, log).name in listed


def test_plans_depend_on_nothing_else() -> None:
    for machine in MACHINES:
        first = planner.plan(3, 9999, 3072, torch.uint8, machine)
        planner.plan.cache_clear()
        planner.tile_of.cache_clear()
        assert planner.plan(3, 9999, 3072, torch.uint8, machine) == first


def test_variants_have_names_of_their_own() -> None:
    found = listing.variants()
    assert len({v.name for v in found}) == len(found)
    assert len({(v.program, v.macros) for v in found}) == len(found)
    assert {arch for arch, _ in KNOWN.values()} == set(variants.TARGETS)
    used = {(t.cluster, t.features) for rows in ROW_CODES for t in planner.tiles(rows)}
    assert used == {(c, ds) for c, ds, _ in DIVISIONS}


def test_costs_are_at_least_what_the_memory_needs() -> None:
    """And no faster with more rows, more queries or more features."""
    machine = MACHINES[0]
    for rows in ROW_CODES:
        for d in (300, 3072):
            tile = planner.plan(16, 50_000, d, rows, machine)
            floor = 50_000 * d * rows.itemsize / costs.RATES["sm_90a"].memory
            assert costs.sweep_seconds(rows, tile, 16, 50_000, machine) >= floor
            assert costs.chunked_seconds(rows, 16, 50_000, d, machine) >= floor
        for cost in (
            lambda b, n, d, rows=rows: costs.chunked_seconds(rows, b, n, d, machine),
            lambda b, n, d, rows=rows: costs.sweep_seconds(
                rows, planner.plan(b, n, d, rows, machine), b, n, machine
            ),
        ):
            assert cost(1, 1000, 512) <= cost(1, 100_000, 512) <= cost(1, 100_000, 4096)
            assert cost(1, 1000, 512) <= cost(64, 1000, 512)


def test_few_queries_on_wide_rows_are_swept_here() -> None:
    """What the kernels are for."""
    for rows, d, b in itertools.product(ROW_CODES, (512, 3072), (1, 8, 16)):
        assert planner.refuses(b, 50_000, d, rows, MACHINES[0]) is None
