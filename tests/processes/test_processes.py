"""Processes: closed forms against autograd, the SDE's marginals, time grids, singular ends."""

import math

import pytest
import torch

from memokern import processes
from memokern.processes import DDPM, EDM, VE, VP, Cosine, FlowMatching, Process, ScoreSDEVP

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = [processes.get(name) for name in processes.NAMES]
ids = {"ids": processes.NAMES}


def tensor(value) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def inside(process: Process, n: int = 41) -> torch.Tensor:
    """Times strictly between the ends, off the breaks of a discrete schedule."""
    share = (torch.arange(n, dtype=torch.float64) + 0.3719) / n
    t = process.t_data + share * (process.t_noise - process.t_data)
    return t.floor() + 0.5 if isinstance(process, DDPM) else t


@pytest.mark.parametrize("process", ALL, **ids)
def test_closed_forms_are_those_of_alpha_and_sigma(process):
    t = inside(process)
    for closed in ("d_alpha", "d_sigma", "drift", "diffusion"):
        base = getattr(Process, closed)(process, t)
        torch.testing.assert_close(getattr(process, closed)(t), base, rtol=1e-9, atol=1e-13)
    # The base class itself, against central differences: error h^2 f'''/6 + eps f / h.
    h = 1e-5 * abs(process.t_noise - process.t_data)
    for name in ("alpha", "sigma"):
        function = getattr(process, name)
        slope = (function(t + h) - function(t - h)) / (2 * h)
        scale = slope.abs().max()
        found = getattr(Process, f"d_{name}")(process, t)
        assert ((found - slope).abs() <= 1e-4 * scale).all()


@pytest.mark.parametrize("process", ALL, **ids)
def test_the_sde_has_the_processes_marginals(process):
    """Integrate dm/ds = f m and dv/ds = 2 f v + g^2 (s the time of noising) and compare."""
    start, end = process.time_of_sigma(0.2), process.time_of_sigma(0.6)
    steps = 400
    t = torch.linspace(float(start), float(end), 2 * steps + 1, dtype=torch.float64)
    direction = 1.0 if end > start else -1.0
    h = abs(float(end - start)) / steps
    f, g2 = process.drift(t) * direction, process.diffusion(t).square()
    m, v = float(process.alpha(start)), 0.04
    for i in range(steps):  # classical Runge-Kutta of a linear equation, error O(h^4)
        a, b, c = (f[2 * i + k].item() for k in range(3))
        p, q, r = (g2[2 * i + k].item() for k in range(3))
        k1, l1 = a * m, 2 * a * v + p
        k2, l2 = b * (m + h / 2 * k1), 2 * b * (v + h / 2 * l1) + q
        k3, l3 = b * (m + h / 2 * k2), 2 * b * (v + h / 2 * l2) + q
        k4, l4 = c * (m + h * k3), 2 * c * (v + h * l3) + r
        m += h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        v += h / 6 * (l1 + 2 * l2 + 2 * l3 + l4)
    # A discrete schedule's g^2 jumps upwards at its indices; a step over a jump is off by at most
    # h times it, and all jumps together are at most max g^2.
    tolerance = 1e-8 if not isinstance(process, DDPM) else h * float(g2.max())
    assert m == pytest.approx(float(process.alpha(end)), abs=tolerance)
    assert v == pytest.approx(0.36, abs=tolerance)


@pytest.mark.parametrize("process", ALL, **ids)
def test_time_of_sigma_and_of_ratio_invert(process):
    low, high = process.sigma(tensor([process.t_data, process.t_noise])).tolist()
    sigma = torch.linspace(max(low, 1e-3), 0.95 * high, 30, dtype=torch.float64)
    t = process.time_of_sigma(sigma)
    torch.testing.assert_close(process.sigma(t), sigma, rtol=1e-9, atol=0)
    torch.testing.assert_close(Process._time_of_sigma(process, sigma), t, rtol=1e-9, atol=1e-12)
    ratio = process.ratio(t)
    again = process.time_of_ratio(ratio)
    torch.testing.assert_close(process.ratio(again), ratio, rtol=1e-9, atol=0)
    base = Process.time_of_ratio(process, ratio)
    torch.testing.assert_close(base, again, rtol=1e-9, atol=1e-12)
    assert float(process.time_of_sigma(0.0)) == process.t_data
    with pytest.raises(ValueError, match="levels of"):
        process.time_of_sigma(2 * high)
    with pytest.raises(ValueError, match="sigma >= 0"):
        process.time_of_sigma(-1.0)


