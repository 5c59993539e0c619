"""A small training loop in plain PyTorch: seeded, resumable to the bit, with an average of the
weights, evaluations and early stopping."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from memokern.data.training_set import TrainingSet
from memokern.training import checkpoint
from memokern.training.history import EarlyStopping, History
from memokern.training.learned import LearnedDenoiser
from memokern.training.losses import Loss
from memokern.util import checks

Metric = Callable[[LearnedDenoiser], float]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
HELD_OUT = "held_out"


class Trainer:
    r"""Trains a :class:`.LearnedDenoiser` by a loss on batches of rows.

    Args:
        model: trained in place. loss: from :mod:`memokern.training.losses`.
        data: the training rows, a TrainingSet or a tensor [N, \*shape]; its labels are given to the
            network where that has classes.
        batch_size: rows per step, taken from one random order of all rows after the other; more
            than N takes rows several times, with other noise.
        lr: of Adam. optimizer: what makes another one of the parameters.
        ema: the decay of the averaged weights, min(ema, (1 + step) / (10 + step)); 0 for none.
        seed: of the order of the rows, times and noise, and of what the network draws itself
            (dropout, on the CPU). Weights that the network starts with are its own affair.
        held_out: rows whose loss is measured, with the averaged weights and the same noise each
            time.
        metrics: name -> function of a LearnedDenoiser (with the averaged weights); columns of the
            history. See :func:`.memorised`.
        stop: when to stop early.

    Raises: TypeError, ValueError for wrong arguments; rows of another shape than the model's.

    Example:
        >>> import torch
        >>> from memokern.training import MLP, LearnedDenoiser, Trainer, losses
        >>> _ = torch.manual_seed(0)
        >>> rows = torch.tensor([[-1.0], [1.0]])
        >>> trainer = Trainer(LearnedDenoiser(MLP((1,), width=16)), losses.Denoising("x0"), rows)
        >>> history = trainer.fit(20, every=10)
        >>> history.column("step"), trainer.step
        ([10, 20], 20)
    """

    def __init__(
        self,
        model: LearnedDenoiser,
        loss: Loss,
        data: TrainingSet | Tensor,
        *,
        batch_size: int = 128,
        lr: float = 1e-3,
        optimizer: MakeOptimizer | None = None,
        ema: float = 0.9999,
        seed: int = 0,
        held_out: TrainingSet | Tensor | None = None,
        metrics: Mapping[str, Metric] | None = None,
        stop: EarlyStopping | None = None,
    ) -> None:
        if not isinstance(model, LearnedDenoiser):
            raise TypeError(f"expected model as a LearnedDenoiser, got {type(model).__name__}")
        self.model, self.loss = model, loss
        self.data, self.held_out = (
            self._rows(data),
            None if held_out is None else self._rows(held_out),
        )
        self.batch_size = checks.integer("batch_size", batch_size, 1)
        lr = checks.number("lr", lr, 0.0, strict=True)
        self.ema = checks.number("ema", ema, 0.0)
        if self.ema >= 1:
            raise ValueError(f"expected ema in [0, 1), got {ema}")
        self.metrics, self.stop = dict(metrics or {}), stop
        known = [HELD_OUT] * (held_out is not None) + list(self.metrics)
        if stop is not None and stop.monitor not in known:
            raise ValueError(
                f"expected stop.monitor one of {', '.join(known) or 'nothing'} (held_out and"
                f" metrics), got {stop.monitor!r}"
            )
        if optimizer is None:
            fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(
                model.parameters(), lr=lr, fused=fused
            )
        else:
            self.optimizer = optimizer(model.parameters())
        self.averaged = copy.deepcopy(model).requires_grad_(False).eval()
        # Lists, because looking for parameters takes as long as a small layer.
        self._weights = [list(m.parameters()) for m in (self.averaged, model)]
        self._buffers = [list(m.buffers()) for m in (self.averaged, model)]
        self.kept: dict[str, Tensor] | None = None
        self.history, self.step, self.stopped = History(), 0, False
        self.seed = checks.integer("seed", seed, 0)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.order = torch.empty(
            0, dtype=torch.int64, device="cpu"
        )  # rows that this pass has still to take
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.rng = torch.get_rng_state()  # of what the network draws

    def _rows(self, data: TrainingSet | Tensor) -> TrainingSet:
        data = data if isinstance(data, TrainingSet) else TrainingSet(data)
        if data.shape != self.model.shape:
            raise ValueError(
                f"the network takes rows {list(self.model.shape)}, the data are {list(data.shape)}"
            )
        return data

    # --- a step -------------------------------------------------------------------------------

    def _batch(self) -> tuple[Tensor, Tensor | None]:
        """The next rows, and their labels."""
        while len(self.order) < self.batch_size:
            fresh = torch.randperm(self.data.n, generator=self.generator, device="cpu")
            self.order = torch.cat([self.order, fresh])
        taken, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        return self._at(self.data, taken)

    def _at(self, data: TrainingSet, index: Tensor) -> tuple[Tensor, Tensor | None]:
        index = index.to(data.device)
        y = data.gather(index).to(self.model.device, self.model.dtype)
        labels = data.labels if self.model.label_dim else None
        return y, None if labels is None else labels[index].to(self.model.device)

    def _train(self) -> Tensor:
        """One step; the loss, detached."""
        y, label = self._batch()
        value = self.loss(self.model, y, self.generator, label)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        self.optimizer.step()
        self.step += 1
        decay = min(self.ema, (1 + self.step) / (10 + self.step)) if self.ema else 0.0
        with torch.no_grad():
            for mean, now in zip(*self._weights, strict=True):
                mean.lerp_(now, 1 - decay)
            for kept, new in zip(*self._buffers, strict=True):
                kept.copy_(new)
        return value.detach()

    def fit(
        self,
        steps: int,
        *,
        every: int = 500,
        save: str | os.PathLike[str] | None = None,
        progress: bool = False,
    ) -> History:
        """Train until `steps` steps have been taken in all, or the early stop.

        Args:
            steps: those of earlier calls and of a checkpoint included.
            every: steps between two evaluations, each of which is a row of the history.
            save: where a checkpoint goes after each evaluation, a `.safetensors` file.
            progress: whether to show a progress bar.

        Returns: the whole :class:`History`.

        Raises: RuntimeError where the loss is not finite.
        """
        checks.integer("steps", steps, 0)
        checks.integer("every", every, 1)
        self.model.train()
        losses: list[Tensor] = []
        with (
            torch.random.fork_rng(devices=[]),
            tqdm(total=steps, initial=self.step, disable=not progress, desc="training") as bar,
        ):
            torch.set_rng_state(self.rng)
            while self.step < steps and not self.stopped:
                losses.append(self._train())
                bar.update()
                if self.step % every == 0 or self.step == steps:
                    self.rng = torch.get_rng_state()
                    mean = float(torch.stack(losses).double().mean())
                    losses.clear()
                    if not math.isfinite(mean):
                        raise RuntimeError(
                            f"the loss is {mean} at step {self.step}: a smaller lr may help"
                        )
                    row = self._evaluate(mean)
                    bar.set_postfix({k: f"{v:.3g}" for k, v in row.items() if k != "step"})
                    if save is not None:
                        self.save(save)
            self.rng = torch.get_rng_state()
        self.model.eval()
        return self.history

    @torch.no_grad()
    def _evaluate(self, loss: float) -> dict[str, Any]:
        """A row of the history, and the weights to keep by the early stop."""
        epoch = self.step * self.batch_size / self.data.n
        row: dict[str, Any] = {"step": self.step, "epoch": epoch, "loss": loss}
        if self.held_out is not None:
            row[HELD_OUT] = self.loss_of(self.held_out)
        for name, metric in self.metrics.items():
            row[name] = float(metric(self.averaged))
        self.history.rows.append(row)
        if self.stop is not None:
            column = self.history.column(self.stop.monitor)
            best, self.stopped = self.stop.after(column)
            if best == len(column) - 1:
                self.kept = {k: v.clone() for k, v in self.averaged.network.state_dict().items()}
        return row

    @torch.no_grad()
    def loss_of(self, data: TrainingSet | Tensor, repeats: int = 4) -> float:
        """The loss of all rows with the averaged weights, each with `repeats` draws of time and
        noise, which are the same at every call."""
        rows = self._rows(data)
        generator = torch.Generator().manual_seed(self.seed + 1)
        total = 0.0
        for index in (
            torch.arange(rows.n, device="cpu").repeat(repeats).split(max(self.batch_size, 256))
        ):
            y, label = self._at(rows, index)
            total += float(self.loss(self.averaged, y, generator, label)) * len(index)
        return total / (rows.n * repeats)

    # --- what comes out -----------------------------------------------------------------------

    def result(self) -> LearnedDenoiser:
        """A copy of the model with the weights to use: those that the early stop kept, else the
        averaged ones."""
        found = copy.deepcopy(self.averaged)
        if self.kept is not None:
            found.network.load_state_dict(self.kept)
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything that :meth:`load` needs to a `.safetensors` file, whole or not at
        all."""
        numbers = {
            "step": self.step, "stopped": self.stopped, "rows": self.history.rows,
            "groups": [
                {k: v for k, v in group.items() if k != "params"}
                for group in self.optimizer.param_groups
            ],
        }  # fmt: skip
        checkpoint.write(
            path,
            {
                "network": self.model.network.state_dict(),
                "averaged": self.averaged.network.state_dict(),
                "kept": self.kept or {},
                "optimizer": checkpoint.flat(self.optimizer.state_dict()["state"]),
                "state": {
                    "order": self.order, "generator": self.generator.get_state(), "rng": self.rng,
                },
            },
            numbers,
        )  # fmt: skip

    def load(self, path: str | os.PathLike[str]) -> Trainer:
        """Go on from a checkpoint, in a Trainer made with the same arguments: the steps that follow
        give the same bits as if the run had not been interrupted (on one kind of machine, with as
        many threads). Returns itself.

        Raises: ValueError for a file that is no checkpoint, or of another network.
        """
        parts, numbers = checkpoint.read(path)
        try:
            self.model.network.load_state_dict(parts["network"])
            self.averaged.network.load_state_dict(parts["averaged"])
        except RuntimeError as error:
            raise ValueError(f"{str(path)!r} is of another network: {error}") from None
        self.kept = parts.get("kept") or None
        state = self.optimizer.state_dict()
        groups = zip(state["param_groups"], numbers["groups"], strict=True)
        state["param_groups"] = [now | then for now, then in groups]
        state["state"] = checkpoint.nested(parts.get("optimizer", {}))
        self.optimizer.load_state_dict(state)
        self.order = parts["state"]["order"]
        self.generator.set_state(parts["state"]["generator"])
        self.rng = parts["state"]["rng"]
        self.step, self.stopped = numbers["step"], numbers["stopped"]
        self.history = History(numbers["rows"])
        return self
