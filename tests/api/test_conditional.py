"""Labels, conditions and rows left out, against the definition written down."""

from __future__ import annotations

import math

import pytest
import torch

import memokern
from memokern import Denoiser, Given, TrainingSet, ops, regularizers, samplers
from tests import cases, harness
from tests.cases import F32, F64
from tests.labelled import (
    ASKED,
    CASES,
    CONDITIONS,
    LABELS,
    LOG_WEIGHTS,
    ROWS,
    SIGMA,
    B,
    D,
    K,
    N,
    X,
    data_of,
    normal,
)


@pytest.fixture(params=harness.ON_CPU, autouse=True)
def backend(request):
    with harness.preferred(request.param):
        yield request.param


def logits(x, sigma, label=None, condition=None, bandwidth=None, leave_out=None):
    """l_n of the definition [B, N]."""
    found = -(x[:, None] - ROWS).square().sum(-1) / 2 / sigma[:, None] ** 2 + LOG_WEIGHTS
    if condition is not None:
        gap = (condition[:, None] - CONDITIONS).square().sum(-1)
        found = found - gap / 2 / bandwidth[:, None] ** 2
    if label is not None:
        found = found.masked_fill(label[:, None] != LABELS, -math.inf)
    if leave_out is not None:
        found = found.masked_fill(leave_out[:, None] == torch.arange(N), -math.inf)
    return found


