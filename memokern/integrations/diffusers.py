"""For huggingface/diffusers: a model for its pipelines, with any of its schedulers."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memokern import processes, regularizers
from memokern.conditional import Label
from memokern.data.training_set import TrainingSet
from memokern.denoiser import Denoiser
from memokern.integrations.adapter import Adapter
from memokern.integrations.noise_of_schedulers import SchedulerNoise
from memokern.processes import Process
from memokern.regularizers import Regularizer
from memokern.util.writing import atomic
from memokern.validate import PerQuery

try:
    import diffusers
    from diffusers import ConfigMixin, ModelMixin, SchedulerMixin
    from diffusers.utils import BaseOutput
except ImportError as error:
    raise ImportError(
        "memokern.integrations.diffusers needs diffusers, whose ModelMixin its model is:"
        ' pip install "memokern[integrations]"'
    ) from error

CONFIG, ROWS = "config.json", "diffusion_pytorch_model.safetensors"


def _same(process: Process, other: Process) -> bool:
    """Whether two processes have the same levels."""
    if type(process) is not type(other) or process.t_noise != other.t_noise:
        return False
    t = torch.linspace(other.t_data, other.t_noise, 1 + 2 * 1000, dtype=torch.float64, device="cpu")
    return torch.equal(process.alpha(t), other.alpha(t)) and torch.equal(
        process.sigma(t), other.sigma(t)
    )


@dataclass
class DiffusersOutput(BaseOutput):
    r"""What the model returns. sample: [B, \*shape], what the scheduler calls model_output."""

    sample: Tensor


class DiffusersModel(ModelMixin, ConfigMixin):
    r"""The `unet` or `transformer` of a pipeline, and the model of loops over scheduler.timesteps.

    It gives what the scheduler's config asks for: epsilon, sample (x0), v_prediction, the velocity
    z - y of flow matching, or for EDM's schedulers what a network gives before c_skip and c_out.
    The noise level is the scheduler's own at its current step, also where it rounds timesteps or
    takes them from another grid; for timesteps that the scheduler does not have now, as in
    training, it is that of its training schedule. A pipeline that makes a scheduler of its own
    (DDIMPipeline does) is known by its config alone, which says the same.

    Args:
        source: a TrainingSet, rows [N, C, H, W], or any denoiser (:class:`Adapter` says how).
        scheduler: DDPM, DDIM, PNDM, Euler, Heun, DPM-Solver, UniPC, flow-match Euler and Heun,
            EDM's two, and others with `alphas_cumprod`. `model.scheduler = other` changes it.
        regularizer: with rows; in the units of the scheduler's process.
        bandwidth: of the conditions given as `encoder_hidden_states`.

    forward(sample, timestep, class_labels=, encoder_hidden_states=, return_dict=): sample
    [B, \*shape] as `scheduler.scale_model_input` leaves it, timestep a number or [B]. An object
    with `.sample`, or with return_dict=False a tuple, in the sample's type. class_labels: labels
    [B]; -1 or the number of classes is the null class. encoder_hidden_states: conditions [B, K] or
    [B, 1, K]. `hidden_states` is another name of sample. Other arguments of diffusers' models must
    be None.

    `save_pretrained` writes config.json and the rows as safetensors, which `from_pretrained` reads
    back; so do pipelines with this model. Nothing is pickled. A pipeline is loaded after
    `import memokern.integrations.diffusers`.

    Raises: TypeError, ValueError as :class:`memokern.Denoiser`; ValueError for schedulers that take
        no such predictions.

    Example:
        >>> import torch
        >>> from diffusers import DDIMScheduler
        >>> from memokern import TrainingSet
        >>> from memokern.integrations import DiffusersModel
        >>> rows = TrainingSet.digits().rows.reshape(-1, 1, 8, 8)
        >>> scheduler = DDIMScheduler()
        >>> model = DiffusersModel(rows, scheduler)
        >>> model(torch.zeros(2, 1, 8, 8), 500).sample.shape
        torch.Size([2, 1, 8, 8])
    """

    config_name = CONFIG

    def __init__(
        self,
        source: Any,
        scheduler: SchedulerMixin,
        regularizer: Regularizer | None = None,
        bandwidth: PerQuery | None = None,
    ) -> None:
        super().__init__()
        noise = SchedulerNoise(scheduler)
        self.adapter = Adapter(source, noise.path, regularizer, bandwidth)
        self.noise = noise
        shape = self.adapter.shape
        size = shape[1:]
        self.register_to_config(
            in_channels=shape[0] if shape else 1,
            out_channels=shape[0] if shape else 1,
            sample_size=size[0] if len(size) == 2 and size[0] == size[1] else list(size),
            num_class_embeds=self.adapter.classes or None,
            prediction_type=noise.prediction,
            scheduler=json.loads(scheduler.to_json_string()),
        )

    @property
    def scheduler(self) -> SchedulerMixin:
        """Whose noise levels the model is asked at."""
        return self.noise.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: SchedulerMixin) -> None:
        self.noise = SchedulerNoise(scheduler)
        self.register_to_config(
            prediction_type=self.noise.prediction,
            scheduler=json.loads(scheduler.to_json_string()),
        )

    def forward(
        self,
        sample: Tensor | None = None,
        timestep: PerQuery | None = None,
        class_labels: Label = None,
        *,
        hidden_states: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> DiffusersOutput | tuple[Tensor]:
        unknown = sorted(name for name, value in others.items() if value is not None)
        if unknown:
            raise TypeError(f"rows know nothing of {', '.join(unknown)}: leave out, or give None")
        x = hidden_states if sample is None else sample
        if x is None or timestep is None or (sample is not None and hidden_states is not None):
            raise TypeError("expected a sample (or hidden_states) and a timestep")
        condition = encoder_hidden_states
        if condition is not None and condition.dim() == 3 and condition.shape[1] == 1:
            condition = condition[:, 0]
        time = self.adapter.numbers("timestep", timestep, x)
        alpha, sigma = self.noise.levels(time)
        seen = self.adapter.at(x, alpha, sigma, class_labels, condition)
        out = self.noise.wanted(seen).to(x.dtype)
        return DiffusersOutput(sample=out) if return_dict else (out,)

    # --- files --------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        **_: Any,
    ) -> None:
        """Write config.json and the rows, as safetensors, to a folder, which is made.

        Raises ValueError where a file could not say what the model is: for a denoiser that is no
        :class:`memokern.Denoiser` (save a trained network by its own `save`), for processes and
        regularisers that are code or have functions as parameters; and for anything but
        safetensors.
        """
        if not safe_serialization or variant is not None:
            raise ValueError("rows are written as safetensors, in their own type: no variant")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"_class_name": type(self).__name__, **self.config, **self._about()}
        self.adapter.denoiser.data.save(folder / ROWS)
        with atomic(folder / CONFIG) as temporary:
            temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    def _about(self) -> dict[str, Any]:
        """What it takes, beside rows and scheduler, to make this model again."""
        denoiser = self.adapter.denoiser
        if not isinstance(denoiser, Denoiser):
            raise ValueError(f"cannot save a {type(denoiser).__name__}: save its own parts")
        name = None
        if not _same(denoiser.process, self.noise.path):
            same = [n for n in processes.NAMES if repr(processes.get(n)) == repr(denoiser.process)]
            if not same:
                raise ValueError(
                    f"cannot save {denoiser.process!r}: give rows, or a process of processes.get"
                )
            name = same[0]
        bandwidth = self.adapter.bandwidth
        if bandwidth is not None:
            bandwidth = float(bandwidth)
        return {
            "process": name,
            "regularizer": regularizers.describe(denoiser.regularizer),
            "bandwidth": bandwidth,
            "method": denoiser.method,
        }

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        torch_dtype: torch.dtype | None = None,
        **_: Any,
    ) -> DiffusersModel:
        """Read a folder that `save_pretrained` wrote. torch_dtype: as `.to(torch_dtype)`.

        Raises ValueError for other folders; FileNotFoundError where a file is missing.

        Example:
            >>> import torch
            >>> from diffusers import DDPMScheduler
            >>> from memokern.integrations import DiffusersModel
            >>> DiffusersModel(torch.zeros(3, 1, 4, 4), DDPMScheduler()).save_pretrained("model")
            >>> DiffusersModel.from_pretrained("model").config.sample_size
            4
        """
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"no {CONFIG} in the folder {str(folder)!r}")
        about = json.loads((folder / CONFIG).read_text())
        if about.get("_class_name") != cls.__name__:
            raise ValueError(f"{str(folder)!r} was not written by {cls.__name__}.save_pretrained")
        name = about["scheduler"]["_class_name"]
        known: Any = getattr(diffusers, name, None)
        if SchedulerMixin not in getattr(known, "__mro__", ()):
            raise ValueError(f"no scheduler {name!r} in diffusers")
        source: Any = TrainingSet.load(folder / ROWS)
        regularizer = regularizers.parse(about["regularizer"])
        process = None if about["process"] is None else processes.get(about["process"])
        scheduler = known.from_config(about["scheduler"])
        path = SchedulerNoise(scheduler).path if process is None else process
        denoiser = Denoiser(source, path, regularizer, method=about["method"])
        model = cls(denoiser, scheduler, bandwidth=about["bandwidth"])
        return model.to(torch_dtype) if isinstance(torch_dtype, torch.dtype) else model
