"""Losses of denoising networks: what is drawn for a batch, and what is compared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from memokern import validate
from memokern.data.training_set import TrainingSet
from memokern.denoiser import PREDICTIONS, Denoiser
from memokern.processes import EDM, Process
from memokern.training import targets
from memokern.training.learned import LearnedDenoiser, LearnedPrediction
from memokern.util import checks
from memokern.validate import wide

# sigma, alpha [B] float64 -> the weight of each sample [B].
Weight = Callable[[Tensor, Tensor], Tensor]
# A process, a number and a generator -> times [B] float64.
DrawTimes = Callable[[Process, int, torch.Generator | None], Tensor]
# ln sigma of EDM's training levels (Karras et al., arXiv 2206.00364): mean, standard deviation.
EDM_LEVELS = (-1.2, 1.2)


def draw_times(process: Process, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Training times [count] float64 on the CPU: for EDM ln sigma ~ N(-1.2, 1.2^2), cut off at
    sigma_min and sigma_max; else even from where sigma = sigma_min to t_noise.

    Example:
        >>> import torch
        >>> from memokern.processes import VP
        >>> from memokern.training.losses import draw_times
        >>> t = draw_times(VP(), 100, torch.Generator().manual_seed(0))
        >>> bool(VP().sigma(t).min() >= 0.002 and t.max() <= 1)
        True
    """
    if isinstance(process, EDM):
        mean, std = EDM_LEVELS
        normal = torch.randn(count, generator=generator, dtype=torch.float64, device="cpu")
        return torch.exp(mean + std * normal).clamp(process.sigma_min, process.sigma_max)
    share = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")
    first = float(process.time_of_sigma(process.sigma_min))
    return first + share * (process.t_noise - first)


def edm_weight(sigma_data: float = 0.5) -> Weight:
    """EDM's weight of an x0 loss, (r^2 + sigma_data^2) / (r sigma_data)^2, r = sigma / alpha.

    Example:
        >>> import torch
        >>> from memokern.training.losses import edm_weight
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> edm_weight(1.0)(one, one).item()
        2.0
    """

    def weight(sigma: Tensor, alpha: Tensor) -> Tensor:
        square = (sigma / alpha).square()
        return (square + sigma_data**2) / (square * sigma_data**2)

    return weight


