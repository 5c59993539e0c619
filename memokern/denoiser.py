"""The closed-form denoiser as a network: an nn.Module on a training set."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from memokern import sweep, validate
from memokern.conditional import Label, Wanted, allowed_for, groups
from memokern.data.stored import PER_ROW
from memokern.data.training_set import TrainingSet
from memokern.edm_network import EDMNetwork
from memokern.processes import EDM, Process
from memokern.regularizers import Prediction, Query, Regularizer
from memokern.regularizers.joined import joined
from memokern.regularizers.prediction import evaluate_each, weighting_of
from memokern.sweep import NOTHING, Own
from memokern.util.held import Held
from memokern.util.torch_internals import traced
from memokern.validate import PerQuery, wide

# Buffers that stay float64, whatever type the others are converted to.
EXACT = ("affine", "conditions", "log_weights")
PREDICTIONS = ("x0", "eps", "v", "score", "velocity")
# The noise level at which slopes stand for those at sigma = 0.
NEAR_ZERO = 1e-6


class Denoiser(EDMNetwork, nn.Module):
    r"""The minimiser of the denoising loss on a training set, regularised, at a process's times.

    There is nothing to train. The one parameter, `kind`, is empty: it tells pipelines that ask for
    `next(model.parameters())` or `model.dtype` which type to run in. Half-precision x is computed
    in float32, and the result has x's type.

    Buffers: `rows` [N, \*shape] (the training set's own memory), `affine` (scale, shift), and
    `labels`, `conditions` and `log_weights` where the set has them. `state_dict` has these, but not
    the process and the regulariser, which are code; loading needs a set of the same shape and row
    type. `.to()`
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
            At sigma = 0 x0 and velocity are finite, score and eps with a gate like Tikhonov's.
            Velocity holds a time past the data, up to the length of the process, at the data's
            (solvers step there), where eps is the noise's mean, 0.
        method: as :func:`memokern.posterior`.
        persistent: False leaves the data out of `state_dict`, which is then empty.

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
    conditions: Tensor | None
    log_weights: Tensor | None

    def __init__(
        self,
        data: TrainingSet | Tensor,
        process: Process | None = None,
        regularizer: Regularizer | None = None,
        prediction: str = "x0",
        *,
        method: str = "auto",
        persistent: bool = True,
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
        if method not in sweep.METHODS:
            known = ", ".join(sweep.METHODS)
            raise ValueError(f"expected method one of {known}, got {method!r}")
        if not isinstance(data, TrainingSet):
            data = TrainingSet(data)
        self.process, self.regularizer = process, regularizer
        self.prediction, self.method = prediction, method
        self._persistent = persistent
        self._data = data
        for name, value in {
            "rows": data.rows.reshape((len(data.rows), *data.shape)),
            "affine": self._affine(data).to(data.device),
            **{name: getattr(data, name) for name in PER_ROW},
        }.items():
            self.register_buffer(name, value, persistent=persistent)
        # What pipelines ask for a network's type; state_dict leaves it out.
        kind = torch.empty(0, dtype=data.compute_dtype, device=data.device)
        self.kind = nn.Parameter(kind, requires_grad=False)
        self._held = Held(self._buffers)
        self._spare: tuple[Held, TrainingSet] | None = None

    # --- the data ---------------------------------------------------------------------------

    @property
    def data(self) -> TrainingSet:  # type: ignore[override]
        """The training set, on the buffers' device. It is made anew where a buffer is another one
        (assigned, of torch.func.functional_call, of a replica) or was written to in place."""
        changed = self._held.changed(self._buffers)
        if changed == {"rows"} and self._held.tensors["rows"] is self.rows:
            # Written to, which the training set sees itself.
            self._held = Held(self._buffers)
        elif changed:
            # Where the buffers come back, as after functional_call, so does what is known of them.
            spare, self._spare = self._spare, (self._held, self._data)
            if spare is not None and not spare[0].changed(self._buffers):
                self._held, self._data = spare
            else:
                known = [self._data.scale, self._data.shift]
                self._renew(*(self.affine.tolist() if "affine" in changed else known))
        return self._data

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "kind"]

    @staticmethod
    def _affine(data: TrainingSet) -> Tensor:
        """[scale, shift] on the CPU, whatever torch.device() context this is called in."""
        return torch.tensor([data.scale, data.shift], dtype=torch.float64, device="cpu")

    def _renew(self, scale: float, shift: float) -> None:
        """Makes the training set anew from the buffers as they are now."""
        own = {name: getattr(self, name) for name in PER_ROW}
        self._data = self._data.renewed(self.rows, scale, shift, **own)
        self._held = Held(self._buffers)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Denoiser:
        rows, exact = self.rows, {name: self._buffers[name] for name in EXACT}
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
        kept = self._buffers if self._persistent else {}
        names = {prefix + k for k, v in kept.items() if v is not None}
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
        if fresh and not error_msgs:
            self._buffers.update(fresh)
            known = self._data
            affine = [known.scale, known.shift] if self.affine.is_meta else self.affine.tolist()
            self._renew(*affine)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: rows that are the training set's memory go with it, once."""
        shared = self.rows.data_ptr() == self.data.rows.data_ptr()
        state = {**self.__dict__, "_held": None, "_spare": None}
        if shared:
            state["_buffers"] = {**self._buffers, "rows": None}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._buffers["rows"] is None:
            data = self._data
            self._buffers["rows"] = data.rows.reshape((len(data.rows), *data.shape))
        self._held, self._spare = Held(self._buffers), None  # copies count from 0

    # --- evaluation -------------------------------------------------------------------------

    def _time(self, x: Tensor, t: float | Tensor) -> Tensor:
        r"""t as scalar or [\*batch] float64; other samplers give it as [\*batch, 1, ..., 1]."""
        return validate.broadcastable("t", t, validate.batch_shape(x, self.data), x.device)

    def evaluate(
        self,
        x: Tensor,
        t: float | Tensor,
        label: Label = None,
        *,
        condition: Tensor | None = None,
        bandwidth: PerQuery | None = None,
        bias: Tensor | None = None,
        certificate: bool = False,
    ) -> Prediction:
        r"""All predictions at once: x0, score, eps, v, velocity and the posterior behind them.

        Args:
            x: [\*batch, \*shape], in a type as for :func:`memokern.posterior`. t: process
                time, a number or a tensor that broadcasts to the batch.
            label: which rows to use: those with this label, one for all queries or [\*batch]
                integers, or one-hot [\*batch, label_dim]. None uses all rows; so do a list's None,
                -1 where no row has it, and one-hot zeros, the null class of guidance.
            condition, bandwidth: as :func:`memokern.posterior`; in the result's posterior, logits
                and biases count from the largest that the condition gives.
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
        x = validate.computable(x)
        time = self._time(x, t)
        sigma, alpha = self.process.sigma(time), self.process.alpha(time)
        wanted = Wanted(label, condition, bandwidth)
        if not wanted:
            return self._evaluate(x, self.data, sigma, alpha, bias, certificate)
        batch = validate.batch_shape(x, self.data)
        asked = validate.checked(x, self.data, sigma, alpha, 1.0, bias)
        index = sweep.index_for(self.data, self.method)
        together = sweep.why_in_groups(asked, self.data, index) is None
        weighting = weighting_of(self.regularizer, x, self.data, sigma, alpha, bias)
        allowed = allowed_for(asked, weighting, certificate, index)
        found = groups(self.data, batch, wanted, together, allowed)
        if not found:
            return self._evaluate(x, self.data, sigma, alpha, bias, certificate)
        if found[0].is_whole:
            every, total = found[0], found[0].total_bias(bias)
            return self._evaluate(x, every.data, sigma, alpha, total, certificate, every.own)
        flat = x.reshape(-1, *self._data.shape)
        sigmas, alphas = sigma.expand(batch).reshape(-1), alpha.expand(batch).reshape(-1)
        parts = []
        for group in found:
            at, part, own = group.at, group.total_bias(bias), group.own
            parts.append(
                self._evaluate(flat[at], group.data, sigmas[at], alphas[at], part, certificate, own)
            )
        s, a, one = (v.reshape(batch) for v in (sigmas, alphas, torch.ones_like(sigmas)))
        back = torch.argsort(torch.cat([group.at for group in found]))
        return joined(parts, back, Query(x, s, a, one, bias), max(g.data.n for g in found))

    def _evaluate(
        self,
        x: Tensor,
        data: TrainingSet,
        sigma: Tensor,
        alpha: Tensor,
        bias: Tensor | None,
        certificate: bool,
        own: Own = NOTHING,
    ) -> Prediction:
        """The evaluation over these rows, at levels instead of times."""
        return evaluate_each(
            x, data, sigma, alpha, own, regularizer=self.regularizer, bias=bias,
            method=self.method, certificate=certificate,
        )  # fmt: skip

    def forward(
        self,
        x: Tensor,
        t: float | Tensor,
        label: Label = None,
        *,
        condition: Tensor | None = None,
        bandwidth: PerQuery | None = None,
        guidance: float | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        r"""The chosen prediction [\*batch, \*shape] in x's type.

        Args:
            guidance: w of classifier-free guidance (arXiv 2207.12598): the prediction for the label
                or condition, extrapolated from the one for all rows, p_all + w (p - p_all). 1 and
                None are the prediction itself, 0 that for all rows; a second sweep for others.
            others, errors: as `evaluate`.
        """
        query = validate.computable(x)
        asked: dict[str, Any] = {"bias": bias}
        if guidance is not None and not (
            isinstance(guidance, float | int) and math.isfinite(guidance)
        ):
            raise ValueError(f"expected guidance as a finite number, or None, got {guidance!r}")
        chosen: dict[str, Any] = {"label": label, "condition": condition, "bandwidth": bandwidth}
        if guidance is None or guidance == 1 or not Wanted(label, condition):
            return self._predict(query, t, **asked, **chosen).to(x.dtype)
        whole = self._predict(query, t, **asked)
        part = self._predict(query, t, **asked, **chosen)
        return (whole + guidance * (part - whole)).to(x.dtype)

    def _predict(self, x: Tensor, t: float | Tensor, **asked: Any) -> Tensor:
        if self.prediction == "velocity":
            return self._velocity(x, self._time(x, t), **asked)
        out: Tensor = getattr(self.evaluate(x, t, **asked), self.prediction)
        return out

    def _velocity(self, x: Tensor, time: Tensor, **asked: Any) -> Tensor:
        """dx/dt of the probability flow, also at the data and a little past them."""
        process = self.process
        length = process.t_noise - process.t_data
        past = (process.t_data - time) / length
        time = torch.where((past > 0) & (past <= 1), process.t_data, time)
        found = self.evaluate(x, time, **asked)
        d_alpha, d_sigma = process.d_alpha(time), process.d_sigma(time)
        velocity = found.velocity(d_alpha, d_sigma)
        singular = (found.sigma == 0) & ~torch.isfinite(d_sigma)
        if not traced(singular) and bool(singular.any()):
            # sigma' eps = -sigma sigma' score, and sigma sigma' has a limit where sigma' has none.
            near = process.time_of_sigma(NEAR_ZERO).to(time.device)
            slope = wide(process.sigma(near) * process.d_sigma(near), x)
            score = torch.nan_to_num(found.score, nan=0.0, posinf=0.0, neginf=0.0)
            velocity = torch.where(wide(singular, x) != 0, velocity - slope * score, velocity)
        return velocity

    def extra_repr(self) -> str:
        return (
            f"{self._data!r}, process={self.process!r}, regularizer={self.regularizer!r},"
            f" prediction={self.prediction!r}"
        )
