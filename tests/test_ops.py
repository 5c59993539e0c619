"""The registered operations: derivatives, transforms, registration. Run on every backend here."""

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.library import opcheck

import memokern
from memokern.backends import protocol as backends
from memokern.ops import dense as ops
from memokern.util import env

OPS = torch.ops.memokern
# That take tensors on the CPU: Triton does where it interprets, which is where there is no GPU.
AVAILABLE = [
    row.name
    for row in backends.explain()
    if row.available and backends.get(row.name).refuses("cpu") is None
]


@pytest.fixture(params=AVAILABLE, autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setenv(env.BACKEND, request.param)
    return request.param


def problem(b=3, n=7, d=2, dtype=torch.float64, bias=True, grad=True, seed=0):
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    x, rows = randn(b, d).to(dtype), randn(n, d).to(dtype)
    sigma, alpha, temperature = (0.5 + torch.rand(b, generator=g).double() for _ in range(3))
    inputs = [x, sigma, alpha, temperature] + ([randn(n)] if bias else [])
    return rows, [v.requires_grad_(grad) for v in inputs]


def run(rows, x, sigma, alpha, temperature, bias=None, kernel="gaussian", cached=False):
    center = sq_norms = None
    precision = ["ieee"] if cached else []  # given, or left out
    if cached:
        center = rows.mean(0)
        sq_norms = (rows - center).double().square().sum(1)
    return OPS.posterior(
        x, rows, sigma, alpha, temperature, bias, center, sq_norms, 1.0, 0.0, kernel, *precision
    )


KINDS = pytest.mark.parametrize("kernel", ["gaussian", "log"])


@KINDS
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_first_and_second_derivatives(kernel, bias, cached):
    rows, inputs = problem(bias=bias)

    def call(*args):
        return run(rows, *args, kernel=kernel, cached=cached)

    assert gradcheck(call, inputs)
    assert gradgradcheck(call, inputs)


@KINDS
def test_gradient_of_the_rows(kernel):
    rows, inputs = problem(grad=False)
    rows.requires_grad_()
    assert gradcheck(lambda r: run(r, *inputs, kernel=kernel), (rows,))
    x = inputs[0].requires_grad_()
    (grad,) = torch.autograd.grad(run(rows, *inputs)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="detach the rows"):
        grad.sum().backward()


def test_third_derivatives_are_refused():
    rows, inputs = problem()
    x = inputs[0]
    grad = run(rows, *inputs)[1].sum()
    for _ in range(2):
        (grad,) = torch.autograd.grad(grad.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no further derivative"):
        torch.autograd.grad(grad.sum(), x)


def test_gradients_at_sigma_zero_are_zero():
    rows, (x, _, alpha, temperature, bias) = problem()
    sigma = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    out = run(rows, x, sigma, alpha, temperature, bias)
    grads = torch.autograd.grad(out[0].sum() + out[4].sum(), (x, sigma, alpha))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_nearest_derivatives():
    rows, (x, *_) = problem()
    rows.requires_grad_()
    assert gradcheck(lambda q, r: OPS.nearest(q, r, 3, None, None, 1.0, 0.0)[0], (x, rows))
    assert gradgradcheck(lambda q, r: OPS.nearest(q, r, 3, None, None, 1.0, 0.0)[0], (x, rows))


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(kernel, dtype, bias, backend):
    if backend == "triton" and (dtype == torch.float64 or bias == (kernel == "log")):
        pytest.skip("float64 is the reference's; one of each is enough where kernels are slow")
    rows, inputs = problem(dtype=dtype, bias=bias)
    args = (inputs[0], rows, *inputs[1:4], inputs[4] if bias else None, None, None)
    how = (1.0, 0.0, kernel, *(["ieee"] if bias else []))
    opcheck(OPS.posterior.default, (*args, *how))
    out = [v.detach() for v in OPS.posterior(*args, *how)]
    grads = [torch.ones_like(v).requires_grad_() for v in out]
    opcheck(OPS.posterior_backward.default, (*args, *out, *grads, *how))
    inner = [torch.ones_like(v) for v in OPS.posterior_backward(*args, *out, *grads, *how)]
    # Its own derivative is refused, on purpose, so only what does not need one is checked.
    only = ("test_schema", "test_faketensor")
    double = (*args[:7], grads, inner, *how)
    opcheck(OPS.posterior_double_backward.default, double, test_utils=only)
    opcheck(OPS.posterior_backward_rows.default, (*args[:7], grads, *how), test_utils=only)
    opcheck(OPS.nearest.default, (inputs[0], rows, 2, None, None, 1.0, 0.0))


def test_compiles_whole_with_backward():
    rows, inputs = problem()

    def loss(*args):
        p = memokern.posterior(args[0], rows, *args[1:4], bias=args[4])
        return (p.score.square().sum(1) + p.log_density + p.entropy + p.divergence).sum()

    want = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*inputs), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_with_inductor_and_another_batch_size():
    rows, (x, *_) = problem(dtype=torch.float32, grad=False)
    compiled = torch.compile(lambda q: memokern.denoise(q, rows, 0.5), fullgraph=True)
    for q in (x, torch.cat([x, x, x])):
        torch.testing.assert_close(compiled(q), memokern.denoise(q, rows, 0.5))


def test_exports():
    class Net(torch.nn.Module):
        def __init__(self, rows):
            super().__init__()
            self.register_buffer("rows", rows)

        def forward(self, x, sigma):
            return memokern.posterior(x, self.rows, sigma).score

    rows, (x, sigma, *_) = problem(grad=False)
    batch = torch.export.Dim("batch")
    program = torch.export.export(Net(rows), (x, sigma), dynamic_shapes=({0: batch}, {0: batch}))
    x2, sigma2 = torch.cat([x, x]), torch.cat([sigma, sigma])
    torch.testing.assert_close(program.module()(x2, sigma2), Net(rows)(x2, sigma2))


def test_vmap_over_queries_bias_and_rows():
    rows, (x, sigma, alpha, temperature, bias) = problem(grad=False)
    many = torch.stack([x, x + 1, x - 1, 2 * x])
    each = [run(rows, q, sigma, alpha, temperature, bias) for q in many]
    got = torch.func.vmap(lambda q: run(rows, q, sigma, alpha, temperature, bias))(many)
    for g, column in zip(got, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(g, torch.stack(column))
    biases = torch.stack([bias, 2 * bias])
    got = torch.func.vmap(lambda b: run(rows, x, sigma, alpha, temperature, b)[0])(biases)
    want = [run(rows, x, sigma, alpha, temperature, b)[0] for b in biases]
    torch.testing.assert_close(got, torch.stack(want))
    got = torch.func.vmap(lambda q: OPS.nearest(q, rows, 2, None, None, 1.0, 0.0)[1], in_dims=1)
    want = torch.stack([OPS.nearest(q, rows, 2, None, None, 1.0, 0.0)[1] for q in many])
    assert torch.equal(got(many.transpose(0, 1)), want)


def test_vmap_with_gradients_outside():
    rows, (x, *_) = problem()
    many = torch.stack([x, x + 1])
    out = torch.func.vmap(lambda q: memokern.log_density(q, rows, 0.8))(many)
    (got,) = torch.autograd.grad(out.sum(), x)
    apart = sum(memokern.log_density(q, rows, 0.8).sum() for q in (x, x + 1))
    torch.testing.assert_close(got, torch.autograd.grad(apart, x)[0])


def test_functional_transforms_work_through_the_public_functions():
    rows, (x, *_) = problem(grad=False)
    v = torch.ones_like(x)
    _, tangent = torch.func.jvp(lambda q: memokern.denoise(q, rows, 0.8), (x,), (v,))
    torch.testing.assert_close(tangent, memokern.jvp(x, rows, v, 0.8))
    assert tangent.abs().max() > 0.1
    grad = torch.func.vmap(torch.func.grad(lambda q: memokern.log_density(q, rows, 0.8)))(x)
    torch.testing.assert_close(grad, memokern.score(x, rows, 0.8))
    hessian = torch.func.hessian(lambda q: memokern.log_density(q, rows, 0.8))(x[0])
    div = memokern.posterior(x[0], rows, 0.8).divergence
    torch.testing.assert_close(hessian.trace(), div)


def test_forward_mode_works_through_the_public_functions():
    rows, (x, *_) = problem(grad=False)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    with forward_ad.dual_level():
        out = memokern.denoise(forward_ad.make_dual(x, v), rows, 0.8)
        tangent = forward_ad.unpack_dual(out).tangent
    torch.testing.assert_close(tangent, memokern.jvp(x, rows, v, 0.8))


@pytest.mark.parametrize("what", ["posterior", "nearest"])
def test_forward_mode_through_the_raw_operations_is_an_error_not_a_zero(what):
    rows, inputs = problem(grad=False)
    x = inputs[0]

    def call(q):
        if what == "nearest":
            return OPS.nearest(q, rows, 1, None, None, 1.0, 0.0)[0]
        return run(rows, q, *inputs[1:])[0]

    with pytest.raises(RuntimeError, match="no forward-mode tangent"):
        torch.func.jvp(call, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode tangent"):
        call(forward_ad.make_dual(x, torch.ones_like(x)))
    # torch.func.grad refuses by itself, or is right.
    try:
        got = torch.func.grad(lambda q: call(q).sum())(x)
    except RuntimeError:
        return
    q = x.clone().requires_grad_()
    torch.testing.assert_close(got, torch.autograd.grad(call(q).sum(), q)[0])


def test_names_are_the_dispatchers():
    assert ops.posterior is OPS.posterior and ops.nearest is OPS.nearest


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv(env.BACKEND, "quantum")
    with pytest.raises(RuntimeError, match="MEMOKERN_BACKEND must be one of"):
        memokern.denoise(torch.zeros(1, 2), torch.ones(3, 2), 1.0)


def test_an_unknown_kernel_is_refused_whoever_runs_it(monkeypatch):
    rows, inputs = problem(grad=False)
    for name in ("cpu", "reference"):
        monkeypatch.setenv(env.BACKEND, name)
        with pytest.raises(ValueError, match="kernel must be gaussian or log, not 'cauchy'"):
            run(rows, *inputs, kernel="cauchy")
        out = run(rows, *inputs)
        saved = (None, None, *out, *out, 1.0, 0.0, "cauchy")
        with pytest.raises(ValueError, match="not 'cauchy'"):
            OPS.posterior_backward(inputs[0], rows, *inputs[1:], *saved)
        with pytest.raises(ValueError, match="not 'cauchy'"):
            OPS.posterior_backward_rows(
                inputs[0], rows, *inputs[1:], None, list(out), 1.0, 0.0, "cauchy"
            )