class Loss(ABC):
    r"""A loss on batches of rows. A subclass gives `at`, the loss of each sample.

    Args: times: draws the training times; by default :func:`draw_times`.

    Example:
        >>> import torch
        >>> from memokern.training import MLP, LearnedDenoiser, losses
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch...>
        >>> model = LearnedDenoiser(MLP((2,), width=8))
        >>> losses.Denoising("x0")(model, torch.zeros(4, 2)).shape
        torch.Size([])
    """

    def __init__(self, times: DrawTimes | None = None) -> None:
        self.times = draw_times if times is None else times

    @abstractmethod
    def at(
        self,
        model: LearnedDenoiser,
        y: Tensor,
        noise: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> Tensor:
        r"""The loss of each sample [B], the mean over its features, at x_t = alpha y + sigma noise.

        Args: y, noise: [B, \*shape]. t: [B] float64. label: [B] or None. reference: what
            `draw_reference` gave for this batch.
        """

    def draw_reference(self, generator: torch.Generator | None) -> Tensor | None:
        r"""Rows [M, \*shape] that a batch is compared with, where the loss has any."""
        return None

    def __call__(
        self,
        model: LearnedDenoiser,
        y: Tensor,
        generator: torch.Generator | None = None,
        label: Tensor | None = None,
    ) -> Tensor:
        r"""The mean loss [] of a batch y [B, \*shape]; times and noise are drawn on the generator's
        device, so that a seed means the same on every device."""
        place = "cpu" if generator is None else generator.device
        t = self.times(model.process, len(y), generator).to(y.device)
        noise = torch.randn(y.shape, generator=generator, dtype=y.dtype, device=place)
        reference = self.draw_reference(generator)
        return self.at(model, y, noise.to(y.device), t, label, reference).mean()


def _predicted(
    model: LearnedDenoiser, x: Tensor, t: Tensor, label: Tensor | None, prediction: str
) -> Tensor:
    found: LearnedPrediction = model.evaluate(x, t, label)
    if prediction != "velocity":
        value: Tensor = getattr(found, prediction)
        return value
    return found.velocity(model.process.d_alpha(t), model.process.d_sigma(t))


def _weighted(gap: Tensor, model: LearnedDenoiser, t: Tensor, weight: Weight | None) -> Tensor:
    """The mean over the features [B], weighed."""
    value = gap.square().flatten(1).mean(1)
    if weight is None:
        return value
    factor = weight(model.process.sigma(t), model.process.alpha(t))
    return factor.to(value.dtype) * value


class Denoising(Loss):
    r"""weight \|prediction - target\|^2, the mean over features.

    The target is the sample's own, or, with a reference, the posterior mean over `size` rows drawn
    from it and the sample's own row (:func:`.targets.stable`), which has the same minimiser and
    less variance.

    Args:
        prediction: in which x0, eps, v, score or velocity are compared; whatever the network gives
            is converted.
        weight: of a sample, a function of sigma and alpha; see :func:`edm_weight`.
        reference: rows; size: how many are drawn for each batch. times: as :class:`Loss`.

    Raises: ValueError for an unknown prediction.

    Example:
        >>> from memokern import TrainingSet
        >>> from memokern.training import losses
        >>> loss = losses.Denoising("x0", losses.edm_weight(0.5), reference=TrainingSet.digits())
        >>> loss.draw_reference(None).shape
        torch.Size([256, 8, 8])
    """

    def __init__(
        self,
        prediction: str = "eps",
        weight: Weight | None = None,
        *,
        reference: TrainingSet | None = None,
        size: int = 256,
        times: DrawTimes | None = None,
    ) -> None:
        super().__init__(times)
        self.prediction = validate.one_of("prediction", prediction, PREDICTIONS)
        self.weight, self.reference = weight, reference
        self.size = checks.integer("size", size, 1)

    def draw_reference(self, generator: torch.Generator | None) -> Tensor | None:
        if self.reference is None:
            return None
        drawn = torch.randint(0, self.reference.n, (self.size,), generator=generator, device="cpu")
        return self.reference.gather(drawn.to(self.reference.device))

    def at(
        self,
        model: LearnedDenoiser,
        y: Tensor,
        noise: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> Tensor:
        process, x = model.process, targets.noised(y, noise, t, model.process)
        if reference is None:
            mean, left = y, noise
        else:
            sigma, alpha = process.sigma(t), process.alpha(t)
            mean = targets.stable(x, reference.to(x), sigma, alpha, own=y)
            # x = alpha mean + sigma left, without the rounding of x divided by sigma.
            left = noise + wide(alpha / sigma, x) * (y - mean)
        target = targets.denoising(mean, left, t, process, self.prediction)
        gap = _predicted(model, x, t, label, self.prediction) - target
        return _weighted(gap, model, t, self.weight)


class ScoreMatching(Loss):
    r"""The paper's loss with its Tikhonov term: \|sigma s + eps\|^2 + c \|s\|^2, means over
    features.

    Its minimiser at each time is the score of :class:`memokern.regularizers.Tikhonov`,
    (alpha mean - x) / (sigma^2 + c).

    Args:
        c: >= 0. normalize: divides a sample's loss by 1 + c / sigma^2, which leaves the minimiser
            at each time what it is. Without it the smallest levels, where the second term is
            c / sigma^2 times the first, take over the gradient of what the times share.
        times: as :class:`Loss`.

    Raises: TypeError, ValueError for c out of range.

    Source: Baptista et al., arXiv 2501.15785, eq. 5.7.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from memokern import processes
        >>> from memokern.training import LearnedDenoiser, losses
        >>> class Zero(nn.Module):  # a score of 0: the loss is |eps|^2 / (1 + c / sigma^2)
        ...     shape = (1,)
        ...     def forward(self, x, c):
        ...         return 0 * x
        >>> model = LearnedDenoiser(Zero(), processes.EDM(), output="eps")
        >>> one = torch.ones(1, 1)
        >>> losses.ScoreMatching(3.0).at(model, one, one, torch.ones(1).double()).item()
        0.25
    """

    def __init__(
        self, c: float = 0.0, *, normalize: bool = True, times: DrawTimes | None = None
    ) -> None:
        super().__init__(times)
        self.c, self.normalize = checks.number("c", c, 0.0), bool(normalize)

    def at(
        self,
        model: LearnedDenoiser,
        y: Tensor,
        noise: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> Tensor:
        x = targets.noised(y, noise, t, model.process)
        eps = model.evaluate(x, t, label).eps  # -sigma s
        fit = (noise - eps).square().flatten(1).mean(1)
        ratio = (self.c / model.process.sigma(t).square()).to(fit.dtype)
        value = fit + ratio * eps.square().flatten(1).mean(1)
        return value / (1 + ratio) if self.normalize else value


class Regression(Loss):
    r"""weight \|prediction - teacher's\|^2: a network learns a closed-form score, regularised or
    not, whose prediction at x_t is the target.

    Args:
        teacher: of the same process as the network.
        prediction, weight, times: as :class:`Denoising`. "eps" is sigma times the score.

    Raises: TypeError for a teacher that is no Denoiser; ValueError for an unknown prediction, and,
        when it is called, for a network with another process.

    Example:
        >>> from memokern import Denoiser, TrainingSet, regularizers
        >>> from memokern.training import losses
        >>> teacher = Denoiser(TrainingSet.digits(), regularizer=regularizers.Tikhonov(0.1))
        >>> losses.Regression(teacher).prediction
        'eps'
    """

    def __init__(
        self,
        teacher: Denoiser,
        prediction: str = "eps",
        weight: Weight | None = None,
        *,
        times: DrawTimes | None = None,
    ) -> None:
        super().__init__(times)
        if not isinstance(teacher, Denoiser):
            raise TypeError(f"expected a memokern.Denoiser, got {type(teacher).__name__}")
        self.teacher, self.weight = teacher, weight
        self.prediction = validate.one_of("prediction", prediction, PREDICTIONS)

    def at(
        self,
        model: LearnedDenoiser,
        y: Tensor,
        noise: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> Tensor:
        process = model.process
        if repr(process) != repr(self.teacher.process):
            raise ValueError(
                f"the teacher's process is {self.teacher.process!r}, the network's {process!r}"
            )
        x = targets.noised(y, noise, t, process)
        with torch.no_grad():
            found = self.teacher.evaluate(x, t, label)
            target = (
                found.velocity(process.d_alpha(t), process.d_sigma(t))
                if self.prediction == "velocity"
                else getattr(found, self.prediction)
            )
        gap = _predicted(model, x, t, label, self.prediction) - target
        return _weighted(gap, model, t, self.weight)
