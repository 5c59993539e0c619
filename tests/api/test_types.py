"""Types: half-precision queries, and what pipelines ask of a network for its type and device."""

import pytest
import torch

import memokern
from memokern import Denoiser, TrainingSet, processes, regularizers
from memokern.denoiser import PREDICTIONS

pytestmark = pytest.mark.usefixtures("one_thread")
HALVES = [torch.float16, torch.bfloat16]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("sigma", [0.5, torch.tensor([0.5, 0.7, 0.9])])
@pytest.mark.parametrize("rows", ["tensor", "set", "index"])
def test_half_queries_are_computed_in_float32(kind, sigma, rows):
    values = normal(40, 24, seed=1)
    data = values if rows == "tensor" else TrainingSet(values)
    if rows == "index":
        data.build_index(dims=(8, 16))
    x, v = normal(3, 24, seed=2).to(kind), normal(3, 24, seed=3).to(kind)
    wide = x.float()
    for name in ("denoise", "score"):
        found = getattr(memokern, name)(x, data, sigma)
        assert found.dtype == kind
        assert torch.equal(found, getattr(memokern, name)(wide, data, sigma).to(kind))
    for name in ("log_density", "weights"):
        found, want = (getattr(memokern, name)(q, data, sigma) for q in (x, wide))
        assert torch.equal(found, want)
    assert torch.equal(
        memokern.jvp(x, data, v, sigma), memokern.jvp(wide, data, v.float(), sigma).to(kind)
    )
    assert torch.equal(memokern.nearest(x, data, 3).index, memokern.nearest(wide, data, 3).index)
    found, want = memokern.posterior(x, data, sigma), memokern.posterior(wide, data, sigma)
    assert found.mean.dtype == torch.float32 and torch.equal(found.score, want.score)
    halves = [memokern.posterior_state(x, part, sigma) for part in (values[:20], values[20:])]
    torch.testing.assert_close(memokern.merge(*halves).posterior().mean, want.mean)
    memokern.explain(x, data, sigma)
    x.requires_grad_()
    (g,) = torch.autograd.grad(memokern.denoise(x, data, sigma).float().sum(), x)
    assert g.dtype == kind


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("regularizer", [None, regularizers.Tikhonov(0.1)])
def test_a_denoiser_returns_the_type_of_x(kind, regularizer):
    digits = TrainingSet.digits()
    x, labels = normal(3, 8, 8).to(kind), torch.tensor([1, 7, 1])
    for process in (processes.EDM(), processes.FlowMatching()):
        for prediction in PREDICTIONS:
            network = Denoiser(digits, process, regularizer, prediction)
            for t in (0.5, torch.tensor(0.5, dtype=kind), torch.full((3, 1, 1), 0.5)):
                for label in (None, 7, labels):
                    found = network(x, t, label)
                    assert found.dtype == kind
                    assert torch.equal(found, network(x.float(), t, label).to(kind))
    assert network.evaluate(x, 0.5).x0.dtype == torch.float32


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        (TrainingSet.digits(), torch.float32),
        (normal(5, 3).half(), torch.float32),
        (normal(5, 3), torch.float32),
        (normal(5, 3).double(), torch.float64),
        (TrainingSet(normal(5, 3), log_weights=[0.0] * 5), torch.float32),
    ],
)
def test_what_pipelines_ask_for(rows, kind):
    network = Denoiser(rows)
    # diffusers' get_parameter_dtype and torch.nn code in general.
    assert next(network.parameters()).dtype == kind == network.dtype
    assert next(p for p in network.parameters() if p.is_floating_point()).device == network.device
    assert not any(p.requires_grad for p in network.parameters())
    assert sum(p.numel() for p in network.parameters()) == 0
    x = torch.zeros(2, *network.data.shape, dtype=network.dtype)
    assert network(x, 0.5).dtype == kind
    assert "kind" not in network.state_dict()
    holder = torch.nn.Sequential(network)
    holder.load_state_dict(holder.state_dict())
    half = Denoiser(rows).to(torch.float16)
    assert half.dtype == next(half.parameters()).dtype == torch.float16
    assert half(x.half(), 0.5).dtype == torch.float16 and half.affine.dtype == torch.float64
    assert network.to("meta").device.type == next(network.parameters()).device.type == "meta"


def test_other_types_are_refused():
    rows = normal(5, 3)
    for x in (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.complex64)):
        for call in (memokern.denoise, memokern.score, memokern.posterior):
            with pytest.raises(TypeError, match="expected x as float32 or float64"):
                call(x, rows, 0.5)
        with pytest.raises(TypeError, match="expected x as float32 or float64"):
            Denoiser(rows)(x, 0.5)
    with pytest.raises(TypeError, match="expected x as a tensor"):
        memokern.score([[0.0] * 3], rows, 0.5)
    with pytest.raises(TypeError, match="expected x as a tensor"):
        Denoiser(rows)([[0.0] * 3], 0.5)
