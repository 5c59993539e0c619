"""Labels that differ from query to query: lists of rows, or segments of rows sorted by label."""

from __future__ import annotations

import math

import pytest
import torch

import memokern
from memokern import Denoiser, ops, regularizers
from memokern.backends.cpu import Cpu, dense
from memokern.conditional import lists
from tests import harness
from tests.cases import F32, F64
from tests.labelled import CONDITIONS, LABELS, LOG_WEIGHTS, ROWS, SIGMA, B, D, N, X, data_of, normal


@pytest.fixture(params=harness.ON_CPU, autouse=True)
def backend(request):
    with harness.preferred(request.param):
        yield request.param


def test_many_labels_go_by_lists_with_gradients():
    data, label = data_of(), torch.arange(6)
    x = X.clone().requires_grad_()
    listed = memokern.posterior(x, data, 0.5, label=label)
    (grad,) = torch.autograd.grad(listed.log_density.sum(), x)
    for i in range(6):
        alone = memokern.posterior(X[i : i + 1], data.where(i), 0.5)
        torch.testing.assert_close(listed.mean[i].detach(), alone.mean[0])
        torch.testing.assert_close(listed.log_density[i].detach(), alone.log_density[0])
        torch.testing.assert_close(grad[i], alone.score[0])


@pytest.mark.parametrize("reg", [
    None, regularizers.Tikhonov(0.01), regularizers.GaussianSmoothing(0.1, 4),
    regularizers.NoiseUnconditioned(),
], ids=["none", "tikhonov", "smoothing", "log"])  # fmt: skip
def test_denoisers_of_many_labels_go_by_lists(reg, backend, monkeypatch):
    """One sweep over lists, where the weighting has them, and what each label alone gives."""
    data, label = data_of(F32), torch.tensor([4, 0, 5, 1, 4, 6])
    network, x = Denoiser(data, regularizer=reg), X.float()
    each = [network.evaluate(x[i : i + 1], SIGMA[i : i + 1], int(label[i])) for i in range(B)]
    seen, listed = [], ops.posterior_listed
    monkeypatch.setattr(
        ops, "posterior_listed", lambda q, *a: seen.append(len(q.x)) or listed(q, *a)
    )
    copies = 4 if isinstance(reg, regularizers.GaussianSmoothing) else 1
    got = network.evaluate(x.reshape(2, 3, D), SIGMA.reshape(2, 3), label.reshape(2, 3))
    assert seen == ([] if isinstance(reg, regularizers.NoiseUnconditioned) else [copies * B])
    assert got.posterior.n == 9
    for i, one in enumerate(each):
        at = divmod(i, 3)
        torch.testing.assert_close(got.x0[at], one.x0[0], rtol=1e-5, atol=1e-5)
        if one.log_potential is not None:
            want = one.log_potential[0].double()
            torch.testing.assert_close(got.log_potential[at].double(), want, rtol=1e-5, atol=1e-5)
        total = got.posterior.log_weight_total.reshape(copies, B)[:, i]
        torch.testing.assert_close(total, one.posterior.log_weight_total.reshape(copies))


@pytest.mark.parametrize("reg", [
    None, regularizers.Tikhonov(0.01), regularizers.GaussianSmoothing(0.1, 4),
    regularizers.NoiseUnconditioned(),
], ids=["none", "tikhonov", "smoothing", "log"])  # fmt: skip
def test_many_labels_go_by_segments_without_gradients(reg, backend, monkeypatch):
    """One call of the CPU kernels over rows sorted by label, and what each label alone gives."""
    monkeypatch.setattr(lists, "LEAST_SWEPT", 0)
    data, label, bias = data_of(F32), torch.tensor([4, 0, 5, 1, 4, 6]), normal(N, seed=8)
    network, x, seen = Denoiser(data, regularizer=reg), X.float(), []
    run = dense.posterior_segments
    if backend == "cpu":
        counted = staticmethod(lambda q, *a: seen.append(len(q.x)) or run(q, *a))
        monkeypatch.setattr(Cpu, "posterior_segments", counted)
    each = [
        network.evaluate(x[i : i + 1], SIGMA[i : i + 1], int(label[i]), bias=bias) for i in range(B)
    ]
    copies = 4 if isinstance(reg, regularizers.GaussianSmoothing) else 1
    got = network.evaluate(x.reshape(2, 3, D), SIGMA.reshape(2, 3), label.reshape(2, 3), bias=bias)
    assert seen == ([copies * B] if backend == "cpu" else [])
    assert got.posterior.n == 9
    for i, one in enumerate(each):
        torch.testing.assert_close(got.x0[divmod(i, 3)], one.x0[0], rtol=1e-5, atol=1e-5)
        total = got.posterior.log_weight_total.reshape(copies, B)[:, i]
        torch.testing.assert_close(total, one.posterior.log_weight_total.reshape(copies))
    seen.clear()
    x.requires_grad_()
    network(x, SIGMA, label, bias=bias).sum().backward()
    assert seen == [] and x.grad.isfinite().all()


