"""Who should look for the nearest rows, by count: direct differences in CUDA cores read each row
once and need nothing else, products in tensor cores are faster for many queries. Nothing here was
measured on a GPU; only ratios matter."""

from __future__ import annotations

import functools

import torch

from memokern.backends.cuda.core.machine import Machine
from memokern.backends.cuda.nearest.variants import MOST_NEIGHBOURS, TEAMS
from memokern.backends.cuda.posterior.costs import CLOCK, LAUNCH, RATES

_LANES = 128  # of a multiprocessor, each of which starts an operation in a clock
# Operations for a feature of a row and a query: a difference and a square; and for a feature of a
# row, or of a query, that is loaded and converted.
_DIFFERENCE, _LOADED = 2.0, 2.0
_LEAST_QUERIES = 16  # of a tile of products, fewer cost as much
_PRODUCTS = 6.0  # operations for a feature of a row and a query: three products of tf32
_TF32 = 0.5  # of the rate of half-precision products
_LAUNCHES, _LAUNCHES_OF_PRODUCTS = 4, 12


def seconds(rows: torch.dtype, b: int, n: int, d: int, machine: Machine) -> float:
    """By direct differences."""
    team = TEAMS[b > 1]
    loaded = _LOADED * (1 / team + 1 / 4)  # a row serves a team, and a query four rows
    each = (_DIFFERENCE + loaded) / (_LANES * CLOCK * machine.multiprocessors)
    moved = float(n) * d * rows.itemsize / RATES[machine.arch].memory
    return max(moved, -(-b // team) * team * float(n) * d * each) + _LAUNCHES * LAUNCH


def seconds_of_products(rows: torch.dtype, b: int, n: int, d: int, machine: Machine) -> float:
    """By products of tf32 and a look at the groups of rows that these leave."""
    rates = RATES[machine.arch]
    moved = float(n) * d * rows.itemsize / rates.memory
    work = _PRODUCTS * max(b, _LEAST_QUERIES) * float(n) * d / (_TF32 * rates.group)
    return max(moved, work) + _LAUNCHES_OF_PRODUCTS * LAUNCH


@functools.lru_cache(4096)
def refuses(b: int, n: int, d: int, k: int, rows: torch.dtype, machine: Machine) -> str | None:
    """Why another backend should look for them, in one line, or None."""
    if k > MOST_NEIGHBOURS:
        return f"it finds at most {MOST_NEIGHBOURS} neighbours, and {k} are asked for"
    here = seconds(rows, max(1, b), n, d, machine)
    products = seconds_of_products(rows, max(1, b), n, d, machine)
    if here > products:
        return (
            f"by count, {b} queries on {n:,} rows are faster by products"
            f" ({1e3 * products:.2g} ms against {1e3 * here:.2g})"
        )
    return None
