"""Each regulariser by what defines it: the loss it minimises, or the potential it derives from."""

import math

import pytest
import torch

from memokern import TrainingSet
from memokern.functional import posterior
from memokern.regularizers import (
    Compose,
    CovarianceTikhonov,
    EmpiricalBayes,
    GaussianSmoothing,
    NoiseUnconditioned,
    Query,
    SmoothedBank,
    Temperature,
    Tikhonov,
    describe,
    evaluate,
    parse,
)

pytestmark = pytest.mark.usefixtures("one_thread")

torch.manual_seed(0)
ROWS = torch.randn(11, 3, dtype=torch.float64)
X = 1.5 * torch.randn(6, 3, dtype=torch.float64)
SIGMA, ALPHA = 0.7, 0.8
# A few hundred roundings of numbers of order ten.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def dense_weights(x=X, sigma=SIGMA):
    r2 = (x[:, None] - ALPHA * ROWS).square().sum(-1)
    return torch.softmax(-r2 / (2 * sigma**2), 1)


def conditional_targets(x=X):
    """The one-sample targets of denoising score matching, (alpha y_n - x) / sigma^2 [B, N, D]."""
    return (ALPHA * ROWS - x[:, None]) / SIGMA**2


ONE_ROW_EACH = [
    Tikhonov(0.3),
    Tikhonov(lambda s: 0.1 * s),
    EmpiricalBayes(-1.5),
    EmpiricalBayes(-3.0, normalized=True),
    Temperature(2.0),
    GaussianSmoothing(0.4, 6),
    SmoothedBank(0.6),
]


@pytest.mark.parametrize("reg", ONE_ROW_EACH, ids=repr)
def test_score_is_the_gradient_of_the_potential(reg):
    x = X.clone().requires_grad_()
    out = evaluate(x, ROWS, SIGMA, ALPHA, regularizer=reg)
    (grad,) = torch.autograd.grad(out.log_potential.sum(), x)
    torch.testing.assert_close(out.score, grad, **CLOSE)


def test_the_gate_of_empirical_bayes_is_exercised_on_both_sides():
    log_z = posterior(X, ROWS, SIGMA, ALPHA).log_z
    assert (log_z < -1.5).any() and (log_z > -1.5).any()


def test_tikhonov_is_the_minimiser_of_the_penalised_loss():
    c = 0.3
    s = evaluate(X, ROWS, SIGMA, ALPHA, regularizer=Tikhonov(c)).score.detach().requires_grad_()
    miss = (s[:, None] - conditional_targets()).square().sum(-1)
    loss = (dense_weights() * miss).sum(1) + c / SIGMA**2 * s.square().sum(1)
    (grad,) = torch.autograd.grad(loss.sum(), s)
    torch.testing.assert_close(grad, torch.zeros_like(grad), **CLOSE)


def test_covariance_tikhonov_is_the_minimiser_of_its_loss():
    c, values = 0.3, torch.tensor([2.0, 0.5, 0.1], dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0].T
    reg = CovarianceTikhonov(c, values, basis)
    s = evaluate(X, ROWS, SIGMA, ALPHA, regularizer=reg).score.detach().requires_grad_()
    miss = (s[:, None] - conditional_targets()).square().sum(-1)
    precision = basis.T @ torch.diag(1 / values) @ basis
    penalty = torch.einsum("bi,ij,bj->b", s, precision, s)
    loss = (dense_weights() * miss).sum(1) + c / SIGMA**2 * penalty
    (grad,) = torch.autograd.grad(loss.sum(), s)
    torch.testing.assert_close(grad, torch.zeros_like(grad), **CLOSE)


def test_covariance_tikhonov_outside_its_basis_uses_rest():
    full = torch.eye(3, dtype=torch.float64)
    values = torch.tensor([2.0, 0.5, 0.5], dtype=torch.float64)
    part = CovarianceTikhonov(0.3, values[:1], full[:1], rest=0.5)
    whole = CovarianceTikhonov(0.3, values, full)
    a = evaluate(X, ROWS, SIGMA, ALPHA, regularizer=part).score
    torch.testing.assert_close(a, evaluate(X, ROWS, SIGMA, ALPHA, regularizer=whole).score)


