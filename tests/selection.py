"""Which cases `make test` runs of grids that are larger than its time: the others are marked long,
and `make test-all` runs all.

A case stays or goes by a checksum of its name: the same ones on every machine, and of each value on
a grid's axes some. Every test keeps at least one case.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def select(items: Sequence[Any], isas: Sequence[str], interpreted: Iterable[str]) -> None:
    """Marks the others long. isas: names of backends that are one source compiled for one
    instruction set after the other; interpreted: names of backends whose kernels are interpreted.
    """
    one_other_instruction_set(items, isas)
    for item in items:
        named = item.get_closest_marker("long_on")
        if named and backend_of(item) in named.args:
            item.add_marker(pytest.mark.long)
    shares = {item: share(item, set(interpreted)) for item in items}
    tests: dict[str, list[Any]] = {}
    for item, every in shares.items():
        if every > 1 and not item.get_closest_marker("long"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in tests.values():
        kept = [case for case in cases if checksum(case.nodeid) % shares[case] == 0]
        for case in cases:
            if case not in (kept or cases[:1]):
                case.add_marker(pytest.mark.long)


def share(item: Any, interpreted: set[str]) -> int:
    """Of how many cases one is run: what the marker `one_of(n)` says, and four times as many where
    an interpreter takes a thousand times as long as what it interprets."""
    marker = item.get_closest_marker("one_of")
    every: int = marker.args[0] if marker else 1
    return 4 * every if backend_of(item) in interpreted else every


def one_other_instruction_set(items: Sequence[Any], isas: Sequence[str]) -> None:
    """The same source is compiled for each instruction set: every case runs on the one in use and
    on one of the others, another from case to case."""
    for item in items:
        backend = backend_of(item)
        if backend in isas:
            case = item.nodeid.replace(backend, "")
            if backend != isas[checksum(case) % len(isas)]:
                item.add_marker(pytest.mark.long)


def backend_of(item: Any) -> str | None:
    """The backend that a case is of."""
    call = getattr(item, "callspec", None)
    return call.params.get("backend") if call else None


def checksum(name: str) -> int:
    """The same in every process."""
    return zlib.crc32(name.encode())