def test_rows_sorted_by_label(monkeypatch):
    data = data_of(F32)
    by_label = data.sorted_by_label()
    assert by_label is data.sorted_by_label() is by_label.sorted_by_label()
    order = torch.argsort(LABELS, stable=True)
    for name, want in {
        "labels": LABELS,
        "log_weights": LOG_WEIGHTS,
        "conditions": CONDITIONS,
    }.items():
        assert torch.equal(getattr(by_label, name), want[order])
    assert torch.equal(by_label.rows, data.rows[order])
    assert torch.equal(by_label.sq_norms, data.sq_norms[order])
    data.labels = LABELS.flip(0)
    assert torch.equal(data.sorted_by_label().labels, LABELS.sort().values)
    # More bytes than may be kept twice, and rows of which an index may save more: each label alone.
    monkeypatch.setattr(lists, "LEAST_SWEPT", 0)
    ways, label = lists.Allowed(segments=True), torch.arange(6)
    assert lists.of_labels(data, label, ways).own.segments is not None
    monkeypatch.setattr(lists, "MOST_UNSCANNED", 10)
    assert lists.of_labels(data, label, ways._replace(indexed=True)) is None
    monkeypatch.setattr(lists, "MOST_SORTED", 100)
    assert lists.of_labels(data, label, ways) is None


def test_lists_of_labels_and_what_has_none(monkeypatch):
    data, x = data_of(labels=LABELS - 1), X
    with pytest.raises(ValueError, match="no row has the label 9"):
        memokern.posterior(x, data, 0.5, label=torch.tensor([0, 1, 2, 3, 4, 9]))
    label = torch.tensor([5, -1, 2, 3, 4, 0])  # here some rows have the label -1
    got = memokern.posterior(x, data, 0.5, label=label)
    one = memokern.posterior(x[1:2], data, 0.5, label=-1)
    torch.testing.assert_close(got.mean[1], one.mean[0])
    assert one.n == 9
    whole = memokern.posterior(x, data_of(), 0.5, label=torch.tensor([5, -1, 2, 3, 4, 0]))
    torch.testing.assert_close(whole.mean[1], memokern.posterior(x[1], data_of(), 0.5).mean)
    # Rows without weight, a whole class of them, and weights that have a gradient.
    none = LOG_WEIGHTS.clone()
    none[LABELS == 3], none[3::11] = -math.inf, -math.inf
    bias = torch.zeros(N, dtype=F64, requires_grad=True)
    found = memokern.posterior(x, data_of(log_weights=none), 0.5, label=torch.arange(6), bias=bias)
    (grad,) = torch.autograd.grad(found.log_density[[0, 1, 2, 4]].sum(), bias)
    wanted = torch.zeros(N, dtype=F64)
    for i in range(6):
        total = found.log_weight_total[i]
        torch.testing.assert_close(total, none[i == LABELS].logsumexp(0))
        if i in (0, 1, 2, 4):
            own = torch.where(i == LABELS, none, -math.inf)
            logit = -(x[i] - ROWS).square().sum(1) / 2 / 0.5**2 + own
            wanted += logit.softmax(0) - own.softmax(0)
    torch.testing.assert_close(grad, wanted)


def test_labels_that_change_are_seen():
    data = data_of()
    before = memokern.posterior(X, data, 0.5, label=3, leave_out=-1).mean
    data.labels[:] = (torch.arange(N) + 1) % 7
    after = memokern.posterior(X, data, 0.5, label=3, leave_out=-1).mean
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, memokern.posterior(X, data.where(3), 0.5).mean)
