"""Pruned sweeps: the certificate is never violated, and the answer is the dense one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import memokern
from memokern import TrainingSet
from memokern.strategies import pruned
from tests import harness, oracle
from tests.cases import F32, F64, U8, normal, query_of
from tests.plain_index import PlainIndex, with_index
from tests.strategies.rows import adversarial_rows, indexed, rows_of

pytestmark = pytest.mark.usefixtures("backend")

# --- the property -------------------------------------------------------------------------------


def basis_of(kind, d, seed):
    """Any orthonormal basis must do."""
    return kind if kind != "any" else torch.linalg.qr(normal(d, d, seed=seed))[0]


def holds(data, index, x, sigma, alpha=1.0, temperature=1.0, bias=None, eps=1e-6):
    """Asserts that the certificate is true of the rows dropped and of the sums returned."""
    query, rows = query_of(x, sigma, alpha, temperature, bias), data.as_rows()
    sigma, alpha, temperature = query.sigma, query.alpha, query.temperature
    projected = index.project(x, alpha)
    lists, _, level = pruned.scan_index(query, rows, index, projected, eps, data.n)
    start, listed = lists
    sums, c = pruned.posterior(query, rows, index, eps=eps, certificate=True)
    want, t = oracle.sums(query, rows), oracle.logits(query, rows)
    w, y = torch.softmax(t, 1), oracle.values(rows)
    # How far this test's own sums may be off: the rounding of t moves a weight by that factor.
    best = t.amax(1)
    off = 2.0**-52 * (x.shape[1] + 16) * (best.abs() + 50)
    assert float(off.max()) < 1e-3
    ulp = 2.0**-48 if x.dtype == F64 else 2.0**-22  # the mean is rounded to x's type
    radius = (y - y.mean(0)).norm(dim=1).max() + y.norm(dim=1).max()
    assert (level > 0).all() and torch.equal(c.levels, level)
    assert torch.equal(c.rows_kept, start.diff())
    for i in range(len(x)):
        dropped = torch.ones(data.n, dtype=torch.bool)
        dropped[listed[start[i] : start[i + 1]]] = False
        lost = float(w[i][dropped].sum())
        assert lost <= float(c.weight[i]) * (1 + 4 * float(off[i]))
        assert float(c.weight[i]) <= eps * (1 + 4 * float(off[i]))
        error = float((sums.mean[i].double() - want.mean[i]).norm())
        assert error <= float(c.mean_error[i]) + float((ulp + 4 * off[i]) * radius)
        gap = float(want.log_z[i] - sums.log_z[i])
        slack = float(temperature[i] * 4 * off[i])
        assert -slack <= gap <= float(c.log_z_error[i]) + slack
    torch.testing.assert_close(c.score_error, alpha.abs() * c.mean_error / sigma**2)
    return c


@st.composite
def problems(draw):
    seed = draw(st.integers(0, 2**20))
    n, d = draw(st.integers(1, 70)), draw(st.integers(5, 24))
    kind = draw(st.sampled_from(["random", "clustered", "low-rank", "duplicated", "adversarial"]))
    wide = draw(st.booleans())
    offset = draw(st.sampled_from([0.0, 0.0, 100.0]))
    rows = (rows_of(kind, n, d, seed) + offset).to(F64 if wide else F32)
    data = TrainingSet(rows)
    index = PlainIndex(
        data.as_rows(),
        storage=draw(st.sampled_from([torch.float16, F32])),
        basis=basis_of(draw(st.sampled_from(["principal", "axes", "any"])), d, seed + 3),
    )
    alpha = draw(st.sampled_from([0.0, 1.0, 0.5, 1e-3, -0.4]) | st.floats(0, 1))
    sigma = 10 ** draw(st.floats(-3, 3))
    temperature = draw(st.sampled_from([1.0, 0.1, 3.0]))
    near = rows[torch.arange(4) % n].double()
    # With the noise of the level, with residuals along the rows' own, and far out.
    x = alpha * near + sigma * normal(4, d, seed=seed + 4)
    x[1] = alpha * (near[0] + 0.5 * (near[0] - near[-1]))
    x[2] += draw(st.sampled_from([0.0, 30.0]))
    bias = None
    drawn = draw(st.sampled_from(["none", "random", "holes", "inverting"]))
    if drawn != "none":
        bias = 5 * normal(n, seed=seed + 5)
    if drawn == "holes" and n > 1:
        bias[1::2] = -math.inf
    if drawn == "inverting":  # what is far from the first query is what it weighs most
        bias = (x[0] - alpha * rows.double()).square().sum(1) / (1.9 * sigma**2)
    eps = 10 ** draw(st.floats(-9, -1))
    x = x.to(draw(st.sampled_from([F64, F32])))
    return data, index, x, sigma, alpha, temperature, bias, eps


@pytest.mark.parametrize("alpha", [5e-324, -1e-310, 1e-160, 1e-150])
@pytest.mark.parametrize("n", [1, 40])
def test_a_signal_whose_square_is_0(alpha, n):
    """alpha y has few digits, or none; the mean of y has all of its own."""
    data = TrainingSet(rows_of("random", n, 5, 1))
    index = PlainIndex(data.as_rows(), storage=F32, basis=basis_of("axes", 5, 3))
    holds(data, index, alpha * data.rows[:1].double(), 1.0, alpha, eps=0.1)


@given(problem=problems())
@settings(max_examples=150, deadline=None, derandomize=True)
@pytest.mark.long_on("reference")
def test_the_certificate_is_never_violated(problem):
    holds(*problem)


@st.composite
def built(draw):
    """The same with the index that build_index makes: cosines for images, else principal axes."""
    data, _, *rest = draw(problems())
    rows = data.rows
    seed = draw(st.integers(0, 2**20))
    shape = draw(st.sampled_from([(24,), (40,), (8, 8), (3, 8, 8)]))
    n, d = len(rows), math.prod(shape)
    kind = draw(st.sampled_from(["random", "clustered", "low-rank", "duplicated", "adversarial"]))
    values = rows_of(kind, n, d, seed)
    dtype = draw(st.sampled_from([F64, F32, torch.float16, U8]))
    if dtype == U8:
        values = (values * 20 + 128).clamp(0, 255)
    data = TrainingSet(values.to(dtype).reshape(n, *shape))
    data.build_index(dims=draw(st.sampled_from([(4, 12, 20), (16,), None])))
    y = data.dequantize(data.rows).double()
    x, sigma, alpha, *rest = rest
    x = (alpha * y[torch.arange(4) % n] + sigma * normal(4, d, seed=seed + 4)).to(x.dtype)
    return data, data.index, x, sigma, alpha, *rest


@given(problem=built())
@settings(max_examples=60, deadline=None, derandomize=True)
@pytest.mark.long_on("reference")
def test_the_certificate_is_never_violated_with_an_index_as_built(problem):
    holds(*problem)


def trap(n=40, d=20, seed=0):
    """Rows whose order the last coordinates decide, and queries aligned with half of them."""
    data = TrainingSet(adversarial_rows(n, d, seed))
    x = data.rows[:4].clone()
    return data, x, 0.3


def test_the_property_notices_a_bound_that_is_too_small():
    data, x, sigma = trap()
    sound = PlainIndex(data.as_rows(), dims=(4, 8), basis="axes")
    kept = holds(data, sound, x, sigma).rows_kept
    broken = PlainIndex(data.as_rows(), dims=(4, 8), basis="axes")
    k0 = broken.dims[0]
    broken.coarse[:, k0 : k0 + broken.bands] *= 0.3
    with pytest.raises(AssertionError):
        holds(data, broken, x, sigma)
    assert kept.max() > 1


def test_the_property_notices_rounding_that_is_not_paid_for():
    """float16 coordinates off by half a unit each, all in the query's favour or against it."""
    n, d, k0, k = 30, 24, 4, 24
    rows = torch.zeros(n, d, dtype=F64)
    rows[:, k0:] = 1000.0
    rows[::2, k0:] += 0.24  # rounds down to 1000: the unit there is 0.5
    data = TrainingSet(rows)
    # The set's own center would take the common 1000 away, and with it the rounding.
    data._derived._center = torch.zeros(d, dtype=F64)
    data._derived._sq_norms = None
    index = PlainIndex(data.as_rows(), dims=(k0, k), basis="axes")
    x = rows[:2].clone()
    holds(data, index, x, 0.05)
    index.coarse[:, -1] = 0.0
    with pytest.raises(AssertionError):
        holds(data, index, x, 0.05)


