"""Calls that go below PyTorch's dispatcher: when they may, and that nobody can tell."""

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import memokern
from memokern import TrainingSet
from memokern.backends import protocol
from memokern.strategies import small_call
from memokern.util import env
from memokern.util.torch_internals import is_plain, undispatched
from tests import cases
from tests.cases import F32

pytestmark = pytest.mark.skipif(
    protocol.get("cpu").unavailable() is not None, reason="only the compiled kernels go below it"
)


SUMS = ("mean", "log_z", "mean_logit", "mean_bias", "weight_sq")
FIELDS = (*SUMS, "sigma", "alpha", "temperature", "ess")


def normal(*shape, seed=0, dtype=F32):
    return cases.normal(*shape, seed=seed, dtype=F32).to(dtype)


def small_mean(x, data, sigma=0.5, alpha=1.0, temperature=1.0):
    call = small_call.small_call(x, data, sigma, alpha, temperature, None, "auto")
    return None if call is None else small_call.small_mean(call)


class Seen(TorchDispatchMode):
    """The operations that a mode is shown."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3)])
@pytest.mark.parametrize(
    ("x_dtype", "dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.uint8),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float64),
    ],
)
def test_the_short_way_gives_the_same_bits_as_the_dispatcher(x_dtype, dtype, batch, weighted):
    shape = (2, 3, 2)
    stored = (normal(40, *shape, seed=1) * 30 + 128).to(dtype)
    data = TrainingSet(stored, log_weights=normal(40, seed=2) if weighted else None)
    x = data.dequantize(normal(*batch, *shape, seed=3, dtype=x_dtype)).to(x_dtype)
    for numbers in ((0.5, 1.0, 1.0), (2.5, -0.7, 3.0), (0.0, 1.0, 1.0), (1e-50, 1e-50, 1e-50)):
        short = small_mean(x, data, *numbers)
        with Seen() as seen:
            want = memokern.posterior(x, data, *numbers)
        assert seen.names.count("memokern.posterior.default") == 1
        torch.testing.assert_close(short, want.mean, rtol=0, atol=0, equal_nan=True)
        got = memokern.posterior(x, data, *numbers)
        for name in FIELDS:
            a, b = getattr(got, name), getattr(want, name)
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        score = memokern.score(x, data, *numbers)
        torch.testing.assert_close(score, want.score, rtol=0, atol=0, equal_nan=True)


def test_numbers_as_tensors_may_be_views_of_one_number():
    data, x = TrainingSet(normal(9, 3, seed=1)), normal(4, 3)
    one = torch.tensor(0.5, dtype=torch.float64)
    got, want = memokern.posterior(x, data, one, one, one), memokern.posterior(x, data, *[0.5] * 3)
    assert torch.equal(got.mean, want.mean) and torch.equal(got.log_z, want.log_z)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, F32, torch.int64])
def test_tensors_of_one_number_go_the_short_way_too(dtype, shape):
    data, x = TrainingSet(normal(9, 3, seed=1)), normal(4, 3)
    for numbers in ((2.0, -1.0, 3.0), (0.0, 1.0, 1.0)):
        tensors = [torch.full(shape, v, dtype=dtype) for v in numbers]
        short = small_mean(x, data, *tensors)
        assert torch.equal(short, small_mean(x, data, *numbers))
        assert torch.equal(short, small_mean(x, data, numbers[0], tensors[1], numbers[2]))
        with Seen() as seen:
            want = memokern.posterior(x, data, *tensors)
        assert "memokern.posterior.default" in seen.names
        assert torch.equal(memokern.denoise(x, data, *tensors), want.mean)
        score = memokern.score(x, data, *tensors)
        torch.testing.assert_close(score, want.score, rtol=0, atol=0, equal_nan=True)


def test_tensors_that_do_not_fit_the_short_way_go_the_long_one():
    data, x, one = TrainingSet(normal(9, 3, seed=1)), normal(4, 3), torch.tensor(0.5)
    want = memokern.denoise(x, data, 0.5)
    watched = one.clone().requires_grad_()
    for other in (watched, torch.nn.Parameter(one), one.expand(4)):
        for place in range(3):
            numbers = [0.5, 1.0, 1.0]
            numbers[place] = other
            assert small_mean(x, data, *numbers) is None
        torch.testing.assert_close(memokern.denoise(x, data, other), want)
    assert memokern.denoise(x, data, watched).requires_grad
    for wrong in (math.nan, math.inf, -1.0):
        assert small_mean(x, data, torch.tensor(wrong)) is None
        assert small_mean(x, data, 0.5, 1.0, torch.tensor(wrong)) is None


def test_what_is_plain():
    x = normal(1, 2)
    assert undispatched(x, x[:, :1], None)
    with torch.inference_mode():
        assert undispatched(normal(1, 2))
    negative = torch.view_as_complex(normal(1, 2, 2)).conj().imag
    assert negative.is_neg()
    for other in (
        torch.nn.Parameter(x),
        x.clone().requires_grad_(),
        x.to("meta"),
        x.to_sparse(),
        negative,
        FakeTensorMode().from_tensor(x),
        [0.0],
    ):
        assert not undispatched(x, other), other
    assert is_plain(x) and not is_plain(negative) and not is_plain(x.to("meta"))
    assert not is_plain(torch.nn.Parameter(x)) and is_plain(x.clone().requires_grad_())
    with torch.no_grad():
        assert undispatched(x.clone().requires_grad_())


def test_a_negated_view_is_read_as_it_stands():
    data, z = TrainingSet(normal(9, 3, seed=1)), torch.view_as_complex(normal(4, 3, 2))
    x = z.conj().imag
    assert x.is_neg()
    torch.testing.assert_close(memokern.denoise(x, data, 0.5), memokern.denoise(-z.imag, data, 0.5))


def test_modes_transforms_and_profilers_are_given_the_operation():
    data, x = TrainingSet(normal(9, 3, seed=1)), normal(1, 3)
    assert small_mean(x, data) is not None
    answers = []

    def ask(q):
        answers.append(undispatched(x, data.rows))
        return q.sum()

    with Seen() as seen:
        memokern.denoise(x, data, 0.5)
        ask(x)
    assert "memokern.posterior.default" in seen.names
    torch.func.grad(ask)(x)
    torch.func.vmap(ask)(x)
    with forward_ad.dual_level():
        ask(x)
    with torch.device("cpu"):  # a mode of torch functions
        ask(x)
    with torch.profiler.profile() as profile:
        memokern.denoise(x, data, 0.5)
        ask(x)
    assert "memokern::posterior" in {event.key for event in profile.key_averages()}
    assert answers == [False] * 6
    ask(x)
    assert answers[-1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_contains_the_operation():
    data, x = TrainingSet(normal(9, 3, seed=1)), normal(1, 3)
    traced = torch.jit.trace(lambda q: memokern.denoise(q, data, 0.5), x, check_trace=False)
    assert "memokern::posterior" in str(traced.graph)
    torch.testing.assert_close(traced(x + 1), memokern.denoise(x + 1, data, 0.5))


def test_gradients_are_recorded():
    data, x = TrainingSet(normal(9, 3, seed=1)), normal(2, 3).requires_grad_()
    for call in (memokern.denoise, memokern.score):
        assert call(x, data, 0.5).requires_grad
        with torch.no_grad():
            assert not call(x, data, 0.5).requires_grad


def test_caches_made_in_inference_mode_serve_a_gradient_later():
    data, x = TrainingSet(normal(9, 3, seed=1)), normal(2, 3)
    with torch.inference_mode():
        inside = memokern.denoise(x, data, 0.5)
    assert inside.is_inference() and not data.center.is_inference()
    outside = memokern.denoise(x.requires_grad_(), data, 0.5)
    outside.sum().backward()
    assert torch.equal(inside, outside) and torch.isfinite(x.grad).all()


def test_the_backend_may_change_between_calls(monkeypatch):
    data, x = TrainingSet(normal(9, 3, seed=1)), normal(1, 3)
    assert small_mean(x, data) is not None
    monkeypatch.setenv(env.BACKEND, " Reference ")
    assert small_mean(x, data) is None
    assert protocol.preferred("cpu") is protocol.get("reference")
    monkeypatch.setenv(env.BACKEND, "quantum")
    with pytest.raises(RuntimeError, match="must be one of"):
        memokern.denoise(x, data, 0.5)
    monkeypatch.delenv(env.BACKEND)
    assert protocol.preferred("cpu") is protocol.get("cpu")


def test_memory_that_moved_is_read_where_it_is():
    """share_memory_ moves a tensor's values; the old place may hold anything afterwards."""
    data, x = TrainingSet(normal(9, 3, seed=1)), normal(1, 3)
    want = memokern.denoise(x, data, 0.5)
    for tensor in (data.rows, data.center64, data.sq_norms):
        before = tensor.data_ptr()
        tensor.share_memory_()
        assert tensor.data_ptr() != before
    assert torch.equal(memokern.denoise(x, data, 0.5), want)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((-1.0,), "sigma finite and >= 0, got -1.0"),
        ((float("nan"),), "sigma finite and >= 0, got nan"),
        ((1.0, float("inf")), "alpha finite, got inf"),
        ((1.0, 1.0, 0.0), "temperature finite and > 0, got 0.0"),
        ((torch.tensor(-1.0),), "sigma finite and >= 0, got -1.0"),
    ],
)
def test_one_number_out_of_range_is_refused(numbers, message):
    data = TrainingSet(normal(9, 3, seed=1))
    for call in (memokern.denoise, memokern.score, memokern.posterior):
        with pytest.raises(ValueError, match=message):
            call(normal(1, 3), data, *numbers)


def test_what_does_not_fit_the_short_way_goes_the_long_one():
    data, x = TrainingSet(normal(9, 3, seed=1)), normal(4, 3)
    odd = normal(3, 4).T
    assert not odd.is_contiguous()
    for query in (odd, x.double(), normal(small_call.SMALL, 3)):
        assert small_mean(query, data) is None
        torch.testing.assert_close(
            memokern.denoise(query, data, 0.5), memokern.posterior(query, data, 0.5).mean
        )
    assert small_mean(x, data, 1) is None
    with_gradient = data.rows.clone().requires_grad_()
    assert small_mean(x, with_gradient) is None
    assert torch.equal(small_mean(x, data.rows), memokern.denoise(x, with_gradient, 0.5))
    indexed = TrainingSet(normal(60, 20)).build_index(dims=(4,))
    assert small_mean(normal(4, 20), indexed) is None
    for wrong in (x[:, :2], x[0, :2], x.half(), [0.0]):
        assert small_mean(wrong, data) is None
