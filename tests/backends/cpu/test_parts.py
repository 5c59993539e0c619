"""What only the compiled kernels have: their exponential, threads, the work of several at once."""

from __future__ import annotations

import threading

import pytest
import torch

from memokern.calls import RowLists, Rows
from tests import compare, compiled, harness, oracle
from tests.cases import F32, F64, U8, Case, normal, query_of, random_lists
from tests.plain_index import PlainIndex, check_lists

if "cpu" not in harness.INSTALLED:
    pytest.skip("the compiled module is missing", allow_module_level=True)


@pytest.fixture
def threads():
    """Sets their number; afterwards it is what it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("isa", compiled.isas() or [None])
def test_exponential(isa: str | None, dtype: torch.dtype) -> None:
    """The stated bounds, on a dense set of arguments of the range that the sweeps use."""
    if isa is None:
        pytest.skip("memokern._testing is missing: build with MEMOKERN_BUILD_TESTING=1")
    x = torch.cat(
        [torch.linspace(-86.9, 0, 1_000_003, dtype=F64), -torch.logspace(-12, 0, 10_001, dtype=F64)]
    ).to(dtype)
    for base_two, exact, bound in ((False, torch.exp, 2e-7), (True, torch.exp2, 2.7e-7)):
        y, want = compiled.exponential(isa, x, base_two), exact(x.to(F64))
        allowed = 1e-15 if dtype == F64 else bound
        assert ((y.to(F64) - want).abs() / want).max().item() < allowed, base_two
    tiny = torch.tensor([-1e4, -torch.inf, torch.nan], dtype=dtype)
    out = compiled.exponential(isa, tiny, False)
    assert out[0] == 0 and out[1] == 0 and torch.isnan(out[2])


@pytest.mark.parametrize(("b", "d"), [(1, 100), (30, 100), (600, 2)])
def test_threads(b: int, d: int, threads) -> None:
    """Same threads, same bits; another number, the same within rounding; many at once."""
    query, rows = Case(b, 2000, d, sigma=3.0).problem()

    def run() -> list[torch.Tensor]:
        state = harness.posterior_state("cpu", query, rows)
        return [*harness.posterior("cpu", query, rows), *state[1:7]]

    results = {}
    for count in (1, 2, 3):
        threads(count)
        results[count] = run()
        compare.equal(run(), results[count])
    for count in (2, 3):
        compare.close(results[count][:5], results[1][:5], rtol=1e-5, atol=1e-5)
    threads(1)
    outputs: list = [None] * 4

    def work(i: int) -> None:
        torch.set_num_threads(1)
        outputs[i] = run()

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    with harness.poisoned():  # which is a setting of the process: no thread may change it
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    for out in outputs:
        compare.equal(out, results[1])


@pytest.mark.parametrize("b", [1, 5, 65])
def test_threads_of_a_scan(b: int, threads) -> None:
    """Parts of rows and blocks of queries: each thread count proves, and two runs are the same."""
    values = normal(3000, 40, seed=4) * torch.linspace(3, 0.1, 40, dtype=F64)
    rows = Rows(values.to(F32))
    index = PlainIndex(rows, dims=(8, 12, 16, 24), edges=(8, 10, 12, 16, 24, 32))
    rows = index.rows_with_norms(rows)
    query = query_of((rows.data[:b].double() + normal(b, 40, seed=1)).to(F32), 1.0)
    t, sums = oracle.logits(query, rows), []
    for count in (1, 2, 3):
        threads(count)
        found = harness.bound_scan("cpu", query, rows, index.bounds(query))
        flat = (*found.lists, found.threshold, found.level)
        check_lists(flat, t)
        again = harness.bound_scan("cpu", query, rows, index.bounds(query))
        compare.equal((*again.lists, again.threshold, again.level), flat)
        sums.append(harness.listed("cpu", query, rows, found.lists))
    for other in sums[1:]:  # lists may differ by rows that carry 1e-6 of the weight together
        for a, e in zip(other, sums[0], strict=True):
            assert (a - e).abs().max() <= 2e-6 * (1 + e.abs().max())


@pytest.mark.parametrize(("b", "dtype"), [(1, U8), (30, F32)])
def test_threads_of_lists(b: int, dtype: torch.dtype, threads) -> None:
    """One long list in pieces, and many: the pieces are joined as if there were none."""
    query, rows = Case(b, 1500, 60, dtype, sigma=2.0, alpha=0.9, temperature=1.3,
                       bias="normal").problem()  # fmt: skip
    lists: RowLists = random_lists(1500, b, 1)
    results = []
    for count in (1, 2, 5):
        threads(count)
        got = harness.listed("cpu", query, rows, lists)
        ones = type(got)(*(torch.ones_like(v) for v in got))
        back = harness.listed_backward("cpu", query, rows, lists, got, ones)
        results.append([v for v in (*got, *back) if v.numel()])
    for other in results[1:]:
        for a, e in zip(other, results[0], strict=True):
            tol = 2e-7 if a.dtype == F32 else 1e-12
            assert (a - e).abs().max() <= tol * (1 + e.abs().max())