# --- the public function ------------------------------------------------------------------------


def same(p, q, rtol=1e-11):
    for name in ("mean", "log_z", "mean_logit", "mean_bias", "weight_sq"):
        torch.testing.assert_close(getattr(p, name), getattr(q, name), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("sigma", [0.001, 0.05, 0.2, 1.0, 100.0])
@pytest.mark.parametrize("method", ["pruned", "auto"])
def test_pruned_is_dense_to_rounding_in_float64(sigma, method):
    data = indexed(log_weights=normal(300, seed=9))
    x = 0.9 * data.rows[:6].reshape(2, 3, 24) + sigma * normal(2, 3, 24)
    bias = torch.where(torch.arange(300) % 3 == 0, -math.inf, normal(300, seed=2))
    got = memokern.posterior(
        x, data, sigma, 0.9, 1.3, bias=bias, method=method, certificate=True
    )  # fmt: skip
    want = memokern.posterior(x, data, sigma, 0.9, 1.3, bias=bias, method="dense")
    same(got, want)
    assert want.certificate is None
    assert all(v.shape == (2, 3) for v in vars(got.certificate).values())
    if method == "pruned":
        assert (got.certificate.levels > 0).all()


def test_rows_in_uint8_and_float32_queries():
    rows = (normal(200, 24, seed=1) * torch.logspace(1.8, 0, 24) + 128).clamp(0, 255).to(U8)
    data = with_index(TrainingSet(rows))
    x = data[:5] + 0.05 * normal(5, 24, dtype=F32)
    got = memokern.posterior(x, data, 0.05, method="pruned", certificate=True)
    want = memokern.posterior(x, data, 0.05, method="dense")
    assert got.mean.dtype == F32 and got.certificate.rows_kept.max() < 20
    torch.testing.assert_close(got.mean, want.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.log_z, want.log_z, rtol=1e-6, atol=1e-4)


def test_what_cannot_be_pruned_is_swept_densely_and_the_order_is_kept():
    data = indexed()
    x = data.rows[:6] + 0.05 * normal(6, 24)
    x[1, 3], x[4, 0] = math.nan, math.inf
    sigma = torch.tensor([0.05, 0.05, 0.0, 0.05, 0.05, 0.2], dtype=F64)
    got = memokern.posterior(x, data, sigma, method="pruned", certificate=True)
    want = memokern.posterior(x, data, sigma, method="dense")
    for name in ("mean", "log_z", "weight_sq"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), equal_nan=True)
    c = got.certificate
    assert (c.levels == 0).tolist() == [False, True, True, False, True, False]
    assert (c.rows_kept == 300).tolist() == [False, True, True, False, True, False]
    dense = c.levels == 0
    for bound in (c.weight, c.mean_error, c.score_error, c.log_z_error):
        assert (bound[dense] == 0).all() and (bound[~dense] > 0).all()


