"""Derivatives of the registered operations: first, second, and what has none and says so.

Finite differences need float64, which compiled kernels and the reference have; Triton's gradients,
in float32, are held to the definition's like the others', through the operation itself.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from memokern import calls, ops
from memokern.calls import Query, RowLists, Rows, Sums
from memokern.ops.registration import OPS
from memokern.util import env
from tests import cases, compare, harness, oracle
from tests.cases import F32, F64, Case, normal, random_like
from tests.oracle import query_of

# With float64: it runs what it takes, the reference the rest, as on a device of its own.
EXACT = [name for name in harness.ON_CPU if name != "triton"]
WEIGHTINGS = ("gaussian", "log")
LISTS = RowLists(torch.tensor([0, 4, 5, 10]), torch.tensor([0, 2, 3, 5, 4, 0, 1, 2, 3, 6]))


@pytest.fixture(params=EXACT)
def backend(request):
    with harness.preferred(request.param):
        yield request.param


def problem(weighting="gaussian", bias=None, known=False, own=None) -> tuple[Query, Rows]:
    """3 queries and 7 rows of 2 features."""
    case = Case(3, 7, 2, F64, F64, 0.7, 0.9, 0.8, bias, weighting, known, own=own, seed=1)
    query, rows = case.problem()
    each = torch.tensor([0.8, 1.0, 1.3], dtype=F64)
    columns = {"sigma": query.sigma * each, "alpha": query.alpha / each}
    return query._replace(**columns, temperature=query.temperature * each.flip(0)), rows


def differentiable(query: Query) -> tuple[list[Tensor], Tensor | None]:
    """The leaves, of the bias only what is finite, and where that is."""
    leaves = oracle.leaves(query)
    if query.bias is None:
        return leaves, None
    kept = torch.isfinite(query.bias)
    return [*leaves[:4], query.bias[kept].clone().requires_grad_(), *leaves[5:]], kept


def asked(leaves, kept: Tensor | None, like: Query) -> Query:
    """The query of these leaves."""
    if kept is None:
        return query_of(leaves, like)
    bias = torch.full(kept.shape, -math.inf, dtype=F64).masked_scatter(kept, leaves[4])
    return query_of([*leaves[:4], bias, *leaves[5:]], like)


KINDS = pytest.mark.parametrize(
    ("weighting", "bias", "known", "own"),
    [
        *((w, *more, None) for w in WEIGHTINGS for more in ((None, True), ("normal", False))),
        *((w, "holes", True, None) for w in WEIGHTINGS),
        ("gaussian", "hole", False, "both"),
        pytest.param("gaussian", None, False, "condition", marks=pytest.mark.long),
        pytest.param("log", None, True, "both", marks=pytest.mark.long),
    ],
)


@KINDS
@pytest.mark.one_of(4)
def test_posterior(backend, weighting, bias, known, own) -> None:
    """Also with rows that are left out: no second derivative may become NaN."""
    query, rows = problem(weighting, bias, known, own)
    leaves, kept = differentiable(query)

    def call(*args):
        return tuple(ops.posterior(asked(args, kept, query), rows))

    assert gradcheck(call, leaves)
    assert gradgradcheck(call, leaves)


@KINDS
@pytest.mark.one_of(5)
def test_posterior_state(backend, weighting, bias, known, own) -> None:
    """Of what is made of it, as its m is a constant: the sums of two parts joined."""
    query, rows = problem(weighting, bias, known, own)
    query = query.take(slice(0, 2))
    leaves, kept = differentiable(query)

    def call(*args):
        whole, states = asked(args, kept, query), []
        for at in (slice(0, 2), slice(2, 7)):
            part = rows._replace(data=rows.data[at], sq_norms=None, center=None)
            mine = whole._replace(bias=None if whole.bias is None else whole.bias[at])
            if own is not None:
                part = part._replace(conditions=rows.conditions[at])
            if query.leave_out is not None:
                here = query.leave_out - at.start
                here = torch.where((here >= 0) & (here < part.n), here, -1)
                mine = mine._replace(leave_out=here)
            states.append(ops.posterior_state(mine, part))
        return tuple(calls.to_sums(calls.merge(*states), whole))

    assert gradcheck(call, leaves)
    if bias == "holes":
        assert gradgradcheck(call, leaves)


@pytest.mark.parametrize("bias", [None, "normal", "holes"])
@pytest.mark.one_of(6)
def test_posterior_listed(backend, bias) -> None:
    query, rows = problem(bias=bias)
    lists = LISTS
    if bias == "holes":  # of whose rows some are left in every list
        lists = lists._replace(index=torch.tensor([0, 1, 2, 4, 5, 1, 2, 3, 4, 5]))
    leaves, kept = differentiable(query)

    def call(*args):
        return tuple(ops.posterior_listed(asked(args, kept, query), rows, lists))

    assert gradcheck(call, leaves)
    assert gradgradcheck(call, leaves)


@pytest.mark.parametrize("operation", [ops.posterior, ops.posterior_state])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.one_of(2)
def test_the_rows(backend, weighting, operation) -> None:
    query, rows = problem(weighting, "normal")
    data = rows.data.requires_grad_()

    def call(values):
        out = operation(query, Rows(values))
        return tuple(out if isinstance(out, Sums) else calls.to_sums(out, query))

    assert gradcheck(call, (data,))
    leaves = query._replace(x=query.x.requires_grad_())
    (grad,) = torch.autograd.grad(
        operation(leaves, Rows(data))[4 if operation is ops.posterior else 2].sum(),
        leaves.x, create_graph=True,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="detach the rows"):
        grad.sum().backward()


def test_nearest(backend) -> None:
    query, rows = problem()
    x, data = query.x.requires_grad_(), rows.data.requires_grad_()
    for unit in ((1.0, 0.0), (0.3, -1.0)):

        def call(q, r, unit=unit):
            return ops.nearest(q, Rows(r, *unit), 3)[0]

        assert gradcheck(call, (x, data)) and gradgradcheck(call, (x, data))
    assert not ops.nearest(x, rows, 3)[1].requires_grad


@harness.plain_backends
@pytest.mark.parametrize("bias", [None, "hole"])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.one_of(2)
def test_float32_through_the_operation(backend: str, weighting: str, bias: str | None) -> None:
    """Of all inputs, the rows too, first and second, as autograd through the definition: of the
    operation, and of the state of the whole."""
    case = Case(2, 12, 5, F32, F32, 0.7, 0.9, 1.2, bias, weighting)
    query, rows, grads, _ = cases.with_gradients(case)
    grads = Sums(*grads, random_like(query[:1], 5)[0])
    want = oracle.gradients(query, rows, grads)
    for operation in ("posterior", "posterior_state"):
        leaves = harness.moved(query, harness.device_of(backend))
        leaves = Query(*(v if v is None else v.detach().clone().requires_grad_()
                         for v in leaves[:5]), weighting)  # fmt: skip
        data = rows.data.to(harness.device_of(backend)).requires_grad_()
        with harness.preferred(backend):
            if operation == "posterior":
                out = ops.posterior(leaves, Rows(data))
            else:
                state = ops.posterior_state(leaves, Rows(data))
                out = calls.to_sums(state, leaves)
            inputs = [v for v in leaves.tensors if v is not None]
            total = sum((v * g.to(v)).sum() for v, g in zip(out, grads, strict=True))
            found = torch.autograd.grad(total, [*inputs, data], retain_graph=True)
            none = torch.zeros(0, dtype=F64)
            got = calls.Gradients(*found[:4], found[4] if bias else none, none, none)
            sums = oracle.sums(query, rows)
            compare.gradients(harness.moved(got, harness.CPU), want, sums, query, F32, operation)
            row_gradient = oracle.row_gradient(query, rows, grads)
            compare.row_gradient(found[-1].cpu(), row_gradient, rows, F32, operation)
            if operation == "posterior_state":
                continue
            first = torch.autograd.grad(
                sum((v * g.to(v)).sum() for v, g in zip(ops.posterior(leaves, Rows(data.detach())),
                    grads, strict=True)), inputs, create_graph=True)  # fmt: skip
        seeds = random_like(want, 3)._replace(x=random_like(query[:1], 3)[0])
        with harness.preferred(backend):
            second = torch.autograd.grad(
                sum((v * s.to(v)).sum() for v, s in zip(first, seeds, strict=False)), inputs
            )
        heads, _ = oracle.second(query, rows, grads, seeds)
        compare.second_derivatives([v.cpu() for v in second], heads, F32, "second")


def test_at_sigma_zero_they_are_zero(backend) -> None:
    """Of infinite sums, too: these are constants."""
    query, rows = problem(bias="normal")
    x, alpha = query.x.requires_grad_(), query.alpha.requires_grad_()
    sigma = torch.zeros(3, dtype=F64, requires_grad=True)
    query = query._replace(sigma=sigma)
    for out in (
        ops.posterior(query, rows),
        calls.to_sums(ops.posterior_state(query, rows), query),
        ops.posterior_listed(query, rows, LISTS),
    ):
        assert torch.isneginf(out.log_z).all()
        for total in (out.mean.sum() + out.weight_sq.sum(), out.log_z.sum() + out.mean_logit.sum()):
            grads = torch.autograd.grad(total, (x, sigma, alpha), retain_graph=True)
            assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_third_derivatives_are_refused(backend) -> None:
    query, rows = problem(bias="normal")
    x = query.x.requires_grad_()
    for out in (ops.posterior(query, rows), ops.posterior_listed(query, rows, LISTS)):
        grad = out.log_z.sum()
        for _ in range(2):
            (grad,) = torch.autograd.grad(grad.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no further derivative"):
            torch.autograd.grad(grad.sum(), x)


def test_listed_rows_have_none(backend) -> None:
    query, rows = problem()
    data = rows.data.requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient for the rows"):
        ops.posterior_listed(query, Rows(data), LISTS).log_z.sum().backward()


@pytest.mark.parametrize("name", [n for n in harness.ON_CPU if n != "reference"])
def test_a_named_backend_without_second_derivatives_says_so(name: str) -> None:
    """Nothing falls back inside an operation."""
    query, rows = Case(2, 9, 3).problem()
    x = query.x.requires_grad_()
    with harness.named(name):
        for out in (
            ops.posterior(query, rows),
            ops.posterior_listed(query, rows, RowLists(LISTS.start[:3], LISTS.index[:5])),
        ):
            (grad,) = torch.autograd.grad(out.log_z.sum(), x, create_graph=True)
            with pytest.raises(RuntimeError) as error:
                grad.sum().backward()
            assert "second derivatives are taken in plain PyTorch" in str(error.value)
            assert f"{env.BACKEND}={name} asks for it: unset it" in str(error.value)


def test_forward_mode_through_the_raw_operations_is_an_error_not_a_zero(backend) -> None:
    query, rows = problem(bias="normal")
    raw = {
        "posterior": lambda x: OPS.posterior(*ops.flat(query._replace(x=x), rows))[0],
        "posterior_state": lambda x: OPS.posterior_state(*ops.flat(query._replace(x=x), rows))[2],
        "posterior_listed": lambda x: OPS.posterior_listed(
            *ops.flat(query._replace(x=x), rows), *LISTS
        )[0],
        "nearest": lambda x: OPS.nearest(x, rows.data, None, None, 1.0, 0.0, 1)[0],
    }
    one = torch.ones_like(query.x)
    for call in raw.values():
        with pytest.raises(RuntimeError, match="no forward-mode tangent"):
            torch.func.jvp(call, (query.x,), (one,))
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode tangent"):
            call(forward_ad.make_dual(query.x, one))
        # torch.func.grad refuses by itself, or is right.
        try:
            got = torch.func.grad(lambda x, call=call: call(x).sum())(query.x)
        except RuntimeError:
            continue
        x = query.x.clone().requires_grad_()
        torch.testing.assert_close(got, torch.autograd.grad(call(x).sum(), x)[0])


def test_no_gradient_is_recorded_where_none_is_wanted(backend) -> None:
    query, rows = problem(bias="normal")
    x = query.x.requires_grad_()
    with torch.no_grad():
        assert not any(v.requires_grad for v in ops.posterior(query, rows))
    assert ops.posterior(query, rows).mean.requires_grad
    state = ops.posterior_state(query, rows)
    assert [v.requires_grad for v in state] == [False, False, *[True] * 6, False]
    assert normal(1).requires_grad is False and x.requires_grad
