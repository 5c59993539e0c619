"""A network that was trained, in the place of the closed-form :class:`memokern.Denoiser`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memokern import processes, validate
from memokern.conditional import Label, label_numbers
from memokern.data import files
from memokern.denoiser import PREDICTIONS
from memokern.edm_network import EDMNetwork
from memokern.processes import EDM, Process
from memokern.training.networks import NETWORKS
from memokern.util import checks
from memokern.validate import PerQuery, wide

# What a network may give: a prediction as it is, or EDM's preconditioned x0.
OUTPUTS = (*PREDICTIONS, "edm")
FORMAT = "memokern.network"


@dataclass(frozen=True)
class LearnedPrediction:
    r"""What :meth:`LearnedDenoiser.evaluate` returns; x = alpha x0 + sigma eps.

    Attributes:
        x, x0, eps: [\*batch, \*shape]. sigma, alpha: [\*batch] float64.
    """

    x: Tensor
    sigma: Tensor
    alpha: Tensor
    x0: Tensor
    eps: Tensor

    @property
    def score(self) -> Tensor:
        """-eps / sigma."""
        return -self.eps / wide(self.sigma, self.x)

    @property
    def v(self) -> Tensor:
        """alpha eps - sigma x0."""
        return wide(self.alpha, self.x) * self.eps - wide(self.sigma, self.x) * self.x0

    def velocity(self, d_alpha: PerQuery = 1.0, d_sigma: PerQuery = -1.0) -> Tensor:
        """alpha' x0 + sigma' eps, dx/dt of the probability flow."""
        da = validate.per_query("d_alpha", d_alpha, self.sigma.shape, self.x.device)
        ds = validate.per_query("d_sigma", d_sigma, self.sigma.shape, self.x.device)
        return wide(da, self.x) * self.x0 + wide(ds, self.x) * self.eps


class LearnedDenoiser(EDMNetwork, nn.Module):
    r"""A network and what its output means. memokern's samplers, likelihoods and metrics take it
    where they take a :class:`memokern.Denoiser`; so do samplers that call net(x, sigma).

    Args:
        network: a module that takes x [B, \*shape], a number per query [B] and, where there are
            labels, label [B], and gives [B, \*shape]. The number is ln(sigma / alpha) / 4 for EDM
            and its output, else (t - t_data) / (t_noise - t_data). x comes divided by
            sqrt(alpha^2 sigma_data^2 + sigma^2).
        process: gives t its meaning; by default EDM.
        shape: of one row; by default the network's own attribute `shape`.
        output: what the network gives: a prediction as :class:`memokern.Denoiser` has them, or
            "edm": x0 = (c_skip x + c_out network) in x / alpha (arXiv 2206.00364, table 1).
        prediction: what `forward` returns.
        sigma_data: the standard deviation of the data, for the scales above.

    Raises: TypeError, ValueError for wrong types or names; for output "eps" or "score" with a
        process whose alpha is 0 at its start, where they say nothing about x0.

    Numerics: the network runs in its parameters' type, the rest in x's.

    Example:
        >>> import torch
        >>> from memokern import samplers
        >>> from memokern.training import MLP, LearnedDenoiser
        >>> denoiser = LearnedDenoiser(MLP((2,), width=8))
        >>> samplers.ode(denoiser, 3, steps=4, seed=0).x.shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        network: nn.Module,
        process: Process | None = None,
        shape: tuple[int, ...] | None = None,
        *,
        output: str = "edm",
        prediction: str = "x0",
        sigma_data: float = 0.5,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"expected network as an nn.Module, got {type(network).__name__}")
        shape = getattr(network, "shape", None) if shape is None else shape
        if shape is None:
            raise ValueError("the network has no attribute `shape`: give shape=, that of one row")
        process = EDM() if process is None else process
        if not isinstance(process, Process):
            raise TypeError(f"expected process as a Process, got {type(process).__name__}")
        self.network, self.process = network, process
        self.shape = tuple(checks.integer("shape", n, 1) for n in shape)
        self.output = validate.one_of("output", output, OUTPUTS)
        self.prediction = validate.one_of("prediction", prediction, PREDICTIONS)
        self.sigma_data = checks.number("sigma_data", sigma_data, 0.0, strict=True)
        start = torch.tensor(process.t_noise, dtype=torch.float64, device="cpu")
        if float(process.alpha(start)) == 0 and output in ("eps", "score", "edm"):
            raise ValueError(
                f"alpha is 0 where {process!r} starts, and {output!r} gives no x0 there: let the"
                " network give x0, v or velocity"
            )

    # --- what samplers ask of a denoiser ------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """The type of the network's parameters."""
        return next((p.dtype for p in self.network.parameters()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next((p.device for p in self.network.parameters()), torch.device("cpu"))

    @property
    def space(self) -> Tensor:
        """An empty tensor [0, *shape], of the type and on the device that queries have."""
        kind = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.empty((0, *self.shape), dtype=kind, device=self.device)

    @property
    def label_dim(self) -> int:
        """The number of labels that the network knows, from its attribute `classes`."""
        return int(getattr(self.network, "classes", 0))

    def evaluate(
        self,
        x: Tensor,
        t: float | Tensor,
        label: Label = None,
        *,
        bias: None = None,
        certificate: bool = False,
    ) -> LearnedPrediction:
        r"""x0, eps and what follows from them at x [\*batch, \*shape] and time t.

        Raises: TypeError, ValueError for wrong shapes and labels; ValueError for a bias or a
            certificate, which belong to rows.
        """
        if bias is not None or certificate:
            raise ValueError("a network has no rows: no bias and no certificate (`watch`)")
        x = validate.computable(x)
        batch = validate.batch_shape(x, self.space.new_empty((1, *self.shape)))
        time = validate.per_query("t", t, batch, x.device)
        flat, times = x.reshape(-1, *self.shape), time.reshape(-1)
        given: list[Tensor] = []
        if label is not None:
            numbers = label_numbers(label, batch, self.device, lambda: self.label_dim)
            given = [numbers.expand(batch).reshape(-1)]
        sigma, alpha = self.process.sigma(times), self.process.alpha(times)
        scale = (alpha.square() * self.sigma_data**2 + sigma.square()).rsqrt()
        out = self.network(
            (wide(scale, flat) * flat).to(self.dtype), self._number(times).to(self.dtype), *given
        )
        x0, eps = self._meaning(out.to(flat.dtype), flat, times, sigma, alpha)
        return LearnedPrediction(
            x, sigma.reshape(batch), alpha.reshape(batch), x0.reshape(x.shape), eps.reshape(x.shape)
        )

    def _number(self, t: Tensor) -> Tensor:
        """What the network is told of the time, [B] float64."""
        process = self.process
        if self.output == "edm" or isinstance(process, EDM):
            return process.ratio(t).clamp(min=1e-30).log() / 4
        return (t - process.t_data) / (process.t_noise - process.t_data)

    def _meaning(
        self, out: Tensor, x: Tensor, t: Tensor, sigma: Tensor, alpha: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x0 and eps [B, *shape] from what the network gave."""
        s, a = wide(sigma, x), wide(alpha, x)
        kind = self.output
        if kind in ("eps", "score"):
            eps = out if kind == "eps" else -s * out
            return (x - s * eps) / a, eps
        if kind == "v":
            norm = a.square() + s.square()
            return (a * x - s * out) / norm, (s * x + a * out) / norm
        if kind == "velocity":
            da, ds = wide(self.process.d_alpha(t), x), wide(self.process.d_sigma(t), x)
            det = a * ds - s * da
            return (ds * x - s * out) / det, (a * out - da * x) / det
        if kind == "edm":
            ratio = wide(sigma / alpha, x)
            total = ratio.square() + self.sigma_data**2
            skip, gain = self.sigma_data**2 / total, ratio * self.sigma_data / total.sqrt()
            out = skip * (x / a) + gain * out
        # At sigma = 0 x says nothing about the noise, whose mean is 0.
        zero = s == 0
        return out, torch.where(zero, 0.0, (x - a * out) / torch.where(zero, 1.0, s))

    def forward(self, x: Tensor, t: float | Tensor, label: Label = None) -> Tensor:
        r"""The chosen prediction [\*batch, \*shape] in x's type."""
        found = self.evaluate(x, t, label)
        if self.prediction != "velocity":
            out: Tensor = getattr(found, self.prediction)
            return out.to(x.dtype)
        time = validate.per_query("t", t, found.sigma.shape, x.device)
        slopes = self.process.d_alpha(time), self.process.d_sigma(time)
        return found.velocity(*slopes).to(x.dtype)

    # --- files --------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the network's weights and what it takes to make it again to a `.safetensors` file,
        whole or not at all. ValueError for another suffix."""
        kind = next((k for k, c in NETWORKS.items() if type(self.network) is c), "")
        name = next(
            (n for n in processes.NAMES if type(processes.get(n)) is type(self.process)), ""
        )
        about = {
            "network": kind,
            "config": getattr(self.network, "config", {}) if kind else {},
            "process": name, "process_repr": repr(self.process), "shape": list(self.shape),
            "output": self.output, "prediction": self.prediction, "sigma_data": self.sigma_data,
        }  # fmt: skip
        tensors = {k: v.detach().contiguous() for k, v in self.network.state_dict().items()}
        files.write_safetensors(path, tensors, {"format": FORMAT, "about": json.dumps(about)})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        network: nn.Module | None = None,
        process: Process | None = None,
    ) -> LearnedDenoiser:
        """Read a file that `save` wrote.

        Args: network: where it is none of memokern's own, a module to load the weights into.
            process: where its constants are not the defaults, or it is a class of yours.

        Raises: ValueError for other files, and where network or process must be given.

        Example:
            >>> from memokern.training import MLP, LearnedDenoiser
            >>> LearnedDenoiser(MLP((2,), width=8)).save("network.safetensors")
            >>> LearnedDenoiser.load("network.safetensors").network.width
            8
        """
        metadata = files.read_metadata(path)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{str(path)!r} was not written by LearnedDenoiser.save")
        about = json.loads(metadata["about"])
        if network is None:
            if about["network"] not in NETWORKS:
                raise ValueError(
                    f"the network in {str(path)!r} is none of memokern's: give network="
                )
            network = NETWORKS[about["network"]](**about["config"])
        if process is None:
            known = about["process"] in processes.NAMES
            process = processes.get(about["process"]) if known else None
            if process is None or repr(process) != about["process_repr"]:
                raise ValueError(
                    f"the process in {str(path)!r} is {about['process_repr']}: give process="
                )
        network.load_state_dict({k: files.read_tensor(path, k) for k in files.keys(path)})
        return cls(
            network, process, tuple(about["shape"]), output=about["output"],
            prediction=about["prediction"], sigma_data=about["sigma_data"],
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"process={self.process!r}, output={self.output!r}, prediction={self.prediction!r}"
