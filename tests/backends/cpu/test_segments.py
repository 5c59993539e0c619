"""Queries that each see a segment of the rows: what a sweep over that segment alone gives."""

from __future__ import annotations

import pytest
import torch

from memokern.calls import Query, Rows, Segments, Sums
from tests import compare, harness, isas, oracle
from tests.cases import F16, F64, U8, Case

if "cpu" not in harness.INSTALLED:
    pytest.skip("the compiled module is missing", allow_module_level=True)

from memokern.backends.cpu.dense import posterior_segments

# Of 60 rows: neighbours that share, one of one row, overlaps, all rows, and the first one again.
SEGMENTS = Segments(
    torch.tensor([5, 5, 5, 0, 59, 20, 0, 5]), torch.tensor([17, 17, 30, 60, 60, 52, 1, 17])
)
CASES = [
    Case(8, 60, 5), Case(8, 60, 40, known=True), Case(8, 60, 70, U8, sigma=30.0, known=True),
    Case(8, 60, 33, F16, bias="normal"), Case(8, 60, 33, F64, x=F64, bias="holes"),
    Case(8, 60, 40, alpha=0.6, temperature=2.0, offset=100.0, known=True),
    Case(8, 60, 40, weighting="log", sigma=3.0), Case(8, 60, 40, sigma=0.0, bias="normal"),
    Case(8, 60, 300, x=F64, repeat=1e-3),
]  # fmt: skip


def of_query(b: int, query: Query, rows: Rows, of: Segments = SEGMENTS) -> tuple[Query, Rows]:
    """Query b alone, and the rows that it sees."""
    part, one = slice(int(of.first[b]), int(of.end[b])), slice(b, b + 1)
    bias = None if query.bias is None else query.bias[part]
    norms = None if rows.sq_norms is None else rows.sq_norms[part]
    numbers = {name: getattr(query, name)[one] for name in ("x", "sigma", "alpha", "temperature")}
    return query._replace(bias=bias, **numbers), rows._replace(data=rows.data[part], sq_norms=norms)


@pytest.mark.parametrize("isa", isas.usable())
def test_as_each_segment_alone(isa: str) -> None:
    for case in CASES:
        query, rows = case.problem()
        with isas.selected(isa):
            got = posterior_segments(query, rows, SEGMENTS)
        compare.check_types(got, query)
        for b in range(case.b):
            some, part = of_query(b, query, rows)
            mine = Sums(*(v[b : b + 1] for v in got))
            want, kind = oracle.sums(some, part), compare.unit("cpu", some, part)
            if want.mean.isnan().all():  # the only row that it sees has no weight
                assert torch.isneginf(mine.log_z) and mine.mean.isnan().all()
                continue
            compare.sums(mine, want, some, part, kind, (case, b))


def test_threads_and_shared_sweeps() -> None:
    """A few large segments, each on all threads, and many small ones, each on one."""
    before = torch.get_num_threads()
    try:
        for count, length in ((3, 4000), (200, 20)):
            query, rows = Case(count, 4000, 48, sigma=3.0).problem()
            first = torch.arange(count) * (4000 - length) // count
            of = Segments(first, first + length)
            torch.set_num_threads(3)
            got = posterior_segments(query, rows, of)
            compare.equal(posterior_segments(query, rows, of), got)
            torch.set_num_threads(1)
            compare.close(posterior_segments(query, rows, of), got, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("wrong", [(-1, 5), (5, 5), (5, 61), (7, 3)])
def test_segments_that_are_none(wrong: tuple[int, int]) -> None:
    query, rows = Case(2, 60, 5).problem()
    of = Segments(torch.tensor([0, wrong[0]]), torch.tensor([4, wrong[1]]))
    with pytest.raises(ValueError, match="segments must hold numbers of rows"):
        posterior_segments(query, rows, of)


def test_no_query() -> None:
    query, rows = Case(0, 60, 5).problem()
    none = torch.zeros(0, dtype=torch.int64)
    assert posterior_segments(query, rows, Segments(none, none)).mean.shape == (0, 5)
