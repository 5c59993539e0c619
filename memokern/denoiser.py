"""The closed-form denoiser as a network: an nn.Module on a training set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from memokern import functional, regularizers, validate
from memokern.data.training_set import TrainingSet
from memokern.processes import EDM, Process
from memokern.regularizers import Prediction, Regularizer
from memokern.results import Certificate
from memokern.util.held import Held

PREDICTIONS = ("x0", "eps", "v", "score", "velocity")
BOUNDS = [field.name for field in fields(Certificate)]


class Denoiser(nn.Module):
    r"""The minimiser of the denoising loss on a training set, regularised, at a process's times.

    Buffers: `rows` [N, \*shape] (the training set's own memory), `affine` (scale, shift), and
    `labels` and `log_weights` where the set has them. `state_dict` has these, but not the process
    and the regulariser, which are code; loading needs a set of the same shape and row type. `.to()`
    moves the buffers; to another floating-point type it converts floating-point rows and nothing
    else. `.to("meta")` keeps shapes and scale but no values, which loading a state brings back. The
    data's index is used, for a label the part of it that belongs to the label's rows; rows that
    were moved, converted or loaded have no index until `data.build_index()`.

    Args:
        data: a TrainingSet, or rows [N, \*shape].
        process: gives t its meaning; by default EDM, where t = sigma.
        regularizer: from memokern.regularizers; None for the score that memorises.
        prediction: what `forward` returns. "x0" is the denoised x; "eps" the noise, -sigma score;
            "v" alpha eps - sigma x0; "score" the score; "velocity" dx/dt of the probability flow.
            At sigma = 0 only x0 is finite.
        method: as :func:`memokern.posterior`.

    Raises:
        TypeError, ValueError: wrong types, an unknown prediction or method.

    Numerics: as :func:`memokern.posterior`. Gradients: through x, t and bias.

    Cost: one sweep over the rows per call; with labels over the rows that have them, of which a
    copy is kept.

    Source: Baptista et al., arXiv 2501.15785; as a network for the samplers of Karras et al.,
    arXiv 2206.00364, which call net(x, sigma) and read sigma_min, sigma_max and round_sigma.

    Example:
        >>> import torch
        >>> from memokern import Denoiser
        >>> network = Denoiser(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
        >>> network(torch.tensor([[0.9, 0.3]]), 0.1).tolist()
        [[1.0, 0.0]]
    """

    rows: Tensor
    affine: Tensor
    labels: Tensor | None
    log_weights: Tensor | None

    def __init__(
        self,
        data: TrainingSet | Tensor,
        process: Process | None = None,
        regularizer: Regularizer | None = None,
        prediction: str = "x0",
        *,
        method: str = "auto",
    ) -> None:
        super().__init__()
        process = EDM() if process is None else process
        if not isinstance(process, Process):
            raise TypeError(
                f"expected process as a memokern.processes.Process, got {type(process).__name__};"
                " processes.get('edm') makes one from its name"
            )
        if regularizer is not None and not isinstance(regularizer, Regularizer):
            raise TypeError(
                "expected regularizer as a memokern.regularizers.Regularizer, got"
                f" {type(regularizer).__name__}; regularizers.parse('tikhonov:c=0.01') makes one"
            )
        if prediction not in PREDICTIONS:
            known = ", ".join(PREDICTIONS)
            raise ValueError(f"expected prediction one of {known}, got {prediction!r}")
        if method not in functional.METHODS:
            known = ", ".join(functional.METHODS)
            raise ValueError(f"expected method one of {known}, got {method!r}")
        if not isinstance(data, TrainingSet):
            data = TrainingSet(data)
        self.process, self.regularizer = process, regularizer
        self.prediction, self.method = prediction, method
        self._name = data.name
        self.register_buffer("rows", data.rows.reshape((data.n, *data.shape)))
        self.register_buffer("affine", self._affine(data).to(data.device))
        self.register_buffer("labels", data.labels)
        self.register_buffer("log_weights", data.log_weights)
        self._data = data
        self._held = Held(self._buffers)
        self._spare: tuple[Held, TrainingSet, dict[int, Any]] | None = None
        # For labels that were asked for: which rows have them, and these rows.
        self._classes: dict[int, tuple[Tensor, TrainingSet]] = {}

    # --- the data ---------------------------------------------------------------------------

    @property
    def data(self) -> TrainingSet:
        """The training set, on the buffers' device. It is made anew where a buffer is another one
        (assigned, of torch.func.functional_call, of a replica) or was written to in place."""
        changed = self._held.changed(self._buffers)
        if changed == {"rows"} and self._held.tensors["rows"] is self.rows:
            # Written to, which the training set sees itself.
            self._held, self._classes = Held(self._buffers), {}
        elif changed:
            # Where the buffers come back, as after functional_call, so does what is known of them.
            spare, self._spare = self._spare, (self._held, self._data, self._classes)
            if spare is not None and not spare[0].changed(self._buffers):
                self._held, self._data, self._classes = spare
            else:
                known = [self._data.scale, self._data.shift]
                self._renew(*(self.affine.tolist() if "affine" in changed else known))
        return self._data

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._held, self._spare = Held(self._buffers), None  # copies count from 0

    @staticmethod
    def _affine(data: TrainingSet) -> Tensor:
        """[scale, shift] on the CPU, whatever torch.device() context this is called in."""
        return torch.tensor([data.scale, data.shift], dtype=torch.float64, device="cpu")

    def _renew(self, scale: float, shift: float) -> None:
        """Makes the training set anew from the buffers as they are now."""
        self._data = TrainingSet(
            self.rows,
            labels=self.labels,
            log_weights=self.log_weights,
            scale=scale,
            shift=shift,
            name=self._name,
            check=False,
        )
        self._held, self._classes = Held(self._buffers), {}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Denoiser:
        rows, exact = self.rows, {"affine": self.affine, "log_weights": self.log_weights}
        super()._apply(fn, recurse)
        device = self.rows.device
        for name, value in exact.items():
            if value is None:
                continue
            if value.is_meta and device.type != "meta":  # to_empty() has no values to copy
                zeros = torch.zeros_like(value, device="cpu")
                value = self._affine(self._data) if name == "affine" else zeros
            self._buffers[name] = value.to(device)  # moved, but float64 whatever the type asked for
        if self.rows is not rows:
            self._renew(self._data.scale, self._data.shift)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes the tensors as new buffers, because copying into the old ones would write into the
        caller's training set."""
        found = {k: v for k, v in state_dict.items() if k.startswith(prefix)}
        names = {prefix + k for k, v in self._buffers.items() if v is not None}
        missing_keys.extend(sorted(names - found.keys()))
        if strict:
            unexpected_keys.extend(sorted(found.keys() - names))
        fresh: dict[str, Tensor] = {}
        for key in sorted(names & found.keys()):
            old, new = self._buffers[key.removeprefix(prefix)], found[key]
            assert old is not None
            if not isinstance(new, Tensor):
                error_msgs.append(f"{key}: expected a tensor, got {type(new).__name__}")
            elif new.shape != old.shape or new.dtype != old.dtype:
                error_msgs.append(
                    f"{key}: expected {list(old.shape)} {old.dtype} as in this Denoiser's training"
                    f" set, got {list(new.shape)} {new.dtype}; make the Denoiser on data of that"
                    " shape and type first"
                )
            else:
                # A Denoiser on the meta device has no values to keep, and moves to where these are.
                value = new.detach().to(new.device if old.is_meta else old.device, copy=True)
                unchecked = value.is_meta or not value.is_floating_point()
                may_be_infinite = unchecked or key.endswith("log_weights")
                if not may_be_infinite and not bool(torch.isfinite(value).all()):
                    error_msgs.append(f"{key}: expected finite values, got NaN or inf")
                fresh[key.removeprefix(prefix)] = value
        if not error_msgs:
            self._buffers.update(fresh)
            known = self._data
            affine = [known.scale, known.shift] if self.affine.is_meta else self.affine.tolist()
            self._renew(*affine)

    @torch.inference_mode(False)  # what is kept must serve calls that record a gradient
    def _of_label(self, label: int) -> tuple[Tensor, TrainingSet]:
        """The indices of the rows with this label, and those rows."""
        known = self._classes.get(label)
        if known is None or (known[1].index is None) != (self._data.index is None):
            chosen = self._data.where(label)  # ValueError where there are none
            assert self._data.labels is not None
            index = (self._data.labels == label).nonzero()[:, 0]
            self._classes[label] = index, chosen
        return self._classes[label]

    # --- evaluation -------------------------------------------------------------------------

    def _time(self, x: Tensor, t: float | Tensor) -> Tensor:
        r"""t as scalar or [\*batch] float64; other samplers give it as [\*batch, 1, ..., 1]."""
        return validate.broadcastable("t", t, validate.batch_shape(x, self.data), x.device)

    def evaluate(
        self,
        x: Tensor,
        t: float | Tensor,
        label: int | Tensor | None = None,
        *,
        bias: Tensor | None = None,
        certificate: bool = False,
    ) -> Prediction:
        r"""All predictions at once: x0, score, eps, v, velocity and the posterior behind them.

        Args:
            x: [\*batch, \*shape] float32 or float64. t: process time, a number or a tensor that
                broadcasts to the batch.
            label: which rows to use: those with this label, one for all queries or [\*batch]
                integers. None uses all rows.
            bias: [N], added to the rows' logits.
            certificate: as :func:`memokern.posterior`; it is in the result's posterior.

        Raises: TypeError, ValueError as :func:`memokern.posterior`, and for labels that no row has;
        RuntimeError for labels on the meta device, which has no values.

        Example:
            >>> import torch
            >>> from memokern import Denoiser, TrainingSet
            >>> found = Denoiser(TrainingSet.digits()).evaluate(torch.zeros(2, 8, 8), 1.0, label=3)
            >>> found.posterior.n, found.x0.shape
            (183, torch.Size([2, 8, 8]))
        """
        time = self._time(x, t)
        sigma, alpha = self.process.sigma(time), self.process.alpha(time)
        if label is None:
            return self._evaluate(x, self.data, sigma, alpha, bias, certificate)
        if self.rows.is_meta:
            raise RuntimeError(
                "labels choose rows by their values, and a Denoiser on the meta device has none:"
                " load a state first, or leave label out"
            )
        labels = torch.as_tensor(label, device=self.rows.device)
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"expected label as integers, got {labels.dtype}")
        if labels.dim() == 0:
            index, rows = self._of_label(int(labels))
            chosen = None if bias is None else bias[index]
            return self._evaluate(x, rows, sigma, alpha, chosen, certificate)
        batch = validate.batch_shape(x, self.data)
        if labels.shape != batch:
            raise ValueError(
                f"expected label as one integer or one per query {tuple(batch)}, got"
                f" {tuple(labels.shape)}"
            )
        sigma, alpha = sigma.expand(batch), alpha.expand(batch)
        return self._by_label(x, sigma, alpha, labels, bias, certificate)

    def _evaluate(
        self,
        x: Tensor,
        data: TrainingSet,
        sigma: Tensor,
        alpha: Tensor,
        bias: Tensor | None,
        certificate: bool,
    ) -> Prediction:
        """The evaluation over these rows, at levels instead of times."""
        return regularizers.evaluate(
            x, data, sigma, alpha, regularizer=self.regularizer, bias=bias, method=self.method,
            certificate=certificate,
        )  # fmt: skip

    def _by_label(
        self,
        x: Tensor,
        sigma: Tensor,
        alpha: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        certificate: bool,
    ) -> Prediction:
        """One evaluation per label that occurs, joined in the queries' order."""
        batch = labels.shape
        flat = x.reshape(-1, *self._data.shape)
        sigmas, alphas, wanted = sigma.reshape(-1), alpha.reshape(-1), labels.reshape(-1)
        order, parts = [], []
        for label in wanted.unique().tolist():
            at = (wanted == label).nonzero()[:, 0]
            index, rows = self._of_label(label)
            chosen = None if bias is None else bias[index]
            parts.append(
                self._evaluate(flat[at], rows, sigmas[at], alphas[at], chosen, certificate)
            )
            order.append(at)
        back = torch.argsort(torch.cat(order))

        def join(values: list[Tensor], axis: int) -> Tensor:
            whole = torch.cat(values, axis).index_select(axis, back)
            return whole.reshape(*whole.shape[:axis], *batch, *whole.shape[axis + 1 :])

        # A regulariser may have replicated the queries along first axes; their own axis comes last.
        axis = parts[0].posterior.sigma.dim() - 1

        def joined(values: list[Any], *fields: str) -> dict[str, Any]:
            return {name: join([getattr(v, name) for v in values], axis) for name in fields}

        asked = ("x", "sigma", "alpha", "temperature")
        sums = ("mean", "log_z", "mean_logit", "mean_bias", "weight_sq")
        posteriors = [part.posterior for part in parts]
        bounds = [p.certificate for p in posteriors if p.certificate is not None]
        queries = [part.query for part in parts]
        posterior = replace(
            posteriors[0],
            n=self._data.n,
            certificate=Certificate(**joined(bounds, *BOUNDS)) if bounds else None,
            log_weight_total=join(
                [torch.zeros_like(p.sigma) + p.log_weight_total for p in posteriors], axis
            ),
            **joined(posteriors, *asked, *sums),
        )
        query = replace(queries[0], bias=bias, **joined(queries, *asked))
        return replace(
            parts[0],
            x=x,
            sigma=sigma,
            alpha=alpha,
            x0=join([p.x0 for p in parts], 0),
            residual=join([p.residual for p in parts], 0),
            posterior=posterior,
            query=query,
        )

    def forward(
        self,
        x: Tensor,
        t: float | Tensor,
        label: int | Tensor | None = None,
        *,
        bias: Tensor | None = None,
    ) -> Tensor:
        r"""The chosen prediction [\*batch, \*shape] in x's type. Arguments, errors: as
        `evaluate`."""
        found = self.evaluate(x, t, label, bias=bias)
        if self.prediction == "velocity":
            time = self._time(x, t)
            return found.velocity(self.process.d_alpha(time), self.process.d_sigma(time))
        out: Tensor = getattr(found, self.prediction)
        return out

    # --- what EDM's samplers ask of a network -------------------------------------------------

    @property
    def sigma_min(self) -> float:
        """The lowest level > 0 of the process's grid."""
        return self.process.sigma_min

    @property
    def sigma_max(self) -> float:
        """The level at which the process starts."""
        return float(self.process.sigma(torch.tensor(self.process.t_noise, dtype=torch.float64)))

    def round_sigma(self, sigma: float | Tensor) -> Tensor:
        """sigma as a tensor, not rounded, because every level is possible."""
        return torch.as_tensor(sigma)

    def extra_repr(self) -> str:
        return (
            f"{self._data!r}, process={self.process!r}, regularizer={self.regularizer!r},"
            f" prediction={self.prediction!r}"
        )
