"""Which noise level a scheduler of diffusers is at, from its attributes alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memokern.integrations.adapter import Seen
from memokern.processes import DDPM, EDM, FlowMatching, Process
from memokern.validate import one_of, wide

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")


class SchedulerNoise:
    """alpha and sigma of what a scheduler gives the model, x = alpha y + sigma z.

    Schedulers with `alphas_cumprod` give x with alpha^2 + sigma^2 = 1; their `sigmas`, where they
    have any, are sigma / alpha. Those of flow matching give x = (1 - sigma) y + sigma z, and
    EDM's x = c_in (y + sigma z).

    Attributes: path: the process. prediction: what the scheduler takes, as its config has it.

    Raises: ValueError for schedulers that are neither, and for learned variances.
    """

    def __init__(self, scheduler: Any) -> None:
        config = scheduler.config
        name = type(scheduler).__name__
        self.scheduler = scheduler
        self.flow = bool(config.get("use_flow_sigmas")) or name.startswith("FlowMatch")
        alphas = getattr(scheduler, "alphas_cumprod", None)
        self.prediction = config.get("prediction_type", "flow_prediction")
        self.edm = name.startswith("EDM")
        if not self.flow and not self.edm and alphas is None:
            raise ValueError(
                f"expected a scheduler with alphas_cumprod, of flow matching or EDM, got {name},"
                " for which a model is no prediction of eps, x0, v or the velocity"
            )
        if self.flow:
            self.prediction = "flow_prediction"
        one_of("prediction_type", self.prediction, PREDICTIONS)
        if str(config.get("variance_type", "")).startswith("learned"):
            raise ValueError(f"{name} expects a learned variance, which a closed form has not")
        self.steps = int(config.get("num_train_timesteps", 1000))
        self.path: Process
        if self.edm:
            self.path = EDM(config["sigma_min"], config["sigma_max"])
        else:
            self.path = FlowMatching(reverse=True) if self.flow else DDPM(alphas)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at timesteps [*batch] float64."""
        current = self._current(t)
        if self.flow:
            sigma = t / self.steps if current is None else current
            return 1 - sigma, sigma
        if self.edm:
            ratio = torch.exp(4 * t) if current is None else current
            alpha = (ratio.square() + self.scheduler.config.sigma_data**2).rsqrt()
            return alpha, ratio * alpha
        if current is None:
            if getattr(self.scheduler.config, "timestep_type", None) == "continuous":
                current = torch.exp(4 * t)
            else:
                return self.path.alpha(t), self.path.sigma(t)
        alpha = (1 + current.square()).rsqrt()
        return alpha, current * alpha

    def wanted(self, seen: Seen) -> Tensor:
        """What the scheduler takes for a model's output, made of x0 and eps."""
        if self.edm:
            # F in x0 = c_skip x / c_in + c_out F, where c_out has the other sign with v_prediction.
            data = self.scheduler.config.sigma_data
            out = wide(seen.sigma / data, seen.x0) * seen.x0
            out = out - wide(seen.alpha * data, out) * seen.eps
            return -out if self.prediction == "v_prediction" else out
        if self.prediction == "epsilon":
            return seen.eps
        if self.prediction == "sample":
            return seen.x0
        return seen.v if self.prediction == "v_prediction" else seen.eps - seen.x0

    def _current(self, t: Tensor) -> Tensor | None:
        """The scheduler's own sigma [*batch] at these timesteps, None where it has none."""
        scheduler = self.scheduler
        sigmas = getattr(scheduler, "sigmas", None)
        # Before the first set_timesteps the two are in another order.
        if sigmas is None or getattr(scheduler, "num_inference_steps", None) is None:
            return None
        timesteps = torch.as_tensor(scheduler.timesteps).to("cpu", torch.float64)
        asked = t.detach().to("cpu").reshape(-1)
        index = getattr(scheduler, "step_index", None)
        if index is None:
            index = getattr(scheduler, "begin_index", None)
        one = bool(asked.numel()) and bool((asked == asked[0]).all())
        # Rounded timesteps occur twice, and the step says which of the two it is.
        if one and index is not None and index < len(timesteps) and timesteps[index] == asked[0]:
            between = getattr(scheduler, "sigmas_interpol", None)
            if between is not None and not scheduler.state_in_first_order:
                sigmas = between
            return sigmas[index].to(t.device, torch.float64).expand(t.shape)
        same = asked[:, None] == timesteps
        if not bool(same.any(1).all()):
            return None
        first = same.int().argmax(1)
        if one and int(same[0].sum()) > 1:
            first = first + 1  # the second, as the scheduler's own first step takes it
        found = torch.as_tensor(sigmas).to("cpu", torch.float64)[first]
        return found.reshape(t.shape).to(t.device)
