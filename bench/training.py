"""`python -m bench.training`: training targets, against the loops that are published.

The loops are written down from their formulas, as they build their matrices: the stable target
field (arXiv 2302.00670) with differences [B, M, D] and a repeated target, empirical flow matching
(arXiv 2506.03719), and the bank per class of StableVM with a loop over labels. Each is checked
against float64 before it is timed, and all of a case take turns in one run.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import memokern
from bench import machine, report, timing
from memokern.training import targets
from memokern.util import writing

ROUNDS = 5
MOST_ERROR = 1e-3  # of the largest true value


# --- the published loops ------------------------------------------------------------------------


def stf_loop(x: Tensor, rows: Tensor, sigma: Tensor) -> Tensor:
    """The lines of `stf_scores`: x0 targets [B, D]."""
    distance = (x.unsqueeze(1) - rows).square().sum(-1)
    distance = -distance / (2 * sigma.unsqueeze(1) ** 2)
    distance = torch.exp(distance - distance.max(1, keepdim=True)[0])[:, :, None]
    weights = distance / distance.sum(1, keepdim=True)
    target = rows.unsqueeze(0).repeat(len(x), 1, 1)
    return (weights * target).sum(1)


def flow_loop(x: Tensor, rows: Tensor, t: Tensor) -> Tensor:
    """The mean of the conditional velocities, as `mean_cfm` weighs them."""
    t = t[:, None, None]
    dim = x.shape[1]
    log_p = -(x[:, None] - t * rows).square().sum(-1, keepdim=True) / (2 * (1 - t) ** 2)
    log_p = log_p - dim * torch.log(1 - t) - math.log(2 * math.pi) / 2
    weights = torch.softmax(log_p, 1)
    return (weights * (rows - x[:, None]) / (1 - t)).sum(1)


def bank_loop(x: Tensor, rows: Tensor, t: Tensor, label: Tensor, labels: Tensor) -> Tensor:
    """A loop over the labels of the batch, each with its own bank; logits cut off at -1e4."""
    out = torch.empty_like(x)
    for value in label.unique():
        mine, bank = label == value, rows[labels == value]
        time = t[mine][:, None, None]
        gap = x[mine][:, None] - (1 - time) * bank
        logit = (-gap.square().sum(-1) / (2 * t[mine][:, None] ** 2)).clamp(min=-1e4)
        weights = torch.softmax(logit, 1)[..., None]
        velocity = -bank + gap / time  # alpha' y + sigma' eps
        out[mine] = (weights * velocity).sum(1)
    return out


# --- cases --------------------------------------------------------------------------------------


@dataclass
class Case:
    """What is timed: `ours` and `loop` give [B, D]; `sweep` is what ours cannot be faster than."""

    name: str
    ours: Callable[[], Tensor]
    loop: Callable[[], Tensor]
    sweep: Callable[[], Tensor]
    truth: Tensor  # float64


def _truth(x: Tensor, rows: Tensor, sigma: Tensor, alpha: Tensor) -> Tensor:
    """The posterior mean in float64 [B, D]."""
    x, rows = x.double(), rows.double()
    square = torch.stack([(q - a * rows).square().sum(1) for q, a in zip(x, alpha, strict=True)])
    return torch.softmax(-square / (2 * sigma[:, None] ** 2), 1) @ rows


def cases(quick: bool) -> list[Case]:
    """CIFAR-sized rows; banks of 256 latents for each class."""
    torch.manual_seed(0)
    b, m, d = (16, 128, 768) if quick else (128, 1024, 3072)
    rows = torch.rand(m, d) * 2 - 1
    y, noise = rows[:b], torch.randn(b, d)
    sigma = torch.exp(1.2 * torch.randn(b) + 2).double()  # where several rows share the weight
    x = y + sigma[:, None].float() * noise
    one = torch.ones(b, dtype=torch.float64)
    made = memokern.TrainingSet(rows, check=False)
    _ = made.sq_norms
    found = [
        Case(
            f"stable B={b} M={m} D={d}",
            lambda: targets.stable(x, rows, sigma),
            lambda: stf_loop(x, rows, sigma.float()),
            lambda: memokern.denoise(x, made, sigma),
            _truth(x, rows, sigma, one),
        )
    ]
    t = torch.rand(b).double() * 0.2
    x_t = t[:, None].float() * y + (1 - t[:, None].float()) * noise
    sure = _truth(x_t, rows, 1 - t, t)
    found.append(
        Case(
            f"flow_matching B={b} M={m} D={d}",
            lambda: targets.flow_matching(x_t, rows, t),
            lambda: flow_loop(x_t, rows, t.float()),
            lambda: memokern.denoise(x_t, made, 1 - t, t),
            (sure - x_t.double()) / (1 - t)[:, None],
        )
    )
    classes, per, latent = (4, 32, 256) if quick else (100, 256, 1024)
    count = 16 if quick else 64
    labels = torch.arange(classes * per) % classes
    bank = torch.randn(classes * per, latent)
    label = torch.randint(0, classes, (count,))
    late = 0.8 + 0.2 * torch.rand(count).double()
    own = torch.stack([bank[labels == c][0] for c in label])
    z = torch.randn(count, latent)
    x_v = (1 - late[:, None].float()) * own + late[:, None].float() * z
    means = [
        _truth(x_v[i : i + 1], bank[labels == label[i]], late[i : i + 1], 1 - late[i : i + 1])
        for i in range(count)
    ]
    kept = memokern.Denoiser(
        memokern.TrainingSet(bank, labels=labels, check=False),
        memokern.processes.FlowMatching(reverse=True),
        prediction="velocity",
    )
    by_class = {
        int(c): memokern.TrainingSet(bank[labels == c], check=False) for c in label.unique()
    }
    for part in by_class.values():
        _ = part.sq_norms

    def sweeps() -> Tensor:
        out = torch.empty_like(x_v)
        for value, part in by_class.items():
            mine = label == value
            out[mine] = memokern.denoise(x_v[mine], part, late[mine], 1 - late[mine])
        return out

    found.append(
        Case(
            f"stable_velocity B={count} {classes} classes of {per} D={latent}",
            lambda: targets.stable_velocity(x_v, kept, late, label),
            lambda: bank_loop(x_v, bank, late.float(), label, labels),
            sweeps,
            (x_v.double() - torch.cat(means)) / late[:, None],
        )
    )
    return found


def measure(case: Case, clock: timing.Clock) -> dict[str, Any]:
    """Seconds of each, in turns, once they are right."""
    scale = float(case.truth.abs().max())
    ways = {"memokern": case.ours, "published loop": case.loop, "sweep alone": case.sweep}
    for name in ("memokern", "published loop"):
        error = float((ways[name]().double() - case.truth).abs().max()) / scale
        if not error < MOST_ERROR:
            raise AssertionError(f"{case.name}: {name} is off by {error:.1e}")
    times: dict[str, list[tuple[float, bool]]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, call in ways.items():
            times[name].append(clock.time(call, lambda: None))
    seconds = {name: timing.best(found)["seconds"] for name, found in times.items()}
    return {"case": case.name, "seconds": seconds,
            "ratio": seconds["published loop"] / seconds["memokern"]}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench.training", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: seconds")
    parser.add_argument("--json", type=Path, help="where the figures go")
    args = parser.parse_args()
    about = machine.describe()
    print(report.on(about), flush=True)
    clock = timing.Clock(patience=60.0)
    found = []
    for case in cases(args.quick):
        entry = measure(case, clock)
        found.append(entry)
        ms = {name: f"{1e3 * s:.1f} ms" for name, s in entry["seconds"].items()}
        print(f"{entry['case']}: {ms}, {entry['ratio']:.1f} x", flush=True)
    if args.json:
        writing.write_json(args.json, {"machine": about, "cases": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