@pytest.mark.parametrize("process", ALL, **ids)
def test_times_run_from_noise_to_the_end_asked_for(process):
    for n in (2, 3, 19):
        t = process.times(n)
        assert t.shape == (n,) and t.dtype == torch.float64
        assert float(t[0]) == process.t_noise and float(t[-1]) == process.t_data
        assert str(float(process.sigma(t)[-1])) == "0.0"  # not -0.0
        assert (process.sigma(t).diff() < 0).all()
        early = process.times(n, 0.1)
        assert float(early[0]) == process.t_noise
        assert float(process.sigma(early)[-1]) == pytest.approx(0.1, rel=1e-9)
        assert (process.sigma(early).diff() < 0).all()
    with pytest.raises(ValueError, match="expected n >= 2, got 1; the first and the last"):
        process.times(1)
    with pytest.raises(TypeError, match="as an int"):
        process.times(2.0)
    with pytest.raises(TypeError, match="expected sigma as a number, got str"):
        process.times(3, "0.1")


def test_papers_constants():
    t = tensor([0.25, 1.0])
    torch.testing.assert_close(VE().sigma(t) ** 2, (10 ** (2 * t) - 1) / (2 * math.log(10)))
    torch.testing.assert_close(VE().diffusion(t), 10**t)
    for process, low, high in ((VP(), 0.001, 3.0), (ScoreSDEVP(), 0.1, 20.0)):
        area = low * t + (high - low) * t**2 / 2
        torch.testing.assert_close(process.alpha(t) ** 2, torch.exp(-area))
        torch.testing.assert_close(process.sigma(t) ** 2, 1 - torch.exp(-area))
        torch.testing.assert_close(process.drift(t), -(low + t * (high - low)) / 2)
    # Karras et al., arXiv 2206.00364, eq. 5.
    n, i = 18, torch.arange(18, dtype=torch.float64)
    grid = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(EDM().times(n + 1), torch.cat([grid, tensor([0.0])]))
    other = EDM(sigma_min=0.1, sigma_max=10, rho=3)
    grid = (10 ** (1 / 3) + i / (n - 1) * (0.1 ** (1 / 3) - 10 ** (1 / 3))) ** 3
    torch.testing.assert_close(other.times(n, 0.1), grid)
    f = (
        torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    )
    torch.testing.assert_close(Cosine().alpha(t) ** 2, f, atol=1e-12, rtol=1e-12)
    u = FlowMatching()
    torch.testing.assert_close(u.alpha(t) + u.sigma(t), torch.ones_like(t))


def test_ddpm_meets_its_schedule_at_the_indices():
    values = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 50, dtype=torch.float64), 0)
    process = DDPM(values)
    t = torch.arange(50, dtype=torch.float64)
    torch.testing.assert_close(process.alpha(t) ** 2, values)
    torch.testing.assert_close(process.sigma(t) ** 2, 1 - values)
    assert process.t_noise == 49 and float(process.sigma(tensor(-1.0))) == 0
    torch.testing.assert_close(DDPM(values.tolist()).alpha(t), process.alpha(t))


def test_ddpm_on_the_grid_and_evenly():
    """The grid is that of its continuous time; rho None keeps DDIM's indices."""
    even = DDPM(rho=None)
    assert even.times(1001).tolist() == [999.0 - i for i in range(1001)]
    torch.testing.assert_close(even.times(3, 0.5)[1], (999 + even.time_of_sigma(0.5)) / 2)
    process = DDPM()
    for last, n in ((None, 19), (0.1, 18)):
        t = process.times(n, last)[:18]
        roots = process.ratio(t) ** (1 / 7)
        torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(17), rtol=1e-9, atol=0)
    assert (repr(process), repr(even)) == ("DDPM(1000 steps, rho=7)", "DDPM(1000 steps, even)")