def test_fit_finds_the_directions_and_variances():
    torch.manual_seed(1)
    scales = torch.tensor([5.0, 2.0, 0.1, 0.1, 0.1])
    rows = torch.randn(2000, 5) * scales + 100.0
    reg = CovarianceTikhonov.fit(0.1, rows, rank=2)
    # The sample variance of 2000 normals is off by sqrt(2 / 2000) = 3 % (one deviation).
    want = torch.tensor([25.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(reg.eigenvalues, want, rtol=0.15, atol=0)
    torch.testing.assert_close(reg.rest, 0.01, rtol=0.15, atol=0)
    assert reg.eigenvectors[0, 0].abs() > 0.99 and reg.eigenvectors[1, 1].abs() > 0.99


def test_empirical_bayes_divides_by_the_larger_of_z_and_tau():
    log_tau = -1.5
    r2 = (X[:, None] - ALPHA * ROWS).square().sum(-1)
    e = torch.exp(-r2 / (2 * SIGMA**2))
    w = e / e.sum(1, keepdim=True).clamp(min=math.exp(log_tau))
    want = (ALPHA * w @ ROWS - w.sum(1, keepdim=True) * X) / SIGMA**2
    got = evaluate(X, ROWS, SIGMA, ALPHA, regularizer=EmpiricalBayes(log_tau)).score
    torch.testing.assert_close(got, want, **CLOSE)


def test_empirical_bayes_is_the_plain_score_as_tau_falls():
    plain = evaluate(X, ROWS, SIGMA, ALPHA).score
    gated = evaluate(X, ROWS, SIGMA, ALPHA, regularizer=EmpiricalBayes(-1e4)).score
    torch.testing.assert_close(gated, plain, rtol=0, atol=0)


def test_temperature_flattens_the_logits():
    got = evaluate(X, ROWS, SIGMA, ALPHA, regularizer=Temperature(2 * SIGMA)).x0
    torch.testing.assert_close(got, dense_weights(sigma=SIGMA * math.sqrt(2)) @ ROWS, **CLOSE)
    same = evaluate(X, ROWS, SIGMA, ALPHA, regularizer=Temperature(SIGMA / 2)).x0
    torch.testing.assert_close(same, dense_weights() @ ROWS, **CLOSE)


def test_smoothing_is_a_mean_over_row_biases():
    h, reg = 0.4, GaussianSmoothing(0.4, 6)
    full = torch.full((len(X),), 1.0, dtype=torch.float64)
    eps = reg.shifts(Query(X, SIGMA * full, ALPHA * full, full))
    torch.testing.assert_close(eps.sum(0), torch.zeros(3, dtype=torch.float64))
    means = [
        posterior(X, ROWS, SIGMA, ALPHA, bias=h * ALPHA * ROWS @ e / SIGMA**2).mean for e in eps
    ]
    want = (ALPHA * torch.stack(means).mean(0) - X) / SIGMA**2
    torch.testing.assert_close(
        evaluate(X, ROWS, SIGMA, ALPHA, regularizer=reg).score, want, **CLOSE
    )


def test_smoothed_bank_is_the_score_of_the_kernel_density_estimate():
    h, x = 0.6, X.clone().requires_grad_()
    spread = math.sqrt(SIGMA**2 + (ALPHA * h) ** 2)
    normal = torch.distributions.Normal(ALPHA * ROWS, spread)
    log_p = torch.logsumexp(normal.log_prob(x[:, None]).sum(-1), 1)
    (want,) = torch.autograd.grad(log_p.sum(), x)
    got = evaluate(X, ROWS, SIGMA, ALPHA, regularizer=SmoothedBank(h)).score
    torch.testing.assert_close(got, want, **CLOSE)


def test_noise_unconditioned_weights_are_a_power_of_the_distance():
    r = (X[:, None] - ALPHA * ROWS).norm(dim=-1)
    w = r ** (-3 / 2.0)
    want = (w / w.sum(1, keepdim=True)) @ ROWS
    got = evaluate(X, ROWS, SIGMA, ALPHA, regularizer=NoiseUnconditioned(2.0)).x0
    torch.testing.assert_close(got, want, **CLOSE)


ALL = [*ONE_ROW_EACH, NoiseUnconditioned(1.5), Compose(Temperature(2.0), Tikhonov(0.1)),
       CovarianceTikhonov(0.1, torch.ones(3), torch.eye(3))]  # fmt: skip


@pytest.mark.parametrize("reg", ALL, ids=repr)
def test_x0_eps_and_score_say_the_same(reg):
    out = evaluate(X, ROWS, SIGMA, ALPHA, regularizer=reg)
    torch.testing.assert_close((X + SIGMA**2 * out.score) / ALPHA, out.x0, **CLOSE)
    torch.testing.assert_close(out.eps, -SIGMA * out.score, **CLOSE)
    torch.testing.assert_close(out.v, ALPHA * out.eps - SIGMA * out.x0, **CLOSE)
    flow = -X / SIGMA + (1 + ALPHA / SIGMA) * out.x0
    torch.testing.assert_close(out.velocity(1.0, -1.0), flow, **CLOSE)


@pytest.mark.parametrize("reg", ALL, ids=repr)
def test_gradients(reg):
    x = X[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q: evaluate(q, ROWS, SIGMA, ALPHA, regularizer=reg).score, (x,)
    )


@pytest.mark.parametrize("reg", ALL, ids=repr)
def test_second_gradients(reg):
    # Both queries lie away from the kink of empirical Bayes, which is smooth elsewhere.
    x = X[:2].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda q: evaluate(q, ROWS, SIGMA, ALPHA, regularizer=reg).score, (x,)
    )


@pytest.mark.parametrize("reg", ALL, ids=repr)
def test_float32_agrees_with_float64(reg):
    # The logits reach about ten: rounding x and the rows moves each by ten roundings.
    out = evaluate(X.float(), ROWS.float(), SIGMA, ALPHA, regularizer=reg)
    assert out.score.dtype == out.x0.dtype == torch.float32
    want = evaluate(X, ROWS, SIGMA, ALPHA, regularizer=reg)
    torch.testing.assert_close(out.x0.double(), want.x0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.score.double(), want.score, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("normalized", [False, True])
def test_empirical_bayes_at_sigma_zero_keeps_only_the_rows(normalized):
    x = torch.cat([X[:2], ALPHA * ROWS[:1]])
    out = evaluate(x, ROWS, 0.0, ALPHA, regularizer=EmpiricalBayes(-3.0, normalized))
    torch.testing.assert_close(out.x0, x / ALPHA, **CLOSE)
    assert torch.equal(out.residual, torch.zeros_like(x))


def test_fit_is_the_eigendecomposition_of_the_covariance():
    values, vectors = torch.linalg.eigh(torch.cov(ROWS.T))
    reg = CovarianceTikhonov.fit(0.1, ROWS, rank=2)
    torch.testing.assert_close(reg.eigenvalues, values.flip(0)[:2], **CLOSE)
    along = (reg.eigenvectors @ vectors.flip(1)[:, :2]).abs()
    torch.testing.assert_close(along, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-9)
    assert math.isclose(reg.rest, values[0].item(), rel_tol=1e-9)


SPECTRA = {
    "steep": lambda k: k**-2.0,
    "slow": lambda k: k**-0.5,
    "flat": torch.ones_like,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8])
@pytest.mark.parametrize("name", SPECTRA)
def test_fit_keeps_its_tolerance(name, dtype):
    """|Sigma v - lambda v| <= 0.01 lambda, so each lambda is within 1 % of an eigenvalue; and
    Cauchy's interlacing: none exceeds the eigenvalue of its place. Beside the last of 20 the next
    ones are near: one product with the covariance is not enough."""
    generator = torch.Generator().manual_seed(3)
    scale = SPECTRA[name](torch.arange(1.0, 301.0, dtype=torch.float64)).sqrt()
    turn = torch.linalg.qr(torch.randn(300, 300, generator=generator, dtype=torch.float64))[0]
    rows = torch.randn(700, 300, generator=generator, dtype=torch.float64) * scale @ turn
    if dtype == torch.uint8:
        rows = (127 + 250 / rows.abs().max() / 2 * rows).round().to(torch.uint8)
    before = rows.clone()
    data = TrainingSet(rows)
    reg = CovarianceTikhonov.fit(0.1, data, rank=20)
    assert torch.equal(rows, before)
    sigma = torch.cov(data.dequantize(data.rows).double().T)
    exact = torch.linalg.eigvalsh(sigma).flip(0)
    values, vectors = reg.eigenvalues, reg.eigenvectors
    assert ((sigma @ vectors.T - vectors.T * values).norm(dim=0) <= 0.0101 * values).all()
    assert (values <= exact[:20] * (1 + 1e-5)).all()  # the dequantised rows are float32
    torch.testing.assert_close(values, exact[:20], rtol=0.01, atol=0)
    rest = (exact.sum() - values.sum()) / 280
    assert reg.rest == pytest.approx(float(rest), rel=1e-5)


def test_fit_of_more_features_than_rows():
    rows = torch.randn(40, 500, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    exact = torch.linalg.eigvalsh(torch.cov(rows.T)).flip(0)
    reg = CovarianceTikhonov.fit(0.1, rows, rank=39)
    torch.testing.assert_close(reg.eigenvalues, exact[:39], rtol=0.01, atol=0)


def test_levels_may_differ_in_the_batch():
    sigma = torch.linspace(0.2, 2.0, len(X), dtype=torch.float64)
    reg = Tikhonov(lambda s: 0.3 * s) & EmpiricalBayes(lambda s: -s)
    whole = evaluate(X, ROWS, sigma, ALPHA, regularizer=reg).score
    for i, s in enumerate(sigma.tolist()):
        one = Tikhonov(0.3 * s) & EmpiricalBayes(-s)
        want = evaluate(X[i], ROWS, s, ALPHA, regularizer=one).score
        torch.testing.assert_close(whole[i], want, **CLOSE)


@pytest.mark.parametrize("reg", ALL, ids=repr)
def test_finite_at_sigma_zero_in_float32_and_on_images(reg):
    x, rows = X.float().reshape(2, 3, 3, 1), ROWS.float().reshape(11, 3, 1)
    out = evaluate(x, rows, 0.0, ALPHA, regularizer=reg)
    assert out.x0.shape == x.shape and out.x0.dtype == torch.float32
    assert torch.isfinite(out.x0).all()
    one = evaluate(x[1, 2], rows, 0.0, ALPHA, regularizer=reg).x0
    torch.testing.assert_close(one, out.x0[1, 2])


def test_composed_gates_multiply():
    a, b = Tikhonov(0.3), EmpiricalBayes(-1.0)
    both = evaluate(X, ROWS, SIGMA, ALPHA, regularizer=a & b).score
    plain = evaluate(X, ROWS, SIGMA, ALPHA).score
    apart = [evaluate(X, ROWS, SIGMA, ALPHA, regularizer=r).score / plain for r in (a, b)]
    torch.testing.assert_close(both, plain * apart[0] * apart[1], **CLOSE)


def test_log_weights_of_the_data_count():
    weights = torch.randn(11, dtype=torch.float64)
    got = evaluate(X, TrainingSet(ROWS, log_weights=weights), SIGMA, regularizer=Tikhonov(0.1)).x0
    want = evaluate(X, ROWS, SIGMA, regularizer=Tikhonov(0.1), bias=weights).x0
    torch.testing.assert_close(got, want, **CLOSE)


def test_parse():
    assert parse("none") is None
    assert repr(parse("tikhonov:c=1e+2")) == "Tikhonov(c=100)"
    assert repr(parse("empirical-bayes:log_tau=-3,normalized=true")) == (
        "EmpiricalBayes(log_tau=-3, normalized=True)"
    )
    assert isinstance(parse("bank:h=0.1 + smoothing:h=0.1,samples=4"), Compose)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ridge:c=1", "unknown regularizer 'ridge'"),
        ("tikhonov", "needs c="),
        ("tikhonov:k=1", "knows c="),
        ("tikhonov:c=lots", "not a value"),
        ("tikhonov:c=-1", "expected c finite and >= 0"),
        ("tikhonov:c=1,c=2", "given twice"),
        ("smoothing:h=0.1,samples=3", "even number"),
        ("", "unknown regularizer ''"),
    ],
)
def test_parse_says_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_wrong_arguments():
    with pytest.raises(TypeError, match="c as a number, got str; or a function of sigma"):
        Tikhonov("0.1")
    with pytest.raises(ValueError, match="got nan"):
        Tikhonov(math.nan)
    with pytest.raises(ValueError, match="orthonormal"):
        CovarianceTikhonov(0.1, torch.ones(2), torch.ones(2, 3))
    with pytest.raises(TypeError, match=r"parse\("):
        evaluate(X, ROWS, SIGMA, regularizer="tikhonov:c=1")
    with pytest.raises(ValueError, match="one GaussianSmoothing"):
        Compose(GaussianSmoothing(0.1), GaussianSmoothing(0.1))
    with pytest.raises(ValueError, match="one SmoothedBank"):
        SmoothedBank(0.1) & (Tikhonov(0.1) & SmoothedBank(0.1))
    with pytest.raises(ValueError, match=r"c\(sigma\) finite and >= 0, got"):
        evaluate(X, ROWS, SIGMA, regularizer=Tikhonov(lambda s: s - 1))
    with pytest.raises(ValueError, match=r"log_tau\(sigma\) finite, got nan"):
        evaluate(X, ROWS, SIGMA, regularizer=EmpiricalBayes(lambda s: s * math.nan))
    with pytest.raises(ValueError, match=r"c\(sigma\).*broadcasts to the batch \(6,\)"):
        evaluate(X, ROWS, SIGMA, regularizer=Tikhonov(lambda s: torch.ones(5)))
    with pytest.raises(ValueError, match="2 numbers each and the rows 3"):
        reg = CovarianceTikhonov(0.1, torch.ones(2), torch.eye(2))
        evaluate(X, ROWS, SIGMA, regularizer=reg)
    with pytest.raises(ValueError, match="fewer than rank = 2"):
        CovarianceTikhonov.fit(0.1, torch.arange(5.0)[:, None] * torch.ones(3), rank=2)
    with pytest.raises(ValueError, match=r"expected rank in 1\.\.3, got 4; N - 1 and D limit it"):
        CovarianceTikhonov.fit(0.1, ROWS, rank=4)
    with pytest.raises(TypeError, match="rank as an int, got float"):
        CovarianceTikhonov.fit(0.1, ROWS, rank=2.0)
    with pytest.raises(ValueError, match="expected rest finite and > 0, got 0"):
        CovarianceTikhonov(0.1, torch.ones(3), torch.eye(3), rest=0)
    with pytest.raises(TypeError, match="samples as an int, got float"):
        GaussianSmoothing(0.1, samples=4.0)
    with pytest.raises(TypeError, match="seed as an int, got float"):
        GaussianSmoothing(0.1, seed=0.5)
    with pytest.raises(TypeError, match="temperature as a number, got function"):
        NoiseUnconditioned(lambda s: s)