def test_the_other_weighting_and_transforms_are_dense(backend):
    data, x = indexed(), normal(3, 24)
    got = memokern.posterior(x, data, 0.2, weighting="log", method="pruned", certificate=True)
    assert (got.certificate.levels == 0).all()

    def mean(q):
        return memokern.denoise(q, data, 0.2, method="pruned")

    want = memokern.denoise(x, data, 0.2, method="dense")
    torch.testing.assert_close(torch.func.vmap(mean)(x), want)
    with harness.preferred(backend):  # the reference takes forward mode
        _, tangent = torch.func.jvp(mean, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, memokern.jvp(x, data, torch.ones_like(x), 0.2))
    with harness.preferred(backend), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        out = torch.autograd.forward_ad.unpack_dual(mean(dual)).tangent
    torch.testing.assert_close(out, tangent)
    compiled = torch.compile(mean, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), want)


@pytest.mark.filterwarnings("ignore:sigma requires a gradient")  # none of the rows dropped matter
@pytest.mark.parametrize("third", [0.25, 0.0])
def test_gradients_of_pruned_are_those_of_dense(backend, third):
    data = indexed()
    rows, bias = data.rows, normal(300, seed=2).requires_grad_()
    x = (rows[:5] + 0.1 * normal(5, 24)).requires_grad_()
    sigma = torch.tensor([0.1, 0.2, third, 0.15, 0.3], dtype=F64, requires_grad=True)
    alpha, t = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (1.1, 0.9))
    inputs = (x, sigma, alpha) + ((t, bias) if third > 0 else ())

    def gradients(method):
        p = memokern.posterior(x, data, sigma, alpha, t, bias=bias, method=method)
        loss = p.mean.square().sum() + p.weight_sq.sum()
        if third > 0:  # log_z has no derivative at sigma = 0
            loss = loss + p.log_z.sum() + 0.1 * p.mean_logit.sum() + p.mean_bias.sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        if third == 0:  # nor has anything a second one, or one in T, as in the dense sweep
            return (first,)
        with harness.preferred(backend):  # the reference takes second derivatives
            return first, torch.autograd.grad(first[0].square().sum(), inputs)

    for got, want in zip(gradients("pruned"), gradients("dense"), strict=True):
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-8 * w.detach().abs().max().item())


