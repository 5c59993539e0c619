"""How the operations are registered with PyTorch: schema, fakes, compilers, export, vmap, other
transforms."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.library import opcheck

import memokern
from memokern import TrainingSet, ops
from memokern.calls import LogitBounds, Query, RowLists, Rows
from memokern.ops.registration import OPS
from tests import cases, compare, harness
from tests.cases import F16, F32, F64, Case, query_of, random_like
from tests.plain_index import PlainIndex

LISTS = RowLists(torch.tensor([0, 2, 3, 6]), torch.tensor([1, 4, 0, 2, 3, 6]))
# Their own derivatives are refused, on purpose, so only what does not need one is checked.
NO_DERIVATIVE = ("test_schema", "test_faketensor")


@pytest.fixture(params=harness.ON_CPU)
def backend(request):
    with harness.preferred(request.param):
        yield request.param


def problem(
    dtype=F64, bias="normal", weighting="gaussian", known=False, own=None
) -> tuple[Query, Rows]:
    return Case(3, 7, 2, dtype, dtype, 0.7, 0.9, 1.2, bias, weighting, known, own=own).problem()


def leaves(query: Query) -> Query:
    fresh = [None if v is None else v.clone().requires_grad_() for v in query.tensors]
    condition = query.condition
    if condition is not None:
        condition = condition._replace(c=fresh[5], h=fresh[6])
    return Query(*fresh[:5], *query[5:7], condition, query.leave_out)


# What opcheck is asked for: interpreted kernels are slow, so one of each kind is enough for them.
CHECKED = {
    "float64": (F64, "normal", "gaussian", False),
    "float64-log-known": (F64, None, "log", True),
    "float32-log": (F32, "holes", "log", False),
    "float32-both": (F32, "normal", "gaussian", True, "both"),
}


# From torch 2.14 on PyTorch's own check reads .grad of tensors that are no leaves where shapes are
# dynamic.
checked_by_pytorch = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)
# All of them by the compiled kernels; who runs an operation matters little to how it is registered.
FOR = {"reference": ("float64", "float32-log"), "triton": ("float32-log",)}


@pytest.mark.parametrize("kind", CHECKED)
@checked_by_pytorch
@pytest.mark.one_of(3)
def test_opcheck_of_the_dense_sweep(kind: str, backend: str) -> None:
    if kind not in FOR.get(backend, CHECKED):
        pytest.skip("the compiled kernels have this kind")
    query, rows = problem(*CHECKED[kind])
    args = ops.flat(leaves(query), rows)
    opcheck(OPS.posterior.default, args)
    sums = [v.detach() for v in OPS.posterior(*args)]
    grads = [v.requires_grad_() for v in random_like(sums[:5], 1)]
    opcheck(OPS.posterior_backward.default, (*args, *sums[:5], *grads))
    inner = random_like(OPS.posterior_backward(*args, *sums[:5], *grads), 2)
    double = (*args, grads, inner)
    opcheck(OPS.posterior_double_backward.default, double, test_utils=NO_DERIVATIVE)
    opcheck(OPS.posterior_backward_rows.default, (*args, grads), test_utils=NO_DERIVATIVE)


@pytest.mark.parametrize("kind", CHECKED)
@checked_by_pytorch
@pytest.mark.one_of(4)
def test_opcheck_of_the_state(kind: str, backend: str) -> None:
    if kind not in FOR.get(backend, CHECKED):
        pytest.skip("the compiled kernels have this kind")
    query, rows = problem(*CHECKED[kind])
    opcheck(OPS.posterior_state.default, ops.flat(leaves(query), rows))


@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
@checked_by_pytorch
def test_opcheck_of_nearest(dtype: torch.dtype, backend: str) -> None:
    query, rows = problem(dtype, known=dtype == F32)
    args = (rows.data, rows.center, rows.sq_norms, 1.0, 0.0, 2)
    opcheck(OPS.nearest.default, (query.x.clone().requires_grad_(), *args))


@pytest.mark.parametrize("bias", [None, "normal"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
@checked_by_pytorch
@pytest.mark.one_of(4)
def test_opcheck_of_listed_rows(dtype: torch.dtype, bias: str | None, backend: str) -> None:
    if backend == "triton" and dtype == F64:
        pytest.skip("float64 goes to the reference, whose tests these are")
    query, rows = problem(dtype, bias)
    args = (*ops.flat(leaves(query), rows), *LISTS)
    opcheck(OPS.posterior_listed.default, args)
    sums = [v.detach() for v in OPS.posterior_listed(*args)]
    grads = [v.requires_grad_() for v in random_like(sums[:5], 1)]
    opcheck(OPS.posterior_listed_backward.default, (*args, *sums[:5], *grads))
    inner = random_like(OPS.posterior_listed_backward(*args, *sums[:5], *grads), 2)
    double = (*args, grads, inner)
    opcheck(OPS.posterior_listed_double_backward.default, double, test_utils=NO_DERIVATIVE)


def indexed(storage: torch.dtype = F16) -> tuple[Query, Rows, LogitBounds]:
    """Queries, rows and the bounds that bound_scan is given of them."""
    data = (cases.normal(60, 16, seed=5) * torch.logspace(0, -1, 16)).float()
    rows = cases.with_norms(Rows(data))
    query = query_of(data[:3].clone(), 0.2, bias=cases.normal(60))
    index = PlainIndex(rows, storage=storage, in_blocks=storage == F32)
    return query, rows, index.bounds(query)


@pytest.mark.parametrize("storage", [F16, F32], ids=["float16", "float32"])
@checked_by_pytorch
def test_opcheck_of_the_scan(storage: torch.dtype, backend: str) -> None:
    if backend == "triton" and storage == F32:
        pytest.skip("one is enough where kernels are slow")
    query, rows, bounds = indexed(storage)
    flat = [list(v) if isinstance(v, tuple) else v for v in ops.flat_bounds(bounds)]
    args = (*ops.flat(leaves(query), rows), *flat)
    opcheck(OPS.bound_scan.default, args)
    assert not any(v.requires_grad for v in OPS.bound_scan(*args))


# --- compilers ----------------------------------------------------------------------------------


def public(rows: torch.Tensor):
    """A loss of everything that a posterior knows."""

    def loss(*args):
        p = memokern.posterior(args[0], rows, *args[1:4], bias=args[4])
        return (p.score.square().sum(1) + p.log_density + p.entropy + p.divergence).sum()

    return loss


def test_compiles_whole_with_backward(backend: str) -> None:
    query, rows = problem()
    inputs = [v.requires_grad_() for v in query[:5]]
    loss = public(rows.data)
    want = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*inputs), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.one_of(2)
def test_states_and_their_merge_compile(backend: str) -> None:
    query, rows = problem(F32)
    x = query.x.requires_grad_()

    def mean(q):
        parts = [memokern.posterior_state(q, part, 0.7) for part in rows.data.split(4)]
        return memokern.merge(*parts).posterior().mean

    compiled = torch.compile(mean, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), mean(x))
    grads = [torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, mean)]
    torch.testing.assert_close(*grads)


@pytest.mark.long
def test_compiles_with_inductor_and_another_batch_size() -> None:
    """One compilation serves every backend: which one runs is asked at the call."""
    query, rows = problem(F32)
    x = query.x
    compiled = torch.compile(lambda q: memokern.denoise(q, rows.data, 0.5), fullgraph=True)
    for name in harness.ON_CPU:
        with harness.preferred(name):
            for q in (x, torch.cat([x, x, x])):
                torch.testing.assert_close(compiled(q), memokern.denoise(q, rows.data, 0.5))


def test_exports(backend: str) -> None:
    class Net(torch.nn.Module):
        def __init__(self, rows):
            super().__init__()
            self.register_buffer("rows", rows)

        def forward(self, x, sigma):
            return memokern.posterior(x, self.rows, sigma).score

    query, rows = problem(F32)
    x, sigma, batch = query.x, query.sigma, torch.export.Dim("batch")
    net = Net(rows.data)
    program = torch.export.export(net, (x, sigma), dynamic_shapes=({0: batch}, {0: batch}))
    x2, sigma2 = torch.cat([x, x]), torch.cat([sigma, sigma])
    torch.testing.assert_close(program.module()(x2, sigma2), net(x2, sigma2))


def test_the_scan_compiles_with_its_unknown_size(backend: str) -> None:
    query, rows, bounds = indexed()

    def rows_kept(x):
        return ops.bound_scan(query._replace(x=x), rows, bounds).lists.index * 2

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(rows_kept, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(query.x), rows_kept(query.x))


# --- vmap and other transforms ------------------------------------------------------------------


@pytest.mark.long_on("triton")
def test_vmap_over_queries_bias_and_rows(backend: str) -> None:
    query, rows = problem(F32)
    x, bias = query.x, query.bias
    many = torch.stack([x, x + 1, x - 1, 2 * x])

    def of_queries(q):
        return tuple(ops.posterior(query._replace(x=q), rows))

    close = {"rtol": 1e-6, "atol": 1e-6}
    got = torch.func.vmap(of_queries)(many)
    each = [of_queries(q) for q in many]
    for g, column in zip(got, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(g, torch.stack(column), **close)
    biases = torch.stack([bias, 2 * bias])

    def of_bias(b):
        return ops.posterior(query._replace(bias=b), rows).mean

    want = torch.stack([of_bias(b) for b in biases])
    torch.testing.assert_close(torch.func.vmap(of_bias)(biases), want, **close)
    stored = torch.stack([rows.data, rows.data.flip(0) + 1])

    def of_rows(data):
        return ops.posterior(query, Rows(data)).log_z

    want = torch.stack([of_rows(data) for data in stored])
    torch.testing.assert_close(torch.func.vmap(of_rows)(stored), want, **close)

    def near(q):
        return ops.nearest(q, rows, 2)[1]

    want = torch.stack([near(q) for q in many])
    assert torch.equal(torch.func.vmap(near, in_dims=1)(many.transpose(0, 1)), want)


def test_vmap_of_states(backend: str) -> None:
    query, rows = problem(F32)
    many = torch.stack([query.x, query.x + 1])
    got = torch.func.vmap(lambda q: tuple(ops.posterior_state(query._replace(x=q), rows)))(many)
    each = [ops.posterior_state(query._replace(x=q), rows) for q in many]
    for g, column in zip(got, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(g, torch.stack(column), rtol=1e-6, atol=1e-6)
    mapped = torch.func.vmap(lambda q: memokern.posterior_state(q, rows.data, 0.7).posterior().mean)
    want = memokern.denoise(many, rows.data, 0.7)
    torch.testing.assert_close(mapped(many), want, rtol=1e-6, atol=1e-6)


def test_vmap_of_listed_rows(backend: str) -> None:
    query, rows = problem(F32)

    def run(q):
        return tuple(ops.posterior_listed(query._replace(x=q), rows, LISTS))

    many = torch.stack([query.x, query.x + 1])
    got, each = torch.func.vmap(run)(many), [run(q) for q in many]
    compare.equal(got, [torch.stack(column) for column in zip(*each, strict=True)])


def test_vmap_of_the_scan_is_an_error_that_helps(backend: str) -> None:
    query, rows, bounds = indexed()
    many = torch.stack([query.x, query.x + 0.1])
    with pytest.raises(RuntimeError, match="Fold the mapped axis"):
        torch.func.vmap(
            lambda q: ops.bound_scan(query._replace(x=q), rows, bounds).lists.start
        )(many)  # fmt: skip


def test_vmap_with_gradients_outside(backend: str) -> None:
    query, rows = problem()
    x = query.x.requires_grad_()
    many = torch.stack([x, x + 1])
    out = torch.func.vmap(lambda q: memokern.log_density(q, rows.data, 0.8))(many)
    (got,) = torch.autograd.grad(out.sum(), x)
    apart = sum(memokern.log_density(q, rows.data, 0.8).sum() for q in (x, x + 1))
    torch.testing.assert_close(got, torch.autograd.grad(apart, x)[0])


def test_functional_transforms_work_through_the_public_functions(backend: str) -> None:
    query, rows = problem()
    x, rows = query.x, rows.data
    v = torch.ones_like(x)
    _, tangent = torch.func.jvp(lambda q: memokern.denoise(q, rows, 0.8), (x,), (v,))
    torch.testing.assert_close(tangent, memokern.jvp(x, rows, v, 0.8))
    assert tangent.abs().max() > 0.1
    grad = torch.func.vmap(torch.func.grad(lambda q: memokern.log_density(q, rows, 0.8)))(x)
    torch.testing.assert_close(grad, memokern.score(x, rows, 0.8))
    hessian = torch.func.hessian(lambda q: memokern.log_density(q, rows, 0.8))(x[0])
    div = memokern.posterior(x[0], rows, 0.8).divergence
    torch.testing.assert_close(hessian.trace(), div)
    in_parts = torch.func.grad(
        lambda q: memokern.merge(
            *(memokern.posterior_state(q, part, 0.8) for part in rows.split(3))
        ).posterior().log_density
    )  # fmt: skip
    torch.testing.assert_close(torch.stack([in_parts(q) for q in x]), grad)


def test_forward_mode_works_through_the_public_functions(backend: str) -> None:
    query, rows = problem()
    x, v = query.x, cases.normal(3, 2, seed=1)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, v)
        out = forward_ad.unpack_dual(memokern.denoise(dual, rows.data, 0.8)).tangent
        state = memokern.posterior_state(dual, rows.data, 0.8)
        again = forward_ad.unpack_dual(state.posterior().mean).tangent
    torch.testing.assert_close(out, memokern.jvp(x, rows.data, v, 0.8))
    torch.testing.assert_close(again, out)


# --- what goes below the dispatcher -------------------------------------------------------------


def test_an_unknown_weighting_is_refused_whoever_runs_it() -> None:
    query, rows = problem()
    wrong = query._replace(weighting="cauchy")
    grads = [*ops.posterior(query, rows)[:5]]
    for name in ("cpu", "reference"):
        if name not in harness.INSTALLED:
            continue
        with harness.named(name):
            for call in (
                lambda: OPS.posterior(*ops.flat(wrong, rows)),
                lambda: OPS.posterior_state(*ops.flat(wrong, rows)),
                lambda: OPS.posterior_backward(*ops.flat(wrong, rows), *grads, *grads),
                lambda: OPS.posterior_backward_rows(*ops.flat(wrong, rows), grads),
            ):
                with pytest.raises(ValueError, match="must be gaussian or log, not 'cauchy'"):
                    call()


def test_each_operation_gives_the_same_bits_with_and_without_the_dispatcher(
    backend: str, monkeypatch
) -> None:
    """The dispatcher is left out where it has nothing to do."""
    query, rows = problem(F32)
    scanned, stored, bounds = indexed()

    def run() -> list[torch.Tensor]:
        found = ops.bound_scan(scanned, stored, bounds)
        return [
            *ops.posterior(query, rows),
            *ops.posterior_listed(query, rows, LISTS),
            *ops.nearest(query.x, rows, 2),
            *found.lists,
            *found[1:],
        ]

    direct = run()
    monkeypatch.setattr(ops, "undispatched", lambda *tensors: False)
    compare.equal(run(), direct)


def test_a_data_set_of_uint8_goes_through_with_its_unit(backend: str) -> None:
    data = TrainingSet((cases.normal(9, 4) * 40 + 128).clamp(0, 255).to(torch.uint8))
    x = data[:3] + 0.1
    rows = data.as_rows()
    got = ops.posterior(query_of(x, 0.3), rows)
    want = memokern.posterior(x, data[:], 0.3)
    torch.testing.assert_close(got.mean, want.mean, rtol=1e-5, atol=1e-5)


def test_a_choice_of_rows_has_no_tangent(backend: str) -> None:
    """bound_scan chooses: of a query with a tangent it says the same, without one."""
    query, rows, bounds = indexed()
    want = ops.bound_scan(query, rows, bounds)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(query.x, torch.ones_like(query.x))
        got = ops.bound_scan(query._replace(x=x), rows, bounds)
        assert forward_ad.unpack_dual(got.threshold).tangent is None
    torch.testing.assert_close(got.threshold, want.threshold, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_selected_rows_have_the_gaussian_weighting_only(name: str) -> None:
    query, rows, bounds = indexed()
    query = query._replace(weighting="log")
    lists = RowLists(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2]))
    with harness.named(name):
        for call in (
            lambda: ops.bound_scan(query, rows, bounds),
            lambda: ops.posterior_listed(query, rows, lists),
        ):
            with pytest.raises(ValueError, match='the weighting "gaussian" only'):
                call()
