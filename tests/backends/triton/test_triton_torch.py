"""The Triton kernels inside of PyTorch: compiled functions, graphs, streams, several devices."""

from __future__ import annotations

import pytest
import torch
from triton_interpreter import DEVICE

pytest.importorskip("triton")

import memokern
from memokern.util import env

SIGMA = 0.5


@pytest.fixture(autouse=True)
def by_triton(monkeypatch):
    monkeypatch.setenv(env.BACKEND, "triton")


def problem(device: torch.device = DEVICE, d: int = 40):
    """Queries [5, d], and a function of them that goes through the sweep and its backward."""
    g = torch.Generator().manual_seed(0)
    data = memokern.TrainingSet(torch.randn(90, d, generator=g).to(device))
    x = torch.randn(5, d, generator=g).to(device)
    _ = data.sq_norms, data.center

    def score(x: torch.Tensor) -> torch.Tensor:
        return memokern.posterior(x, data, SIGMA, method="dense").score

    def gradient(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(score(x).square().sum(), x)[0]

    return x, score, gradient


@pytest.mark.long
def test_a_compiled_function_forward_and_backward() -> None:
    x, score, gradient = problem()
    torch._dynamo.reset()
    run = torch.compile(score, backend="aot_eager", fullgraph=True)
    leaf = x.clone().requires_grad_()
    value = run(leaf)
    assert torch.equal(value.detach(), score(x))
    (got,) = torch.autograd.grad(value.square().sum(), leaf)
    torch.testing.assert_close(got, gradient(x), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_by_inductor(mode: str) -> None:
    """Several calls: the second mode records a CUDA graph on one of the first, then replays it."""
    x, score, _ = problem()
    torch._dynamo.reset()
    run = torch.compile(score, mode=mode, fullgraph=True)
    for _ in range(4):
        x = x + 0.125
        torch.testing.assert_close(run(x).clone(), score(x), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("d", [40, 700])
def test_a_cuda_graph(d: int) -> None:
    """Captured after a first call, then replayed with other queries."""
    x, score, gradient = problem(d=d)
    for call in (score, gradient):
        static = x.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(static)
        for shift in (0.25, -0.5):
            static.copy_(x + shift)
            graph.replay()
            torch.testing.assert_close(out, call(x + shift))


@pytest.mark.gpu
def test_a_stream_of_its_own() -> None:
    """What is queued on a stream is what the launch there sees."""
    x, score, _ = problem()
    want, stream = score(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        got = score(late)
    stream.synchronize()
    assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU")
def test_a_second_device_that_is_not_the_current_one() -> None:
    x, score, gradient = problem()
    y, there, gradient_there = problem(torch.device("cuda", 1))
    assert torch.cuda.current_device() == 0
    torch.testing.assert_close(there(y).cpu(), score(x).cpu(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient_there(y).cpu(), gradient(x).cpu(), rtol=1e-5, atol=1e-5)
