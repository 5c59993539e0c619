"""Loops that people write, against the call that takes their place.

The published loops of training targets are written down from their formulas, as they build their
matrices: the stable target field (arXiv 2302.00670) with differences [B, M, D] and a repeated
target, empirical flow matching (arXiv 2506.03719), and the bank per class of StableVM with a loop
over labels. Beside them stand one sweep for each label, and one for each condition, a kernel
density estimate, and the criteria of memorisation, by distances of all pairs. Each is checked
against float64 before it is timed, and all of a case take turns in one run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import memokern
from bench import timing
from memokern import kde, memorization
from memokern.training import targets

ROUNDS = 5
MOST_ERROR = 1e-3  # of the largest true value


# --- the loops ----------------------------------------------------------------------------------


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


def kde_loop(x: Tensor, rows: Tensor, h: float, step: int = 256) -> Tensor:
    """Log densities [B, 1] by the logarithm of a sum of exponentials of [step, N] distances."""
    dim = rows.shape[1]
    log_norm = math.log(len(rows)) + dim * math.log(h * math.sqrt(2 * math.pi))
    parts = [torch.cdist(q, rows).square() / (-2 * h * h) for q in x.split(step)]
    return torch.cat([p.logsumexp(1, keepdim=True) for p in parts]) - log_norm


def memorisation_loop(x: Tensor, rows: Tensor, k: int, step: int = 256) -> Tensor:
    """Of each sample the nearest distance, its ratio to the next, and to the mean of the next
    k - 1: three criteria [B, 3] by distances [step, N] and their smallest."""
    near = [torch.cdist(q, rows).topk(k, largest=False).values for q in x.split(step)]
    return _criteria(torch.cat(near))


def _criteria(distance: Tensor) -> Tensor:
    """Those of the nearest distances [B, k]."""
    first = distance[:, 0]
    return torch.stack([first, first / distance[:, 1], first / distance[:, 1:].mean(1)], 1)


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


def label_loop(x: Tensor, net: memokern.Denoiser, sigma: float, label: Tensor) -> Tensor:
    """One sweep for each label, over its rows, which the denoiser keeps from the first call on."""
    return torch.cat([net(q[None], sigma, int(c)) for q, c in zip(x, label, strict=True)])


def condition_loop(
    x: Tensor, data: memokern.TrainingSet, sigma: float, condition: Tensor, bandwidth: float
) -> Tensor:
    """One sweep for each query, with the bias of its condition."""
    assert data.conditions is not None
    return torch.cat([
        memokern.denoise(
            q[None], data, sigma, bias=-(data.conditions - c).square().sum(1) / (2 * bandwidth**2)
        )
        for q, c in zip(x, condition, strict=True)
    ])  # fmt: skip


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


def of_a_batch(quick: bool) -> Iterator[Case]:
    """Targets over a reference batch of CIFAR-sized rows."""
    torch.manual_seed(0)
    b, m, d = (16, 128, 768) if quick else (128, 1024, 3072)
    rows = torch.rand(m, d) * 2 - 1
    y, noise = rows[:b], torch.randn(b, d)
    sigma = torch.exp(1.2 * torch.randn(b) + 2).double()  # where several rows share the weight
    x = y + sigma[:, None].float() * noise
    one = torch.ones(b, dtype=torch.float64)
    made = memokern.TrainingSet(rows, check=False)
    _ = made.sq_norms
    yield Case(
        f"stable B={b} M={m} D={d}",
        lambda: targets.stable(x, rows, sigma),
        lambda: stf_loop(x, rows, sigma.float()),
        lambda: memokern.denoise(x, made, sigma),
        _truth(x, rows, sigma, one),
    )
    t = torch.rand(b).double() * 0.2
    x_t = t[:, None].float() * y + (1 - t[:, None].float()) * noise
    sure = _truth(x_t, rows, 1 - t, t)
    yield Case(
        f"flow_matching B={b} M={m} D={d}",
        lambda: targets.flow_matching(x_t, rows, t),
        lambda: flow_loop(x_t, rows, t.float()),
        lambda: memokern.denoise(x_t, made, 1 - t, t),
        (sure - x_t.double()) / (1 - t)[:, None],
    )


def of_classes(quick: bool) -> Iterator[Case]:
    """Banks of 256 latents for each class."""
    torch.manual_seed(0)
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

    yield Case(
        f"stable_velocity B={count} {classes} classes of {per} D={latent}",
        lambda: targets.stable_velocity(x_v, kept, late, label),
        lambda: bank_loop(x_v, bank, late.float(), label, labels),
        sweeps,
        (x_v.double() - torch.cat(means)) / late[:, None],
    )


def of_labels(b: int, classes: int, per: int, d: int) -> Case:
    """As many labels as queries."""
    torch.manual_seed(0)
    label, sigma = torch.arange(b), 0.5
    labels = torch.arange(classes * per) % classes
    rows = torch.randn(classes * per, d)
    net = memokern.Denoiser(memokern.TrainingSet(rows, labels=labels, check=False))
    x = rows[:b] + sigma * torch.randn(b, d)
    noise, one = torch.tensor([sigma]).double(), torch.ones(1).double()
    kept = [net.data.of_label(int(c))[1] for c in label]
    truth = [_truth(x[i : i + 1], rows[labels == i], noise, one) for i in range(b)]
    return Case(
        f"labels B={b} {classes} classes of {per} D={d}",
        lambda: net(x, sigma, label),
        lambda: label_loop(x, net, sigma, label),
        lambda: torch.cat([memokern.denoise(x[i : i + 1], kept[i], sigma) for i in range(b)]),
        torch.cat(truth),
    )


def of_conditions(quick: bool) -> Iterator[Case]:
    """As many conditions as queries."""
    torch.manual_seed(0)
    b, n, d, k = (8, 500, 64, 4) if quick else (64, 50_000, 3072, 16)
    rows, conditions = torch.randn(n, d), torch.randn(n, k).double()
    data = memokern.TrainingSet(rows, conditions=conditions, check=False)
    _ = data.sq_norms
    # Noise that leaves the choice to the condition.
    sigma, bandwidth = 3.0 * math.sqrt(d), 0.5
    x, condition = rows[:b] + sigma * torch.randn(b, d), conditions[:b] + 0.1 * torch.randn(b, k)
    weights = []
    for q, c in zip(x.double(), condition, strict=True):
        logits = -torch.cat([(part.double() - q).square().sum(1) for part in rows.split(5000)])
        logits = logits / (2 * sigma**2) - (conditions - c).square().sum(1) / (2 * bandwidth**2)
        weights.append(torch.softmax(logits, 0))
    yield Case(
        f"conditions B={b} N={n} D={d} K={k}",
        lambda: memokern.posterior(x, data, sigma, condition=condition, bandwidth=bandwidth).mean,
        lambda: condition_loop(x, data, sigma, condition, bandwidth),
        lambda: memokern.denoise(x, data, sigma),
        torch.cat([torch.stack(weights) @ part.double() for part in rows.split(256, 1)], 1),
    )


def of_densities(quick: bool) -> Iterator[Case]:
    """A kernel density estimate, and criteria of memorisation from the 50 nearest rows."""
    torch.manual_seed(0)
    b, n, d = (32, 300, 8) if quick else (1024, 50_000, 16)
    rows, h = torch.randn(n, d), 0.5
    x = torch.randn(b, d)
    data = memokern.TrainingSet(rows, check=False)
    _ = data.sq_norms
    wide = rows.double()
    logs = [(q - wide).square().sum(1) / (-2 * h * h) for q in x.double()]
    norm = math.log(n) + d * math.log(h * math.sqrt(2 * math.pi))
    yield Case(
        f"kde B={b} N={n} D={d}",
        lambda: kde.log_density(x, data, h)[:, None],
        lambda: kde_loop(x, rows, h),
        lambda: memokern.posterior(x, data, h).log_z[:, None],
        torch.stack([v.logsumexp(0) for v in logs])[:, None] - norm,
    )
    b, n, d, k = (16, 200, 48, 20) if quick else (64, 50_000, 3072, 50)
    rows = torch.rand(n, d) * 2 - 1
    # A third are copies with little noise, the others of their own.
    x = torch.where(torch.arange(b)[:, None] % 3 == 0, rows[:b], torch.rand(b, d) * 2 - 1)
    x = x + 0.05 * torch.randn(b, d)
    data = memokern.TrainingSet(rows, check=False)
    _ = data.sq_norms

    def ours() -> Tensor:
        found = memorization.report(x, data, k=k)
        values = [found[name].value for name in ("collapse", "ratio", "neighbourhood")]
        return torch.stack([v.double() for v in values], 1)

    near = [torch.cat([(p.double() - q).square().sum(1) for p in rows.split(5000)]).sqrt()
            for q in x.double()]  # fmt: skip
    yield Case(
        f"memorization B={b} N={n} D={d} k={k}",
        ours,
        lambda: memorisation_loop(x, rows, k),
        lambda: memokern.nearest(x, data, k).distance,
        _criteria(torch.stack([v.topk(k, largest=False).values for v in near])),
    )


def cases(quick: bool) -> Iterator[Case]:
    """Each is made when it is asked for, and gone with the next."""
    yield from of_a_batch(quick)
    yield from of_classes(quick)
    # From small classes, of which calls cost more than rows, to images, which take long to read.
    large = ((64, 100, 20, 64), (64, 100, 256, 1024), (64, 100, 500, 3072))
    for sizes in ((8, 20, 10, 16),) if quick else large:
        yield of_labels(*sizes)
    yield from of_conditions(quick)
    yield from of_densities(quick)


def measure(case: Case, clock: timing.Clock) -> dict[str, Any]:
    """Seconds of each, in turns, once they are right."""
    scale = float(case.truth.abs().max())
    ways = {"memokern": case.ours, "loop": case.loop, "sweep alone": case.sweep}
    for name in ("memokern", "loop"):
        error = float((ways[name]().double() - case.truth).abs().max()) / scale
        if not error < MOST_ERROR:
            raise AssertionError(f"{case.name}: {name} is off by {error:.1e}")
    times: dict[str, list[tuple[float, bool]]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, call in ways.items():
            times[name].append(clock.time(call, lambda: None))
    seconds = {name: timing.best(found)["seconds"] for name, found in times.items()}
    return {"case": case.name, "seconds": seconds,
            "ratio": seconds["loop"] / seconds["memokern"]}  # fmt: skip


def run(quick: bool) -> Iterator[dict[str, Any]]:
    """The figures of each case, as soon as they are there."""
    clock = timing.Clock(patience=60.0)
    for case in cases(quick):
        yield measure(case, clock)


def line(entry: dict[str, Any]) -> str:
    """The figures of a case in print."""
    times = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in entry["seconds"].items())
    return f"{entry['case']}: {times}; the loop takes {entry['ratio']:.1f} times as long"