@pytest.mark.parametrize("names", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
def test_as_the_definition(names, dtype, backend):
    if backend == "triton" and (dtype == F64 or names != CASES["all"]):
        pytest.skip("interpreted kernels: one of all")
    asked = {name: ASKED[name] for name in names}
    got = memokern.posterior(X.to(dtype), data_of(dtype), SIGMA, **asked)
    want = logits(X, SIGMA, **asked)
    tol = 1e-4 if dtype == F32 else 1e-12
    weights = want.softmax(1)
    torch.testing.assert_close(got.mean.double(), weights @ ROWS, rtol=tol, atol=tol)
    if "condition" not in names:
        torch.testing.assert_close(got.log_z, want.logsumexp(1), rtol=tol, atol=tol)
    torch.testing.assert_close(got.ess, 1 / weights.square().sum(1), rtol=tol, atol=tol)
    # The density of x given what is asked for.
    far = logits(ROWS.new_zeros(B, D), torch.full((B,), math.inf, dtype=F64), **asked)
    density = want.logsumexp(1) - far.logsumexp(1) - D * (math.log(2 * math.pi) / 2 + SIGMA.log())
    torch.testing.assert_close(got.log_density, density, rtol=tol, atol=tol)


def test_batches_of_any_shape_and_the_users_order():
    x, label = X.reshape(2, 3, D), ASKED["label"].reshape(2, 3)
    got = memokern.posterior(x, data_of(), 0.5, label=label, leave_out=7)
    flat = memokern.posterior(X, data_of(), 0.5, label=ASKED["label"], leave_out=7)
    assert got.mean.shape == (2, 3, D) and got.log_z.shape == (2, 3)
    assert torch.equal(got.mean.reshape(B, D), flat.mean)
    assert torch.equal(got.log_z.reshape(B), flat.log_z)
    empty = memokern.posterior(X[:0], data_of(), 0.5, label=ASKED["label"][:0])
    assert empty.mean.shape == (0, D)
    one = memokern.posterior(X[0], data_of(), 0.5, condition=CONDITIONS[0], bandwidth=0.1)
    assert one.mean.shape == (D,) and one.log_z.shape == ()


def test_the_limits_of_the_bandwidth():
    data = data_of(conditions=(CONDITIONS * 2).round() / 2)
    known = data.conditions[4]
    same = (data.conditions == known).all(1)
    got = memokern.posterior(X, data, 0.5, condition=known, bandwidth=0.0)
    want = memokern.posterior(X, data.subset(same), 0.5)
    torch.testing.assert_close(got.mean, want.mean)
    torch.testing.assert_close(got.log_z, want.log_z)
    torch.testing.assert_close(got.log_density, want.log_density)
    # As h falls, only the nearest condition counts, however far it is.
    near = memokern.posterior(X, data, 0.5, condition=known + 0.1, bandwidth=1e-200)
    torch.testing.assert_close(near.mean, want.mean)
    torch.testing.assert_close(near.log_density, want.log_density)
    wide = memokern.posterior(X, data, 0.5, condition=known, bandwidth=1e12)
    torch.testing.assert_close(wide.mean, memokern.posterior(X, data, 0.5).mean)
    with pytest.raises(ValueError, match=r"no row has it: the nearest is 0\.1"):
        memokern.posterior(X, data, 0.5, condition=known + torch.tensor([0.1, 0]), bandwidth=0.0)


def test_queries_alone_and_together():
    """What a query asks for does not depend on the others."""
    data = data_of()
    together = memokern.posterior(X, data, SIGMA, **ASKED)
    for i in range(B):
        alone = memokern.posterior(
            X[i], data, SIGMA[i], **{name: value[i] for name, value in ASKED.items()}
        )
        torch.testing.assert_close(alone.mean, together.mean[i], rtol=1e-12, atol=1e-12)


def test_gradients(backend):
    if backend == "triton":
        pytest.skip("float64 goes to the reference")
    data = data_of()

    def sums(x, condition, bandwidth):
        found = memokern.posterior(
            x, data, 0.7, condition=condition, bandwidth=bandwidth, label=ASKED["label"][:3]
        )
        return found.mean, found.log_z, found.mean_logit, found.log_density

    inputs = [v[:3].clone().requires_grad_() for v in (X, ASKED["condition"], ASKED["bandwidth"])]
    assert torch.autograd.gradcheck(sums, inputs)
    one = [v[:1].clone().requires_grad_() for v in (X, ASKED["condition"], ASKED["bandwidth"])]
    assert torch.autograd.gradgradcheck(lambda *v: memokern.posterior(
        v[0], data, 0.7, condition=v[1], bandwidth=v[2]).mean, one)  # fmt: skip


def sweeps_of(monkeypatch, call):
    """How many queries each sweep over the rows had."""
    seen, sweep = [], ops.posterior

    def counted(query, rows):
        if rows.dim == D:  # not one that adds up biases alone
            seen.append(len(query.x))
        return sweep(query, rows)

    with monkeypatch.context() as patch:
        patch.setattr(ops, "posterior", counted)
        call()
    return seen


@pytest.mark.parametrize("names", [("condition", "bandwidth"), ("leave_out",)], ids=str)
def test_what_differs_is_one_sweep(names, backend, monkeypatch):
    """Of the kernels that take it; queries that share all share a bias."""
    data, asked = data_of(F32), {name: ASKED[name] for name in names}
    x = X.float()
    seen = sweeps_of(monkeypatch, lambda: memokern.posterior(x, data, 0.5, **asked))
    found = memokern.explain(x, data, 0.5, condition=asked.get("condition"), leave_out=3)
    if backend == "triton":
        assert len(seen) == 5 and sum(seen) == B
        assert "as triton does not: it has no kernel for conditions" in found.strategy
    else:
        assert seen == [B] and found.strategy.startswith("dense, one sweep for conditions")
        assert found.call.own_bias and found.runs == backend
    network = Denoiser(data, regularizer=regularizers.GaussianSmoothing(0.1, 4))
    if backend != "triton" and "leave_out" not in names:
        seen = sweeps_of(monkeypatch, lambda: network.evaluate(x, 0.5, **asked))
        assert seen == [4 * B]
        each = [network.evaluate(x[i], 0.5, **{k: v[i] for k, v in asked.items()}) for i in (0, 4)]
        for i, one in zip((0, 4), each, strict=True):
            torch.testing.assert_close(network.evaluate(x, 0.5, **asked).x0[i], one.x0)
    shared = {name: value[:1].expand(B, *value.shape[1:]) for name, value in asked.items()}
    assert sweeps_of(monkeypatch, lambda: memokern.posterior(x, data, 0.5, **shared)) == [B]


def test_a_condition_that_one_of_the_queries_cannot_have():
    c = CONDITIONS[:3] + torch.tensor([[0.0, 0], [0.3, 0], [0, 0]], dtype=F64)
    h = torch.tensor([0.0, 0, 1], dtype=F64)
    with pytest.raises(ValueError, match=r"at bandwidth 0 only rows .* the nearest is 0"):
        memokern.posterior(X[:3], data_of(), 0.5, condition=c, bandwidth=h)
    found = memokern.posterior(X[:3], data_of(), 0.5, condition=CONDITIONS[:3], bandwidth=h)
    torch.testing.assert_close(found.mean[:2], ROWS[:2])


def test_transforms_and_compilers_take_a_condition_each(backend):
    if backend == "triton":
        pytest.skip("it refuses, and the reference is tested")
    data = data_of(log_weights=None)
    c, h = ASKED["condition"], torch.tensor([0.5, 0.2, 0.5, 3.0, 0.1, 0.7], dtype=F64)

    def density(x, condition, bandwidth):
        found = memokern.posterior(x, data, 0.6, condition=condition, bandwidth=bandwidth)
        return found.log_density

    want = density(X, c, h)
    torch.testing.assert_close(torch.func.vmap(density)(X, c, h), want)
    leaves = [v.clone().requires_grad_() for v in (X, c, h)]
    first = torch.autograd.grad(density(*leaves).sum(), leaves)
    got = torch.func.grad(lambda *v: density(*v).sum(), argnums=(0, 1, 2))(X, c, h)
    for a, b in zip(got, first, strict=True):
        torch.testing.assert_close(a, b)
    compiled = torch.compile(density, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X, c, h), want)
    for a, b in zip(torch.autograd.grad(compiled(*leaves).sum(), leaves), first, strict=True):
        torch.testing.assert_close(a, b)


