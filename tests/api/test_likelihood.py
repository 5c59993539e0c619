"""The likelihood along the flow against densities that are known, and what it says of an end."""

from __future__ import annotations

import math

import pytest
import torch

import memokern
from memokern import Denoiser, TrainingSet, processes, regularizers
from memokern.likelihood import local_dimension, log_likelihood
from memokern.processes import Process
from memokern.regularizers.divergence import x0_divergence

pytestmark = pytest.mark.usefixtures("one_thread")

# With a level between the rows' distances and one beyond them.
LEVELS = [("vp", 0.4), ("edm", 0.4), ("flow-matching", 0.05)]
LEVELS += [
    pytest.param(name, sigma, marks=pytest.mark.long)
    for name in ("ve", "vp", "cosine", "score-sde-vp", "ddpm")
    for sigma in (0.05, 0.3)
]


COARSE = {"rtol": 1e-5, "atol": 1e-6}  # enough to tell other rows from these


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noisy(rows: torch.Tensor, process: Process, sigma: float, seed: int = 1) -> torch.Tensor:
    """A query from each row at this level of noise."""
    alpha = process.alpha(process.time_of_sigma(sigma)).to(rows)
    return alpha * rows + sigma * normal(*rows.shape, seed=seed)


@pytest.mark.parametrize(("name", "sigma"), LEVELS)
def test_the_flow_has_the_density_of_the_mixture(name, sigma):
    """From the mixture at t_noise the flow transports the mixture of every level: both ways to its
    density agree to what the solver may err in 100 steps."""
    process, rows = processes.get(name), normal(12, 2)
    x = noisy(rows[:6], process, sigma)
    found = log_likelihood(
        Denoiser(rows, process), x, sigma_min=sigma, terminal="mixture", rtol=1e-8, atol=1e-9
    )
    alpha = process.alpha(process.time_of_sigma(sigma))
    right = memokern.log_density(x, rows, sigma, alpha)
    torch.testing.assert_close(found.log_density, right, rtol=0, atol=1e-6)
    assert found.nfe > 20 and found.latent.shape == x.shape


@pytest.mark.parametrize("name", ["edm", pytest.param("vp", marks=pytest.mark.long)])
def test_the_flow_has_the_density_of_the_mixture_of_digits(name):
    """64 dimensions, uint8 rows, float64 queries; at the default tolerances."""
    digits = TrainingSet.digits().subset(slice(0, 100))
    process = processes.get(name)
    sigma = 0.3
    x = noisy(digits[:2].double(), process, sigma)
    found = log_likelihood(Denoiser(digits, process), x, sigma_min=sigma, terminal="mixture")
    alpha = process.alpha(process.time_of_sigma(sigma))
    right = memokern.log_density(x, digits, sigma, alpha)
    torch.testing.assert_close(found.log_density, right, rtol=1e-6, atol=1e-5)


def test_tolerances_are_followed():
    rows = normal(8, 2)
    x = noisy(rows, processes.EDM(), 0.1)
    right = memokern.log_density(x, rows, 0.1)
    errors = []
    for rtol in (1e-3, 1e-6):
        found = log_likelihood(
            Denoiser(rows), x, sigma_min=0.1, terminal="mixture", rtol=rtol, atol=rtol / 10
        )
        errors.append(float((found.log_density - right).abs().max()))
    assert errors[1] < 1e-4 < errors[0] < 0.1, errors


