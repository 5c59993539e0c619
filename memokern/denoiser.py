"""The closed-form denoiser as a module: the network that perfect training would give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memokern.data import TrainingSet
from memokern.functional import batch_shape, per_query
from memokern.processes import EDM, Process
from memokern.regularizers import Prediction, Regularizer, evaluate

PREDICTIONS = ("x0", "eps", "v", "score", "velocity")


class Denoiser(torch.nn.Module):
    r"""x_t, t -> x0, eps, v, score or velocity of the (regularised) closed-form score.

    Args:
        data: TrainingSet, or rows [N, \*shape].
        process: a :class:`memokern.processes.Process`; default EDM, whose time is sigma, so that
            the module stands where an EDM or k-diffusion sampler expects its network.
        regularizer: a :class:`memokern.regularizers.Regularizer`, or None: it memorises.
        prediction: "x0", "eps", "v", "score" or "velocity" (dx/dt of the probability flow).

    The rows, labels and log weights are buffers: `.to(device)` moves them, `state_dict` holds them.

    Example:
        >>> import torch
        >>> from memokern import Denoiser, TrainingSet
        >>> net = Denoiser(TrainingSet.digits(), prediction="eps")
        >>> net(torch.randn(2, 8, 8), torch.tensor(1.0)).shape
        torch.Size([2, 8, 8])
    """

    rows: Tensor
    labels: Tensor | None
    log_weights: Tensor | None

    def __init__(
        self,
        data: TrainingSet | Tensor,
        process: Process | None = None,
        regularizer: Regularizer | None = None,
        prediction: str = "x0",
    ) -> None:
        super().__init__()
        data = data if isinstance(data, TrainingSet) else TrainingSet(data)
        if process is not None and not isinstance(process, Process):
            raise TypeError(
                f"expected process as a memokern.processes.Process, got {type(process).__name__};"
                " processes.get('vp') makes one by name"
            )
        if regularizer is not None and not isinstance(regularizer, Regularizer):
            raise TypeError(
                f"expected a memokern.regularizers.Regularizer, got {type(regularizer).__name__};"
                " regularizers.parse('tikhonov:c=0.01') makes one from text"
            )
        if prediction not in PREDICTIONS:
            raise ValueError(
                f"expected prediction one of {', '.join(PREDICTIONS)}, got {prediction!r}"
            )
        self.process = EDM() if process is None else process
        self.regularizer = regularizer
        self.prediction = prediction
        self.register_buffer("rows", data.rows)
        self.register_buffer("labels", data.labels)
        self.register_buffer("log_weights", data.log_weights)
        self._like = {"scale": data.scale, "shift": data.shift, "name": data.name}
        self._shape = data.shape
        self._data, self._made_from = data, self._state()

    def _state(self) -> tuple[Any, ...]:
        buffers = (self.rows, self.labels, self.log_weights)
        return tuple(None if b is None else (b.data_ptr(), b._version, b.dtype) for b in buffers)

    @property
    def data(self) -> TrainingSet:
        """The training set; made anew, with its caches, when the buffers moved or were loaded."""
        if self._state() != self._made_from:
            weights = None if self.log_weights is None else self.log_weights.double()
            self._data = TrainingSet(
                self.rows.reshape(len(self.rows), *self._shape),
                labels=self.labels,
                log_weights=weights,
                **self._like,
            )
            self._made_from = self._state()
        return self._data

    def get_extra_state(self) -> dict[str, Any]:
        return {"scale": self._like["scale"], "shift": self._like["shift"], "shape": self._shape}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if tuple(state["shape"]) != self._shape:
            raise ValueError(
                f"the state is of rows {tuple(state['shape'])}, this denoiser has {self._shape}:"
                " build it on data of the saved shape first"
            )
        self._like.update(scale=state["scale"], shift=state["shift"])
        self._made_from = ()

    def evaluate(
        self, x: Tensor, t: float | Tensor, bias: Tensor | None = None, label: Any = None
    ) -> Prediction:
        r"""Everything about x [\*batch, \*shape] at the process' time t (a number, or [\*batch]).

        bias [N] is added to the logits; label (an int) restricts the rows to those with it.
        """
        time = per_query("t", t, batch_shape(x, self.data), x.device)
        sigma, alpha = self.process.sigma(time), self.process.alpha(time)
        return self.at_level(x, sigma, alpha, bias=bias, label=label)

    def at_level(
        self,
        x: Tensor,
        sigma: float | Tensor,
        alpha: float | Tensor = 1.0,
        bias: Tensor | None = None,
        label: int | None = None,
    ) -> Prediction:
        """As `evaluate`, for a noise level and signal scale instead of a time."""
        if label is not None:
            mask = self._mask(label)
            bias = mask if bias is None else bias + mask
        return evaluate(x, self.data, sigma, alpha, regularizer=self.regularizer, bias=bias)

    def _mask(self, label: int) -> Tensor:
        if self.labels is None:
            raise ValueError("label was given, but the training set has no labels")
        mine = self.labels == label
        if not bool(mine.any()):
            known = ", ".join(map(str, self.labels.unique().tolist()[:20]))
            raise ValueError(f"no row has label {label}; there are {known}")
        return torch.where(mine, 0.0, -torch.inf).to(torch.float64)

    def forward(
        self, x: Tensor, t: float | Tensor, bias: Tensor | None = None, label: Any = None
    ) -> Tensor:
        r"""The prediction [\*batch, \*shape] in x's type, differentiable in x and t.

        label: None, an int for all, or [\*batch] integers; one sweep per different label.
        """
        if not isinstance(label, Tensor) or label.dim() == 0:
            single = int(label) if isinstance(label, Tensor) else label
            return self._predict(x, t, bias, single)
        batch = batch_shape(x, self.data)
        if label.shape != batch:
            raise ValueError(f"expected label {tuple(batch)}, one per query, got {tuple(label.shape)}")
        time = per_query("t", t, batch, x.device)
        out = torch.empty_like(x)
        for value in label.unique().tolist():
            at = label == value
            out = out.index_put((at,), self._predict(x[at], time[at], bias, value))
        return out

    def _predict(
        self, x: Tensor, t: float | Tensor, bias: Tensor | None, label: int | None
    ) -> Tensor:
        found = self.evaluate(x, t, bias, label)
        if self.prediction == "velocity":
            time = per_query("t", t, found.sigma.shape, x.device)
            return found.velocity(self.process.d_alpha(time), self.process.d_sigma(time))
        value = getattr(found, self.prediction)
        assert isinstance(value, Tensor)
        return value

    def extra_repr(self) -> str:
        return (
            f"{self.data}, process={self.process}, regularizer={self.regularizer},"
            f" prediction={self.prediction!r}"
        )