def test_with_an_index_and_a_certificate():
    rows = normal(300, 24, seed=6)
    data = TrainingSet(rows, labels=torch.arange(300) % 3).build_index(dims=(8,))
    label = torch.tensor([0, 1, 2, 1])
    x = rows[:4] + 0.05
    dense = memokern.posterior(x, data, 0.1, label=label, method="dense")
    got = memokern.posterior(x, data, 0.1, label=label, method="pruned", certificate=True)
    torch.testing.assert_close(got.mean, dense.mean, rtol=1e-6, atol=1e-6)
    assert got.certificate.weight.shape == (4,) and bool((got.certificate.weight < 1e-6).all())


def test_the_end_of_a_conditional_flow_is_a_row_by_its_condition():
    """At noise that tells nothing the weights are the conditions' kernel alone: the law of where
    samples end."""
    data = data_of(log_weights=None)
    c, h = CONDITIONS[5] + 0.1, 0.4
    found = memokern.posterior(torch.zeros(1, D, dtype=F64), data, 1e6, condition=c, bandwidth=h)
    p = (-(CONDITIONS - c).square().sum(1) / 2 / h**2).softmax(0)
    torch.testing.assert_close(found.mean[0], p @ ROWS, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.ess[0], 1 / p.square().sum(), rtol=1e-6, atol=1e-6)