@pytest.mark.parametrize("tol", [1e-3, 1e-6, 1e-9])
def test_tol_bounds_the_error_of_the_mean(tol):
    data = indexed(dtype=F32)
    x = data.rows[:8] + 0.15 * normal(8, 24, dtype=F32)
    p = memokern.posterior(x, data, 0.15, method="pruned", certificate=True, tol=tol)
    c = p.certificate
    assert (c.mean_error <= tol).all() and (c.weight <= 1e-6).all()
    mean = oracle.sums(query_of(x, 0.15), data.as_rows()).mean
    assert ((p.mean - mean).norm(dim=1) <= tol + 2.0**-22 * mean.norm(dim=1)).all()


def test_without_an_index_nothing_is_dropped():
    rows, x = normal(9, 5), normal(2, 5)
    for data in (rows, TrainingSet(rows)):
        c = memokern.posterior(x, data, 0.1, certificate=True).certificate
        assert c.rows_kept.tolist() == [9, 9] and c.levels.tolist() == [0, 0]
        assert all((v == 0).all() for v in (c.weight, c.mean_error, c.score_error, c.log_z_error))
        with pytest.raises(ValueError, match=r"call build_index\(\)"):
            memokern.posterior(x, data, 0.1, method="pruned")


@pytest.mark.parametrize("tol", [0, -1.0, math.nan, math.inf, "1"])
def test_a_tolerance_must_be_positive(tol):
    with pytest.raises(ValueError, match="expected tol as a finite number > 0"):
        memokern.posterior(normal(2, 5), normal(9, 5), 0.1, tol=tol)


def test_no_queries():
    data = indexed()
    p = memokern.posterior(normal(0, 24), data, 0.1, method="pruned", certificate=True)
    assert p.mean.shape == (0, 24) and p.certificate.weight.shape == (0,)
