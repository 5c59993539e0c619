"""What the samplers share: the state of a run, its noise levels, and what it returns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from memokern import validate
from memokern.conditional import Label
from memokern.given import Given, label_part
from memokern.processes import Process
from memokern.results import Certificate
from memokern.util import checks

DTYPES = (torch.float32, torch.float64)
# Where alpha / sigma is less than this, x says nothing about the data, and 1 / alpha is not used.
NO_SIGNAL = 1e-4


@dataclass(frozen=True)
class Samples:
    r"""What a sampler returns.

    Attributes:
        x: the samples [S, \*shape]. trajectory: [K, S, \*shape], the start included; or None.
        times, sigmas: [K] float64, the process times and noise levels of the trajectory's states
            (for rk45 without a trajectory, of the first and the last state).
        nfe: how often the denoiser was evaluated, each time at all S queries; by "exponential" at
            those whose end is not known yet.
    """

    x: Tensor
    trajectory: Tensor | None
    times: Tensor
    sigmas: Tensor
    nfe: int


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the denoiser in a run; `watch` is called with it.

    Attributes:
        step: the solver's step that it belongs to, from 1; None for rk45, which may reject a step.
        count: how many evaluations the run has made, this one included.
        t, alpha, sigma: where the queries are.
        seconds: how long it took, the certificate included.
        certificate: which rows were swept for each query, and bounds on the error.
        phase: of the solver "exponential", what the evaluation was for: "gaussian", "middle" or
            "end"; else None.
    """

    step: int | None
    count: int
    t: float
    alpha: float
    sigma: float
    seconds: float
    certificate: Certificate
    phase: str | None = None


Watch = Callable[[Evaluation], None]


class Denoises(Protocol):
    r"""What samplers ask of a denoiser: :class:`memokern.Denoiser`, or a network in its place.

    process: gives t its meaning. space: an empty tensor [0, \*shape], of the type and on the device
    that queries have. evaluate(x, t, label, bias=, certificate=): an object with x0 and eps
    [\*batch, \*shape]; with a certificate where `watch` asks for one.
    """

    process: Process

    @property
    def space(self) -> Tensor: ...

    @property
    def evaluate(self) -> Callable[..., Any]: ...


@dataclass(frozen=True)
class Level:
    """A time of a process, with its signal scale and noise level."""

    t: float
    alpha: float
    sigma: float

    @property
    def signal(self) -> bool:
        """Whether x depends on the data by more than `NO_SIGNAL` of its noise."""
        return self.alpha > NO_SIGNAL * self.sigma


def level_of(process: Process, t: float | Tensor) -> Level:
    """The level at time t."""
    time = torch.as_tensor(t, dtype=torch.float64, device="cpu").detach()
    return Level(float(time), float(process.alpha(time)), float(process.sigma(time)))