@pytest.mark.long_on("triton")
def test_denoisers_take_conditions_and_guidance():
    data = data_of(F32)
    network = Denoiser(data, regularizer=regularizers.Tikhonov(1e-2))
    x, asked = X.float(), {"condition": ASKED["condition"][:1].expand(B, K), "bandwidth": 0.5}
    part = network.evaluate(x, 0.5, ASKED["label"], **asked)
    want = memokern.posterior(x, data, 0.5, label=ASKED["label"], **asked)
    torch.testing.assert_close(part.posterior.mean, want.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(part.score, want.score * 0.25 / (0.25 + 1e-2), rtol=1e-3, atol=1e-3)
    whole, some = network(x, 0.5), network(x, 0.5, ASKED["label"], **asked)
    guided = network(x, 0.5, ASKED["label"], guidance=1.5, **asked)
    torch.testing.assert_close(guided, whole + 1.5 * (some - whole))
    assert torch.equal(network(x, 0.5, 3, guidance=1.0), network(x, 0.5, 3))
    assert "conditions" in network.state_dict()
    with pytest.raises(ValueError, match="guidance as a finite number"):
        network(x, 0.5, 3, guidance=math.nan)


def test_samples_given_a_condition_end_by_its_kernel(backend):
    """Every sample ends at a row, as often as the condition's kernel says."""
    if backend == "triton":
        pytest.skip("interpreted kernels: a sampler takes too long")
    rows = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
    data = TrainingSet(rows, conditions=torch.tensor([0.0, 1.0, 2.0]))
    given = Given(Denoiser(data), condition=torch.tensor([1.6]), bandwidth=0.6)
    found = samplers.ode(given, 400, steps=12, seed=0).x
    nearest = memokern.nearest(found, rows)
    assert float(nearest.distance.max()) < 1e-2
    share = torch.bincount(nearest.index[:, 0], minlength=3) / 400
    p = (-(torch.tensor([0.0, 1.0, 2.0]) - 1.6).square() / 2 / 0.36).softmax(0)
    assert float((share - p).abs().max()) < 0.1
    x = cases.normal(2, 2, dtype=F32)
    whole, part = Denoiser(data).evaluate(x, 0.5), given.evaluate(x, 0.5)
    guided = Given(Denoiser(data), None, torch.tensor([1.6]), 0.6, guidance=2.0).evaluate(x, 0.5)
    for name in ("x0", "eps", "score"):
        want = 2 * getattr(part, name) - getattr(whole, name)
        torch.testing.assert_close(getattr(guided, name), want)
    with pytest.raises(ValueError, match="guidance needs a label or a condition"):
        Given(Denoiser(data), guidance=2.0)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"label": 9}, "no row has the label 9"),
        ({"label": torch.zeros(2, dtype=torch.int64)}, "one integer or one per query"),
        ({"label": 0.5}, "label as integers"),
        ({"condition": torch.zeros(2)}, "needs a bandwidth"),
        ({"bandwidth": 1.0}, "give condition="),
        ({"condition": torch.zeros(3), "bandwidth": 1.0}, r"condition \[2\] or one per query"),
        ({"condition": torch.zeros(2), "bandwidth": -1.0}, "bandwidth finite and >= 0, got -1"),
        ({"condition": torch.full((2,), math.nan), "bandwidth": 1.0}, "finite condition"),
        ({"leave_out": N}, "leave_out in 0..59"),
        ({"leave_out": 0.5}, "row numbers"),
        ({"leave_out": torch.zeros(2, dtype=torch.int64)}, "one row or one per query"),
    ],
)
def test_what_does_not_fit_says_so(asked, message):
    with pytest.raises((TypeError, ValueError), match=message):
        memokern.posterior(X, data_of(), 0.5, **asked)


def test_what_a_set_lacks_says_so():
    for asked in ({"label": 1}, {"condition": torch.zeros(2), "bandwidth": 1.0}):
        with pytest.raises(ValueError, match="this training set has no"):
            memokern.posterior(X, TrainingSet(ROWS), 0.5, **asked)
    with pytest.raises(ValueError, match="is the only one"):
        memokern.posterior(X, ROWS[:1], 0.5, leave_out=0)
    for wrong in (CONDITIONS[:5], torch.full((N, 2), math.nan), torch.zeros(N, 0), "soft"):
        with pytest.raises((TypeError, ValueError), match="conditions"):
            TrainingSet(ROWS, conditions=wrong)


def test_conditions_go_where_the_rows_go(tmp_path):
    data = data_of()
    assert torch.equal(data.subset([4, 2]).conditions, CONDITIONS[[4, 2]])
    assert torch.equal(data.where(3).conditions, CONDITIONS[LABELS == 3])
    data.save(tmp_path / "set.safetensors")
    assert torch.equal(TrainingSet.load(tmp_path / "set.safetensors").conditions, CONDITIONS)
    flat = TrainingSet(ROWS, conditions=normal(N, 2, 3))
    assert flat.conditions.shape == (N, 6) and "conditions" in repr(flat)
