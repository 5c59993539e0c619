"""The planner: which queries are pruned and which are swept, and what that rests on."""

import torch
from index_cases import F64, backend, normal, with_index

import memokern
from memokern import TrainingSet
from memokern.backends import protocol as backends
from memokern.strategies import pruned as pruning
from memokern.validate import as_rows

__all__ = ["backend"]  # a fixture that every test here uses


def indexed(n=300, d=24):
    return with_index(TrainingSet(normal(n, d, seed=5) * torch.logspace(0, -1, d)))


def test_the_split_is_the_cheapest_of_all():
    """Against every subset of the queries, for random prices and lists."""
    g = torch.Generator().manual_seed(0)
    n, b = 100, 6
    for _ in range(40):
        row, query, listed = (10 ** (2 * torch.rand(3, generator=g, dtype=F64))).tolist()
        costs = pruning.Costs(row, query, listed, 0.0)
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
        swept = pruning._swept_densely(count, level, n, costs)
        assert bool(swept[level == 0].all())
        assert price(swept) <= best * (1 + 1e-9)


def test_auto_mixes_by_price():
    """Queries of few rows are pruned and those of many are swept, and the answer is the same."""
    data = indexed()
    sigma = torch.tensor([0.02, 30.0, 0.02, 30.0], dtype=F64)
    x = data.rows[:4] + sigma[:, None] * normal(4, 24)
    query = pruning.Query(x, sigma, torch.ones(4, dtype=F64), torch.ones(4, dtype=F64), None)
    costs = pruning.Costs(row=1.0, query=1.0, listed=4.0, call=0.0)
    sums, c = pruning.posterior(
        query, as_rows(data), data.index, eps=1e-14, costs=costs, certificate=True
    )
    assert (c.levels == 0).tolist() == [False, True, False, True]
    assert c.rows_kept[1] == 300 and c.weight[1] == 0
    want = memokern.posterior(x, data, sigma, method="dense")
    torch.testing.assert_close(sums[0], want.mean)
    torch.testing.assert_close(sums[1], want.log_z)
    # Where a call costs more than the whole sweep there is nothing to gain.
    dear = costs._replace(call=1e9)
    assert pruning.posterior(query, as_rows(data), data.index, eps=1e-14, costs=dear)[1] is None


def test_costs_are_measured_once_and_positive():
    x, rows = torch.zeros(1, 32), torch.zeros(4, 32, dtype=torch.uint8)
    costs = pruning.costs_of(x, rows)
    assert costs is pruning.costs_of(x, rows)
    assert costs.row >= 0 and min(costs.query, costs.listed, costs.call) > 0
    assert costs.dense(2, 10, 32) > costs.dense(1, 10, 32) > 0


def test_a_device_is_waited_for_while_costs_are_measured(monkeypatch):
    """A call on a GPU returns before its work is done."""
    waited, clock = [], iter(range(100))
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    pruning._waiting("cpu")()
    assert waited == []
    wait = pruning._waiting("cuda:1")
    monkeypatch.setattr(pruning.time, "perf_counter", lambda: float(next(clock)))
    assert pruning._seconds(lambda: waited.append("call"), wait) == 1.0
    device = torch.device("cuda", 1)
    assert waited == ["call", device] * 2  # a first call, and one of a second: long enough


def test_the_dispatcher_is_left_out_where_it_has_nothing_to_do(monkeypatch):
    """The same results either way; with a gradient to record, or a profiler, it runs."""
    data = indexed()
    x = data.rows[:5] + 0.1 * normal(5, 24)
    names = ("posterior", "bound_scan", "posterior_on_support")
    own = [pruning.shortest(name, x) for name in names]
    assert own == [getattr(backends.choose_for("cpu", name), name) for name in names]
    watched = x.clone().requires_grad_()
    operations = [getattr(torch.ops.memokern, name) for name in names]
    assert [pruning.shortest(name, watched) for name in names] == operations
    with torch.profiler.profile():
        assert [pruning.shortest(name, x) for name in names] == operations
    for method in ("pruned", "auto"):
        direct = memokern.posterior(x, data, 0.1, method=method)
        with monkeypatch.context() as patch:
            patch.setattr(pruning, "undispatched", lambda *tensors: False)
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
    one = torch.ones(5, dtype=F64)
    query, rows = pruning.Query(x, sigma, one, one, bias), as_rows(data)
    projected = data.index.project(x, one)
    given_up = [False, True, False, True, True]
    *_, level = pruning.bound_scan(query, rows, data.index, projected, 1e-14, n // 10)
    assert (level == 0).tolist() == given_up
    # With a cap of all rows none is.
    assert (pruning.bound_scan(query, rows, data.index, projected, 1e-14, n)[3] > 0).all()
    costs = pruning.Costs(row=1.0, query=1.0, listed=30.0, call=0.0)  # 10 % of the rows
    sums, c = pruning.posterior(query, rows, data.index, eps=1e-14, costs=costs, certificate=True)
    assert (c.levels == 0).tolist() == given_up
    want = memokern.posterior(x, data, sigma, bias=bias, method="dense")
    torch.testing.assert_close(sums[0], want.mean)
    far = query.take(torch.tensor(given_up))
    sums, c = pruning.posterior(far, rows, data.index, eps=1e-14, costs=costs, certificate=True)
    assert (c.levels == 0).all() and (c.rows_kept == n).all()
    torch.testing.assert_close(sums[0], want.mean[torch.tensor(given_up)])


def test_the_cap_is_what_a_query_costs_in_a_sweep():
    def cap(query, listed):
        return pruning._cap(1000, pruning.Costs(row=4.0, query=query, listed=listed, call=0.0))

    assert cap(1.0, 20.0) == 50 and cap(2.0, 20.0) == 100
    assert cap(1.0, 0.1) == 1000 and cap(1e-9, 1.0) == 1


def test_where_noise_gives_all_rows_weight_nothing_is_scanned(monkeypatch):
    """The scan is left out if that holds for every query; the answer is that of a sweep."""
    scans = []
    scan = pruning.bound_scan
    monkeypatch.setattr(pruning, "bound_scan", lambda *args: scans.append(1) or scan(*args))
    data = indexed(1500)
    costs = pruning.Costs(row=1.0, query=1.0, listed=1.0, call=0.0)
    x, one = data.rows[:2] + normal(2, 24), torch.ones(2, dtype=F64)
    for sigma, scanned in ((50.0, False), (0.02, True), ([50.0, 0.02], True)):
        sigma = torch.as_tensor(sigma, dtype=F64).expand(2).clone()
        query = pruning.Query(x, sigma, one, one, None)
        sums, _ = pruning.posterior(query, as_rows(data), data.index, eps=1e-14, costs=costs)
        assert bool(scans) == scanned
        scans.clear()
        torch.testing.assert_close(sums[0], memokern.posterior(x, data, sigma, method="dense").mean)
