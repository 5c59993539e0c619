"""Costs: which queries are pruned and which are swept, and what that rests on."""

import pytest
import torch

import memokern
from memokern import ops
from memokern.backends import protocol
from memokern.backends.protocol import Call
from memokern.calls import RowLists, Scan
from memokern.strategies import costs as costs_module
from memokern.strategies import pruned
from memokern.strategies.costs import Costs, costs_of
from tests.cases import F64, normal, query_of
from tests.strategies.rows import indexed

pytestmark = pytest.mark.usefixtures("backend")


def scan_of(count, level):
    """Lists of these lengths; which rows they hold plays no part."""
    start = torch.cat([count.new_zeros(1), count.cumsum(0)])
    lists = RowLists(start, torch.zeros(int(start[-1]), dtype=torch.int64))
    return Scan(lists, torch.zeros(len(count), dtype=F64), level)


def test_the_split_is_the_cheapest_of_all():
    """Against every subset of the queries, for random prices and lists."""
    g = torch.Generator().manual_seed(0)
    n, b = 100, 6
    for _ in range(40):
        row, query, listed = (10 ** (2 * torch.rand(3, generator=g, dtype=F64))).tolist()
        costs = Costs(row, query, listed, 0.0)
        count = torch.randint(1, n, (b,), generator=g)
        level = (torch.rand(b, generator=g) > 0.2).long()
        count[level == 0] = 0

        def price(swept, row=row, query=query, listed=listed, count=count):
            k = int(swept.sum())
            return listed * int(count[~swept].sum()) + n * (row * (k > 0) + query * k)

        subsets = [
            torch.tensor([bool(mask >> i & 1) for i in range(b)]) | (level == 0)
            for mask in range(1 << b)
        ]
        best = min(price(s) for s in subsets)
        swept = pruned._swept_densely(scan_of(count, level), n, costs)
        assert bool(swept[level == 0].all())
        assert price(swept) <= best * (1 + 1e-9)


def test_auto_mixes_by_price():
    """Queries of few rows are pruned and those of many are swept, and the answer is the same."""
    data = indexed()
    sigma = torch.tensor([0.02, 30.0, 0.02, 30.0], dtype=F64)
    x = data.rows[:4] + sigma[:, None] * normal(4, 24)
    query, rows = query_of(x, sigma), data.as_rows()
    costs = Costs(row=1.0, query=1.0, listed=4.0, call=0.0)
    sums, c = pruned.posterior(query, rows, data.index, eps=1e-14, costs=costs, certificate=True)
    assert (c.levels == 0).tolist() == [False, True, False, True]
    assert c.rows_kept[1] == 300 and c.weight[1] == 0
    want = memokern.posterior(x, data, sigma, method="dense")
    torch.testing.assert_close(sums.mean, want.mean)
    torch.testing.assert_close(sums.log_z, want.log_z)
    # Where a call costs more than the whole sweep there is nothing to gain.
    dear = costs._replace(call=1e9)
    assert pruned.posterior(query, rows, data.index, eps=1e-14, costs=dear)[1] is None


def test_costs_are_measured_once_and_positive():
    x, rows = torch.zeros(1, 32), torch.zeros(4, 32, dtype=torch.uint8)
    costs = costs_of(x, rows)
    assert costs is costs_of(x, rows)
    assert costs.row >= 0 and min(costs.query, costs.listed, costs.call) > 0
    assert costs.dense(2, 10, 32) > costs.dense(1, 10, 32) > 0


def test_a_sweep_costs_what_was_timed_and_what_lies_between():
    """At one query and at all of the call the line is the timing; a list beyond what the last query
    adds is too long."""
    timed = costs_module.Timed(sweeps=(4.0, 5.2, 16.0, 64.0), listed=3.0, call=0.5)
    for b, took in ((1, 4.0), (2, 4.4), (4, 5.2), (10, 10.6), (16, 16.0), (64, 64.0), (80, 80.0)):
        assert timed.sweep(b) == pytest.approx(took)
        costs = timed.costs(b)
        assert costs.dense(b, 1, 1) == pytest.approx(took)
        assert costs.dense(1, 1, 1) == pytest.approx(4.0)
        assert (costs.listed, costs.call) == (3.0, 0.5)
    assert timed.costs(1) == timed.costs(4)  # of one alone nothing tells what another adds
    # Timings that fall with the number of queries give no query for nothing.
    odd = costs_module.Timed((4.0, 3.0, 2.0, 1.0), 3.0, 0.5).costs(16)
    assert odd.query > 0 and odd.row >= 0


def test_costs_are_measured_on_the_datas_device():
    """meta stands for an accelerator: nothing on it can be mixed with what is on the CPU."""
    with torch.device("meta"):
        timed = costs_module._sample("cpu", torch.float32, torch.float32, 32, 1 << 12)
    assert min(timed.sweeps) >= 0 and min(timed.listed, timed.call) > 0