def test_the_default_terminal_is_the_law_of_the_starts():
    """One row at 0 and an unregularised flow: x goes to x sigma_T / sigma, and the density of the
    samples at sigma is N(0, sigma^2 I)."""
    rows = torch.zeros(1, 3, dtype=torch.float64)
    x = 0.2 * normal(5, 3)
    found = log_likelihood(Denoiser(rows, processes.VE()), x, sigma_min=0.2)
    right = -x.square().sum(1) / 0.08 - 3 * math.log(0.2 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(found.log_density, right, rtol=1e-6, atol=1e-6)


def test_a_smoothed_bank_has_the_density_of_the_kernel_density_estimate():
    rows, h, sigma = normal(10, 2), 0.3, 0.05
    x = noisy(rows, processes.EDM(), 0.3)
    denoiser = Denoiser(rows, regularizer=regularizers.SmoothedBank(h))
    found = log_likelihood(denoiser, x[:3], sigma_min=sigma, terminal="mixture", **COARSE)
    right = memokern.log_density(x[:3], rows, math.hypot(h, sigma))
    torch.testing.assert_close(found.log_density, right, rtol=0, atol=1e-3)


def test_labels_and_biases_choose_the_rows():
    rows = normal(10, 2)
    data = TrainingSet(rows, labels=[0] * 4 + [1] * 6)
    x = noisy(rows[:3], processes.EDM(), 0.2)
    label = torch.tensor([0, 1, 1])
    found = log_likelihood(
        Denoiser(data), x, sigma_min=0.2, terminal="mixture", label=label, **COARSE
    )
    parts = [rows[:4], rows[4:], rows[4:]]
    right = [memokern.log_density(x[i : i + 1], part, 0.2) for i, part in enumerate(parts)]
    torch.testing.assert_close(found.log_density, torch.cat(right), rtol=0, atol=1e-3)
    bias = normal(10, seed=4)
    found = log_likelihood(
        Denoiser(rows), x, sigma_min=0.2, terminal="mixture", bias=bias, **COARSE
    )
    right = memokern.log_density(x, rows, 0.2, bias=bias)
    torch.testing.assert_close(found.log_density, right, rtol=0, atol=1e-3)


def test_conditions_choose_the_rows():
    rows, conditions = normal(10, 2), normal(10, 1, seed=5)
    x, asked = noisy(rows[:2], processes.EDM(), 0.2), normal(2, 1, seed=6)
    denoiser = Denoiser(TrainingSet(rows, conditions=conditions))
    found = log_likelihood(
        denoiser, x, sigma_min=0.2, terminal="mixture", condition=asked, bandwidth=0.4, **COARSE
    )
    bias = -(asked - conditions.T).square() / (2 * 0.4**2)
    right = [memokern.log_density(x[i : i + 1], rows, 0.2, bias=bias[i]) for i in range(2)]
    torch.testing.assert_close(found.log_density, torch.cat(right), rtol=0, atol=1e-3)


KNOWN = {
    "none": None,
    "tikhonov": regularizers.Tikhonov(0.05),
    "bank": regularizers.SmoothedBank(0.2),
    "temperature": regularizers.Temperature(0.8),
    "empirical Bayes": regularizers.EmpiricalBayes(-0.5),
    "normalised": regularizers.EmpiricalBayes(-2.0, normalized=True),
    "smoothing": regularizers.GaussianSmoothing(0.3, 4),
    "composed": regularizers.Temperature(0.8)
    & regularizers.EmpiricalBayes(-0.5)
    & regularizers.Tikhonov(0.05),
    "other order": regularizers.Tikhonov(0.05) & regularizers.EmpiricalBayes(-0.5),
    "all": regularizers.SmoothedBank(0.2)
    & regularizers.GaussianSmoothing(0.3, 4)
    & regularizers.EmpiricalBayes(-0.5),
}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_divergence_of_x0_is_the_trace_of_its_jacobian(name, alpha):
    rows, sigma, x = normal(9, 3), 0.4, normal(5, 3, seed=2)

    def x0(x):
        found = regularizers.evaluate(x, rows, sigma, alpha, regularizer=KNOWN[name])
        return found.x0

    got = x0_divergence(regularizers.evaluate(x, rows, sigma, alpha, regularizer=KNOWN[name]))
    right = [
        torch.autograd.functional.jacobian(x0, x[i : i + 1])[0, :, 0].trace() for i in range(5)
    ]
    torch.testing.assert_close(got, torch.stack(right), rtol=1e-10, atol=1e-10)


class Odd(regularizers.Regularizer):
    """A gate that says nothing of divergences: Tikhonov's."""

    def gate(self, residual, query, posterior):
        factor = query.sigma.square() / (query.sigma.square() + 0.05)
        return factor.reshape(-1, 1) * residual


@pytest.mark.parametrize("odd", [Odd(), regularizers.CovarianceTikhonov(
    0.05, torch.ones(1, dtype=torch.float64), torch.eye(2, dtype=torch.float64)[:1])])  # fmt: skip
def test_what_has_no_formula_is_differentiated(odd):
    rows = normal(6, 2)
    x = noisy(rows, processes.EDM(), 0.3)
    known, found = (
        log_likelihood(Denoiser(rows, regularizer=r), x[:2], sigma_min=0.3, rtol=1e-4, atol=1e-5)
        for r in (regularizers.Tikhonov(0.05), odd)
    )
    assert x0_divergence(Denoiser(rows, regularizer=odd).evaluate(x, 0.3)) is None
    torch.testing.assert_close(found.log_density, known.log_density, rtol=0, atol=1e-2)


def test_a_query_without_effect_on_the_others():
    rows = normal(6, 2)
    x = noisy(rows, processes.EDM(), 0.3)
    denoiser = Denoiser(rows)
    every = log_likelihood(denoiser, x, sigma_min=0.3, rtol=1e-5).log_density
    alone = log_likelihood(denoiser, x[2:3], sigma_min=0.3, rtol=1e-5).log_density
    torch.testing.assert_close(every[2:3], alone, rtol=0, atol=1e-3)
    shaped = log_likelihood(denoiser, x.reshape(2, 3, 2), sigma_min=0.3, rtol=1e-5).log_density
    torch.testing.assert_close(shaped.reshape(-1), every, rtol=0, atol=0)
    assert log_likelihood(denoiser, x[:0], sigma_min=0.3).log_density.shape == (0,)


def test_bits_per_dim_of_uniform_bytes_is_eight():
    """A density of 1 / 2^D on [-1, 1]^D, in cells of 2/255, is log2(255) bits per dimension."""
    from memokern.likelihood import Likelihood

    dim = 12
    log_p = torch.full((1,), -dim * math.log(2.0), dtype=torch.float64)
    found = Likelihood(log_p, log_p, torch.zeros(1, dim), 0.1, dim, 2 / 255, 1)
    assert found.bits_per_dim().item() == pytest.approx(math.log2(255))
    assert found.bits_per_dim(1.0).item() == pytest.approx(1.0)
    data = TrainingSet.digits().subset(slice(0, 5))
    x = data[:1].double()
    assert log_likelihood(Denoiser(data), x, sigma_min=1.0).spacing == 1 / 8
    with pytest.raises(ValueError, match="expected spacing finite and > 0"):
        found.bits_per_dim(0.0)


def test_memorised_points_are_likelier_than_others():
    """The flow of the memorising score has its mass at the rows; a kernel density estimate does
    not tell rows from other points of the same law."""
    digits = TrainingSet.digits()
    train, x = digits.subset(slice(0, 20)), digits[torch.tensor([0, 300])]
    found = log_likelihood(Denoiser(train), x, sigma_min=0.3, rtol=1e-2, atol=1e-3)
    bits = found.bits_per_dim()
    assert bits[0] < bits[1] - 1


def test_wrong_arguments():
    rows, x = normal(4, 2), normal(3, 2)
    denoiser = Denoiser(rows)
    with pytest.raises(TypeError, match=r"expected a memokern.Denoiser, or .* got Tensor"):
        log_likelihood(rows, x)
    with pytest.raises(ValueError, match="expected terminal one of prior, mixture"):
        log_likelihood(denoiser, x, terminal="other")
    with pytest.raises(ValueError, match="does not start from the mixture"):
        gated = Denoiser(rows, regularizer=regularizers.Tikhonov(0.1))
        log_likelihood(gated, x, terminal="mixture")
    with pytest.raises(ValueError, match="to match the rows"):
        log_likelihood(denoiser, x[:, :1])
    with pytest.raises(ValueError, match="finite x"):
        log_likelihood(denoiser, x * torch.nan)
    with pytest.raises(ValueError, match="expected sigma_min"):
        log_likelihood(denoiser, x, sigma_min=0.0)
    with pytest.raises(ValueError, match="sigma"):
        log_likelihood(denoiser, x, sigma_min=90.0)


def test_local_dimension_of_a_plane_and_of_points():
    """2500 rows on a plane in five dimensions, 0.04 apart: 2 at a sigma between that and the
    plane's size, and 0 on a row below it. Off the plane by a, a^2 / sigma^2 more."""
    side = torch.linspace(-1, 1, 50, dtype=torch.float64)
    plane = torch.cartesian_prod(side, side)
    basis = torch.linalg.qr(normal(5, 2)).Q
    rows = plane @ basis.T
    x = torch.stack([rows.mean(0), rows[1275]])
    assert local_dimension(x, rows, 0.15).tolist() == pytest.approx([2.0, 2.0], abs=1e-3)
    assert local_dimension(rows[1275:1276], rows, 1e-3).item() == pytest.approx(0.0, abs=1e-6)
    normal_to = torch.linalg.svd(basis.T, full_matrices=True).Vh[2]
    off = x[:1] + 0.3 * normal_to
    assert local_dimension(off, rows, 0.15).item() == pytest.approx(2 + 4, abs=2e-3)
    p = memokern.posterior(off, rows, 0.15)
    whole = 5 + 0.15**2 * (p.divergence + p.score.square().sum(1))
    torch.testing.assert_close(local_dimension(off, rows, 0.15), whole, rtol=1e-9, atol=1e-9)