@pytest.mark.parametrize("process", [VE(), VP(), ScoreSDEVP(), Cosine()], ids=repr)
def test_small_sigma_keeps_its_digits(process):
    """sigma^2 = g(0)^2 t (1 + O(t)) as t -> 0: no cancellation in 1 - alpha^2."""
    t = tensor(1e-12)
    slope = float(process.sigma(t)) ** 2 / 1e-12
    expected = float(process.diffusion(tensor(1e-9))) ** 2
    assert slope == pytest.approx(expected, rel=1e-5)


def test_singular_ends_are_infinite_not_wrong():
    zero, one = tensor(0.0), tensor(1.0)
    assert math.isinf(VE().d_sigma(zero)) and math.isinf(VP().d_sigma(zero))
    assert math.isinf(FlowMatching().drift(zero)) and math.isinf(FlowMatching().diffusion(zero))
    assert math.isinf(FlowMatching().ratio(zero))
    assert float(FlowMatching().time_of_ratio(math.inf)) == 0
    assert abs(float(Cosine().alpha(one))) < 1e-15


def test_derivatives_carry_gradients():
    t = tensor(0.4).requires_grad_()
    for process in (VP(), Cosine(), VE()):
        assert torch.autograd.gradcheck(process.d_sigma, (t,))
        assert torch.autograd.gradcheck(lambda s, p=process: Process.d_sigma(p, s), (t,))
    assert not Process.d_sigma(VP(), tensor(0.4)).requires_grad


def test_prior_is_noise_at_the_first_level():
    process = EDM(sigma_max=5.0)
    one = process.prior((1000, 8), torch.Generator().manual_seed(1), torch.float64)
    two = process.prior((1000, 8), torch.Generator().manual_seed(1), torch.float64)
    assert torch.equal(one, two) and one.dtype == torch.float64
    # 8000 squares of a standard normal: mean 1, standard error sqrt(2 / 8000); five of them.
    assert one.square().mean().item() / 25 == pytest.approx(1, abs=5 * math.sqrt(2 / 8000))
    assert process.prior((2, 3)).dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: VE(1.0), "s0 finite and > 1, got 1"),
        (lambda: VP(0.0, 1.0), "beta_min finite and > 0, got 0"),
        (lambda: VP(3.0, 1.0), "beta_max finite and > 3, got 1.0; more than beta_min"),
        (lambda: EDM(0.0), "sigma_min finite and > 0, got 0"),
        (lambda: EDM(0.1, 0.1), "sigma_max finite and > 0.1, got 0.1; more than sigma_min"),
        (lambda: EDM(rho=0.0), "rho finite and > 0, got 0"),
        (lambda: Cosine(math.nan), "s finite and > 0, got nan"),
        (lambda: DDPM([0.5, 0.6]), "strictly decreasing"),
        (lambda: DDPM([0.5, -0.1]), "strictly decreasing"),
        (lambda: DDPM([0.5, 0.0, 0.0]), "strictly decreasing"),
        (lambda: DDPM([[0.5]]), r"\[T\]"),
        (lambda: DDPM(rho=-7), "rho finite and > 0, got -7"),
        (lambda: processes.get("edn"), "ve, vp, score-sde-vp, edm"),
        (lambda: EDM().time_of_sigma(math.nan), "sigma >= 0, got nan"),
        (lambda: EDM().time_of_ratio(tensor([0.5, -1.0])), "ratio >= 0, got -1"),
    ],
)
def test_wrong_constants(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize("name", ["vp", "ddpm"])
def test_inverses_have_no_values_to_check_under_a_compiler_or_a_transform(name):
    process = processes.get(name)
    ratio = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
    want = process.time_of_ratio(ratio)
    torch.testing.assert_close(torch.vmap(process.time_of_ratio)(ratio), want)
    compiled = torch.compile(process.time_of_ratio, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ratio), want)
    with pytest.raises(ValueError, match="expected ratio >= 0"):
        process.time_of_ratio(-ratio)