class Run:
    """The state of one run: x, the source of noise, how often the denoiser was evaluated, and the
    record of states.

    Args: as :func:`memokern.samplers.ode`.
    """

    def __init__(
        self,
        denoiser: Denoises,
        start: int | Tensor,
        *,
        label: Label,
        bias: Tensor | None,
        seed: int | None,
        generator: torch.Generator | None,
        dtype: torch.dtype | None,
        trajectory: bool,
        watch: Watch | None,
    ) -> None:
        if not all(hasattr(denoiser, name) for name in ("process", "space", "evaluate")):
            raise TypeError(
                "expected a memokern.Denoiser, or a network with its process, space and evaluate"
                f" (memokern.training.LearnedDenoiser), got {type(denoiser).__name__}"
            )
        if seed is not None and generator is not None:
            raise ValueError("give seed or generator, not both")
        if not isinstance(generator, torch.Generator | None):
            raise TypeError(
                f"expected generator as a torch.Generator, got {type(generator).__name__};"
                " a number goes to seed="
            )
        if seed is not None:
            hint = "; leave it out for PyTorch's own generator"
            seed = checks.integer("seed", seed, -(2**63), 2**64 - 1, hint)
        if dtype not in (None, *DTYPES):
            raise TypeError(f"expected dtype torch.float32 or torch.float64, got {dtype}")
        # A seeded generator is on the CPU, so that a seed means the same noise on every device.
        self.generator = torch.Generator().manual_seed(seed) if seed is not None else generator
        self.denoiser, self.process = denoiser, denoiser.process
        self.label, self.bias, self.nfe = label, bias, 0
        self.watch = watch
        self.step: int | None = 1
        self.phase: str | None = None
        self.x = self._start(start, dtype)
        self.record: list[Tensor] | None = [self.x] if trajectory else None

    def _start(self, start: int | Tensor, dtype: torch.dtype | None) -> Tensor:
        """The first x: the starts given, or so many draws from the prior."""
        space = self.denoiser.space
        shape = tuple(space.shape[1:])
        if isinstance(start, Tensor):
            x = start if dtype is None else start.to(dtype)
            validate.batch_shape(x, space.new_empty((1, *shape)))  # checks type, device and shape
            if not bool(torch.isfinite(x).all()):
                raise ValueError("expected finite starts, got NaN or inf")
            return x
        count = checks.integer(
            "start", start, 1, hint="; it is the number of samples, or a tensor of the starts"
        )
        kind = space.dtype if dtype is None else dtype
        return self.process.prior((count, *shape), self.generator, kind, space.device)

    def evaluate(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """The denoiser's x0 and eps at x and time t; counts the evaluation, and tells `watch`."""
        found = self.predict(x, t)
        return found.x0, found.eps

    def predict(self, x: Tensor, t: float, at: Tensor | None = None) -> Any:
        """All that the denoiser gives, as `evaluate`; x of some of the samples, at [s] int64."""
        self.nfe += 1
        denoiser, label = self.denoiser, self.label
        if at is not None:
            label = label_part(label, at)
            denoiser = denoiser.part(at) if isinstance(denoiser, Given) else denoiser
        if self.watch is None:
            return denoiser.evaluate(x, t, label, bias=self.bias)
        began = time.perf_counter()
        found = denoiser.evaluate(x, t, label, bias=self.bias, certificate=True)
        if x.device.type != "cpu":
            torch.accelerator.synchronize(x.device)
        seconds, level = time.perf_counter() - began, level_of(self.process, t)
        bounds = found.posterior.certificate
        assert bounds is not None
        self.watch(
            Evaluation(
                self.step, self.nfe, level.t, level.alpha, level.sigma, seconds, bounds, self.phase
            )
        )
        return found

    def noise(self) -> Tensor:
        """Standard normal noise of x's shape and type."""
        place = self.x.device if self.generator is None else self.generator.device
        z = torch.randn(self.x.shape, generator=self.generator, dtype=self.x.dtype, device=place)
        return z.to(self.x.device)

    def keep(self) -> None:
        """Ends a step: records x where a trajectory is wanted."""
        if self.step is not None:
            self.step += 1
        if self.record is not None:
            self.record.append(self.x)

    def samples(self, times: Tensor) -> Samples:
        """What the run returns, given the times of its states."""
        path = None if self.record is None else torch.stack(self.record)
        return Samples(self.x, path, times, self.process.sigma(times), self.nfe)

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """Records gradients only if the starts require them, because a graph over all steps is
        large."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.x.requires_grad):
            yield


def levels_of(
    process: Process, steps: int, sigma_min: float | None, denoise_last: bool
) -> list[Level]:
    """The levels of the steps, from t_noise to the end asked for.

    Raises: TypeError, ValueError for wrong steps or ends.
    """
    count = checks.integer("steps", steps, 1)
    check_stop(process, sigma_min, denoise_last)
    times = process.times(count + 1, sigma_min).tolist()
    return [level_of(process, t) for t in times + [process.t_data] * denoise_last]


def check_stop(process: Process, sigma_min: float | None, denoise_last: bool) -> None:
    """ValueError for an early stop outside the process's levels, or `denoise_last` without one."""
    if sigma_min is None:
        if denoise_last:
            raise ValueError("denoise_last goes with sigma_min: without it the end is denoised")
        return
    hint = "; leave it out to go to the data"
    level = checks.number("sigma_min", sigma_min, 0.0, strict=True, hint=hint)
    high = level_of(process, process.t_noise).sigma
    if level >= high:
        raise ValueError(
            f"expected sigma_min below {high:.6g}, where {process!r} starts, got {sigma_min}{hint}"
        )


def held(x0: Tensor, eps: Tensor, to: Level) -> Tensor:
    """x at another level if x0 and eps stay what they are: exactly alpha x0 where sigma is 0."""
    return to.alpha * x0 if to.sigma == 0 else to.alpha * x0 + to.sigma * eps