def test_the_potential_is_computed_only_when_asked():
    asked = []

    class Counting(Tikhonov):
        def log_potential(self, posterior, query):
            asked.append(query.sigma)
            return super().log_potential(posterior, query)

    out = evaluate(X, ROWS, SIGMA, ALPHA, regularizer=Counting(0.3))
    assert torch.isfinite(out.score).all() and torch.isfinite(out.velocity()).all() and not asked
    want = SIGMA**2 / (SIGMA**2 + 0.3) * posterior(X, ROWS, SIGMA, ALPHA).log_z
    torch.testing.assert_close(out.log_potential, want, **CLOSE)
    assert len(asked) == 1


def test_a_compiled_prediction_still_has_its_potential():
    both = Tikhonov(0.3) & Temperature(2.0)
    for chosen in (Tikhonov(0.3), EmpiricalBayes(-3.0, normalized=True), both):
        compiled = torch.compile(
            lambda x, r=chosen: evaluate(x, ROWS, SIGMA, ALPHA, regularizer=r),
            fullgraph=True, backend="eager",
        )  # fmt: skip
        out, want = compiled(X), evaluate(X, ROWS, SIGMA, ALPHA, regularizer=chosen)
        torch.testing.assert_close(out.score, want.score, **CLOSE)
        assert (out.log_potential is None) == (chosen is both)
        if chosen is not both:
            torch.testing.assert_close(out.log_potential, want.log_potential, **CLOSE)


@pytest.mark.parametrize(
    "text",
    [
        "none",
        "tikhonov:c=0.1234567890123",
        "empirical-bayes:log_tau=-3.5,normalized=True",
        "temperature:sigma_c=1e-08+smoothing:h=0.1,samples=4,seed=3+bank:h=2.0",
        "unconditioned:temperature=2.0",
    ],
)
def test_describe_gives_the_text_back(text):
    assert describe(parse(text)) == text


def test_describe_says_what_it_cannot():
    for regularizer in (
        Tikhonov(lambda sigma: sigma),
        CovarianceTikhonov(0.1, torch.ones(2), torch.eye(2)),
    ):
        with pytest.raises(ValueError, match="cannot be written as text"):
            describe(regularizer)