def test_a_device_is_waited_for_while_costs_are_measured(monkeypatch):
    """A call on a GPU returns before its work is done."""
    waited, clock = [], iter(range(100))
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    costs_module._waiting("cpu")()
    assert waited == []
    wait = costs_module._waiting("cuda:1")
    monkeypatch.setattr(costs_module.time, "perf_counter", lambda: float(next(clock)))
    assert costs_module._seconds([lambda: waited.append("call")], wait) == [1.0]
    device = torch.device("cuda", 1)
    assert waited == ["call", device] * 2  # a first call, and one of a second: long enough


def test_the_dispatcher_is_left_out_where_it_has_nothing_to_do(monkeypatch):
    """The same results either way; with a gradient to record, or a profiler, it runs."""
    data = indexed()
    x = data.rows[:5] + 0.1 * normal(5, 24)
    query, rows = query_of(x, 0.1), data.as_rows()
    names = ("posterior", "bound_scan", "posterior_listed")
    own = [ops._direct(name, query, rows) for name in names]
    assert own == [protocol.choose(name, Call.of(x, rows.data)) for name in names]
    watched = query._replace(x=x.clone().requires_grad_())
    assert [ops._direct(name, watched, rows) for name in names] == [None] * 3
    with torch.profiler.profile():
        assert [ops._direct(name, query, rows) for name in names] == [None] * 3
    for method in ("pruned", "auto"):
        direct = memokern.posterior(x, data, 0.1, method=method)
        with monkeypatch.context() as patch:
            for module in (ops, pruned):
                patch.setattr(module, "undispatched", lambda *tensors: False)
            through = memokern.posterior(x, data, 0.1, method=method)
        for name in ("mean", "log_z", "mean_logit", "mean_bias", "weight_sq"):
            assert torch.equal(getattr(direct, name), getattr(through, name))


def test_queries_that_keep_too_many_rows_are_swept():
    """The scan gives them up, and the answer is the same."""
    n = 1500
    data = indexed(n)
    bias = normal(n, seed=3)
    sigma = torch.tensor([0.02, 30.0, 0.02, 30.0, 2.0], dtype=F64)
    x = data.rows[:5] + sigma[:, None] * normal(5, 24)
    query, rows = query_of(x, sigma, bias=bias), data.as_rows()
    projected = data.index.project(x, query.alpha)
    given_up = [False, True, False, True, True]
    found = pruned.scan_index(query, rows, data.index, projected, 1e-14, n // 10)
    assert (found.level == 0).tolist() == given_up
    # Where all rows may be listed none is.
    found = pruned.scan_index(query, rows, data.index, projected, 1e-14, n)
    assert (found.level > 0).all()
    costs = Costs(row=1.0, query=1.0, listed=30.0, call=0.0)  # 10 % of the rows
    sums, c = pruned.posterior(query, rows, data.index, eps=1e-14, costs=costs, certificate=True)
    assert (c.levels == 0).tolist() == given_up
    want = memokern.posterior(x, data, sigma, bias=bias, method="dense")
    torch.testing.assert_close(sums.mean, want.mean)
    far = query.take(torch.tensor(given_up))
    sums, c = pruned.posterior(far, rows, data.index, eps=1e-14, costs=costs, certificate=True)
    assert (c.levels == 0).all() and (c.rows_kept == n).all()
    torch.testing.assert_close(sums.mean, want.mean[torch.tensor(given_up)])


def test_the_longest_list_is_what_a_query_costs_in_a_sweep():
    def most(query, listed):
        return pruned._most_listed(1000, Costs(row=4.0, query=query, listed=listed, call=0.0))

    assert most(1.0, 20.0) == 50 and most(2.0, 20.0) == 100
    assert most(1.0, 0.1) == 1000 and most(1e-9, 1.0) == 1


def test_where_noise_gives_all_rows_weight_nothing_is_scanned(monkeypatch):
    """The scan is left out if that holds for every query; the answer is that of a sweep."""
    scans = []
    bounds = pruned._bounds
    monkeypatch.setattr(pruned, "_bounds", lambda *args: scans.append(1) or bounds(*args))
    data = indexed(1500)
    costs = Costs(row=1.0, query=1.0, listed=1.0, call=0.0)
    x = data.rows[:2] + normal(2, 24)
    for sigma, scanned in ((50.0, False), (0.02, True), ([50.0, 0.02], True)):
        query, rows = query_of(x, torch.as_tensor(sigma)), data.as_rows()
        sums, _ = pruned.posterior(query, rows, data.index, eps=1e-14, costs=costs)
        assert bool(scans) == scanned
        scans.clear()
        torch.testing.assert_close(
            sums.mean, memokern.posterior(x, data, query.sigma, method="dense").mean
        )
