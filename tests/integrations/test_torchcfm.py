"""torchcfm: the field is the mean of its own targets, and its solvers take samples to the rows."""

import functools
from itertools import pairwise

import pytest
import torch

from memokern import Denoiser, Given, processes
from memokern.integrations import VectorField
from memokern.integrations.torchcfm import Bridge
from tests.integrations.clients import F64, client, normal, problem

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = (
    "ConditionalFlowMatcher",
    "TargetConditionalFlowMatcher",
    "VariancePreservingConditionalFlowMatcher",
)


def matcher(name, sigma):
    module = client("torchcfm", "torchcfm.conditional_flow_matching")
    return getattr(module, name)(sigma=sigma)


@pytest.mark.parametrize("sigma", [0.0, 0.2])
@pytest.mark.parametrize("name", NAMES)
def test_the_field_is_the_mean_of_its_targets(name, sigma):
    """E[u_t given x_t], over its own pairs (x0, x1): an integral over x0, a sum over the rows."""
    m, rows = matcher(name, sigma), torch.tensor([[-0.7], [0.2], [1.1]], dtype=F64)
    t, x = torch.tensor([0.05, 0.5, 0.9], dtype=F64), torch.tensor([[0.3]], dtype=F64)
    field = VectorField(rows, m)
    nodes = torch.linspace(-9, 9, 6001, dtype=F64)[:, None]
    for time in t:
        share, flow = torch.zeros(()), torch.zeros(())
        one = time.expand(len(nodes))
        for row in rows:
            x1 = row.expand_as(nodes)
            if name.startswith("Target"):  # its x_t is that of x1 and noise, whatever x0 is
                spread = float(1 - (1 - sigma) * time)
                own, density = x, torch.exp(-((x - time * row) / spread).square() / 2)
            elif sigma == 0:  # x_t and x1 say what x0 is
                zero = torch.zeros_like(x)
                base = m.compute_mu_t(zero, x1[:1], time[None])
                own = (x - base) / (m.compute_mu_t(zero + 1, x1[:1], time[None]) - base)
                density = torch.exp(-own.square() / 2)
            else:
                at, own = m.compute_mu_t(nodes, x1, one), nodes
                density = torch.exp(-nodes.square() / 2 - ((x - at) / sigma).square() / 2)
            target = m.compute_conditional_flow(own, x1[: len(own)], one[: len(own)], x)
            share, flow = share + density.sum(), flow + (density * target).sum()
        torch.testing.assert_close(field(time, x).reshape(()), flow / share)


def test_torchdiffeq_takes_noise_to_the_rows():
    odeint = client("torchdiffeq", "torchdiffeq").odeint
    p = problem()
    field, x = VectorField(p.data), normal(4, 2, 3, 3, seed=2)
    t = torch.linspace(0, 1, 21, dtype=F64)
    found = odeint(field, x, t, method="euler")[-1]
    want = x
    for now, then in pairwise(t):
        a, s = now, 1 - now
        want = want + (then - now) * (p.x0(want, s, a) - p.eps(want, s, a))
    torch.testing.assert_close(found, want)
    # Adaptive solvers look at the end and past it, where x no longer says what its noise was.
    end = odeint(field, x, t[[0, -1]], method="dopri5", rtol=1e-5, atol=1e-5)[-1]
    assert p.distance(end) < 0.01


def test_torchdyns_neural_ode_takes_the_field_as_it_is():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)
        core = client("torchdyn", "torchdyn.core")
        p = problem()
        field, x = VectorField(p.rows.flatten(1)), normal(4, 18, seed=3)
        node = core.NeuralODE(field, solver="euler", sensitivity="autograd")
        t = torch.linspace(0, 1, 11, dtype=F64)
        with torch.no_grad():
            found = node.trajectory(x, t_span=t)[-1]
    want = x
    for now in t[:-1]:
        want = want + 0.1 * field(now, want)
    torch.testing.assert_close(found, want)


def test_labels_as_its_unet_wrapper_takes_them():
    odeint = client("torchdiffeq", "torchdiffeq").odeint
    p = problem()
    y = torch.tensor([0, 1, 2, 2])
    field = functools.partial(VectorField(p.data), y=y)
    t = torch.linspace(0, 1, 9, dtype=F64)
    found = odeint(field, normal(4, 2, 3, 3, seed=4), t, method="euler")[-1]
    for i, label in enumerate(y.tolist()):
        assert p.distance(found[i : i + 1], label) < 1e-6
    with pytest.raises(ValueError, match="labels are y="):
        VectorField(p.data)(torch.tensor(0.5), normal(4, 2, 3, 3), args={"cond": 1})


def test_ends_and_times_per_query():
    p, x = problem(), normal(4, 2, 3, 3, seed=5)
    field = VectorField(p.data)
    torch.testing.assert_close(field(0.0, x), p.rows.mean(0) - x)
    assert torch.isfinite(field(1.0, x)).all()
    torch.testing.assert_close(field(1.25, x), field(1.0, x))
    t = torch.tensor([0.0, 0.2, 0.6, 1.0], dtype=F64)
    each = torch.cat([field(v, x[i : i + 1]) for i, v in enumerate(t)])
    torch.testing.assert_close(field(t, x), each)
    assert field(t, x.float()).dtype == torch.float32


def test_denoisers_of_other_processes():
    p, x = problem(), normal(4, 2, 3, 3, seed=6)
    t = torch.tensor([0.0, 0.3, 0.7, 0.95], dtype=F64)
    want = VectorField(p.data)(t, x)
    for name in ("edm", "vp", "ddpm", "cosine"):
        found = VectorField(Denoiser(p.data, processes.get(name)))(t, x)
        seen = slice(1, None) if name == "ddpm" else slice(None)  # it has some signal everywhere
        torch.testing.assert_close(found[seen], want[seen], rtol=1e-5, atol=1e-5)
    t = torch.tensor([0.1, 0.3, 0.7, 0.95], dtype=F64)
    given = VectorField(Given(Denoiser(p.data), label=1))(t, x)
    torch.testing.assert_close(given, VectorField(p.data)(t, x, torch.ones(4, dtype=torch.long)))


@pytest.mark.parametrize("s,straight", [(0.3, True), (0.3, False), (0.0, False)])
def test_bridges_are_processes(s, straight):
    bridge = Bridge(s, straight)
    t = torch.linspace(0.05, 0.95, 7, dtype=F64, requires_grad=True)
    for value, slope in ((bridge.alpha, bridge.d_alpha), (bridge.sigma, bridge.d_sigma)):
        (want,) = torch.autograd.grad(value(t).sum(), t)
        torch.testing.assert_close(slope(t).detach(), want)
    torch.testing.assert_close(bridge.time_of_ratio(bridge.ratio(t.detach())), t.detach())


def test_pairs_by_a_plan_are_refused():
    module = client("torchcfm", "torchcfm.conditional_flow_matching")
    plan = module.ExactOptimalTransportConditionalFlowMatcher(sigma=0.0)
    with pytest.raises(ValueError, match="paired by a plan"):
        VectorField(normal(3, 2), plan)
