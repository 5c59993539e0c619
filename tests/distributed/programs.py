"""What the ranks run: each function gets the group of the ranks that take part."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import memokern
from memokern import Denoiser, TrainingSet, memorization, regularizers, samplers
from memokern.distributed import shard
from memokern.index import build as index_build
from memokern.index import unfinished
from memokern.index.basis import Cosine
from memokern.memorization import distances

NUMBERS = ("mean", "residual", "log_z", "mean_logit", "mean_bias", "weight_sq", "log_density")


# By which distances are multiplied so that float64 cannot hold their squares.
HUGE = 2.0**520


def problem(n: int = 37, d: int = 5, b: int = 6, kind: torch.dtype = torch.float32) -> tuple:
    """Rows and queries of which some tie, some are rows, some are far."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    rows[n // 2] = rows[0]  # a tie over a boundary
    x = torch.randn(b, d, generator=generator, dtype=torch.float64)
    x[0], x[1], x[2] = rows[0], rows[n - 1] + 1e-3, 30 * x[2]
    return rows.to(kind), x.to(kind)


def numbers(found: Any) -> dict[str, Tensor]:
    out = {name: getattr(found, name).detach().double() for name in NUMBERS}
    out["n"] = torch.tensor(float(found.n))
    return out


def posterior(group: Any, options: dict[str, Any], kind: torch.dtype) -> dict[str, Tensor]:
    rows, x = problem(kind=kind)
    data = rows if group == "one" else shard(rows, group)
    options = dict(options)
    bias = options.pop("bias", None)
    if bias is not None and group != "one":
        bias = bias[data.first : data.first + data.n_here]
    return numbers(memokern.posterior(x, data, bias=bias, **options))


def gradients(group: Any, second: bool, sigma: float) -> list[Tensor]:
    """First, or second, derivatives of one loss of everything."""
    rows, x = problem(b=4, kind=torch.float64)
    x[2] /= 20
    given = [x, *(torch.full((4,), v, dtype=torch.float64) for v in (sigma, 0.9, 1.3))]
    given = [v.requires_grad_() for v in given]
    bias = torch.linspace(-1, 1, len(rows), dtype=torch.float64)
    data = TrainingSet(rows)
    if group != "one":
        data = shard(rows, group)
        bias = bias[data.first : data.first + data.n_here]
    bias = bias.clone().requires_grad_()
    p = memokern.posterior(*given[:1], data, *given[1:], bias=bias)
    weights = torch.linspace(0.1, 1, p.mean.numel(), dtype=torch.float64).reshape(p.mean.shape)
    loss = (weights * p.mean).sin().sum() + p.log_density.sum() + p.entropy.sum()
    loss = loss + p.weight_sq.sum() + (weights * p.score).sum() + p.mean_bias.sum()
    inputs = [*given, bias]
    found = torch.autograd.grad(loss, inputs, create_graph=second)
    if second:
        found = torch.autograd.grad(sum(g.sin().sum() for g in found[:4]), given)
    return [g.detach() for g in found]


def labelled(group: Any, **options: Any) -> TrainingSet:
    """The first 120 digits with labels and conditions, as one set or shared."""
    digits = TrainingSet.digits().subset(slice(0, 120))
    c = torch.stack([torch.linspace(-1, 1, 120), torch.arange(120.0) % 7], 1)
    digits = TrainingSet(
        digits.rows.reshape(-1, 8, 8), labels=digits.labels, conditions=c, scale=digits.scale,
        shift=digits.shift, log_weights=torch.linspace(-1, 0, 120),
    )  # fmt: skip
    return digits if group == "one" else shard(digits, group, **options)


def questions(group: Any) -> dict[str, Tensor]:
    """What else is asked of rows, each by its name."""
    data = labelled(group)
    g = torch.Generator().manual_seed(1)
    x = data.gather(torch.arange(3, 9)) + 0.4 * torch.randn(6, 8, 8, generator=g)
    out: dict[str, Tensor] = {}
    near = memokern.nearest(x, data, k=5)
    out |= {"nearest": near.distance, "row": near.index}
    some = torch.tensor([0, 3, -1, 3, 7, 8])
    for name, asked in {
        "label": {"label": 3},
        "labels": {"label": some},
        "condition": {"condition": torch.tensor([0.2, 3.0]), "bandwidth": 0.5},
        "conditions": {"condition": data_conditions(x), "bandwidth": 0.0},
        "leave_out": {"leave_out": torch.tensor([3, 4, 5, 60, -1, 119])},
        "all": {"label": some, "condition": data_conditions(x) + 0.1, "bandwidth": 1.0,
                "leave_out": 5},
    }.items():  # fmt: skip
        found = numbers(memokern.posterior(x, data, 0.5, **asked))
        out |= {f"{name} {k}": v for k, v in found.items()}
    out["draw"] = memokern.draw(x, data, 0.7, generator=torch.Generator().manual_seed(5))
    tied = data.gather(torch.tensor([0, 50]))
    out["draw at 0"] = memokern.draw(tied, data, 0.0, generator=torch.Generator().manual_seed(5))
    sigma = torch.tensor([0.0, 0.5, 1.0, 2.0, 0.0, 1.0])
    here = memokern.row_weights(x, data, sigma)
    here2 = memokern.weights(x, data, sigma)
    out["row_weights"], out["weights"] = whole(data, here), whole(data, here2.T).T
    out["gather"] = data.gather(torch.tensor([[0, 119], [60, 7]]))
    out["item"] = torch.stack([data[0], data[-1]])
    for regularizer in (
        regularizers.Tikhonov(0.1), regularizers.EmpiricalBayes(0.1), regularizers.Temperature(1.0),
        regularizers.GaussianSmoothing(0.1), regularizers.SmoothedBank(0.2),
        regularizers.NoiseUnconditioned(),
    ):  # fmt: skip
        denoiser = Denoiser(data, regularizer=regularizer)
        name = type(regularizer).__name__
        out[name] = denoiser(x, 0.6)
        out[f"{name} labels"] = denoiser(x, 0.6, some, guidance=1.5)
    out["sample"] = samplers.ode(Denoiser(data), 3, steps=5, seed=0).x
    report = memorization.ratio(x, data)
    out["ratio"] = report.value
    out["merged"] = memorization.merged_ratio(x, data, 0.5, k=10).value
    out["collapse"] = memorization.collapse(x, data, own=torch.arange(3, 9)).value
    out["subset"] = memokern.nearest(x, data.subset(slice(10, 90)), 2).index
    out["exact"] = memorization.exact_match(x, data, 0.0).value.double()
    return {k: v.double() for k, v in out.items()}


def data_conditions(x: Tensor) -> Tensor:
    """Conditions that rows have."""
    at = torch.tensor([3, 20, 40, 60, 80, 119])
    return torch.stack([torch.linspace(-1, 1, 120)[at], at % 7.0], 1)


def whole(data: Any, here: Tensor) -> Tensor:
    """What each rank has of its rows, in their order."""
    if not hasattr(data, "ranks"):
        return here
    full = here.new_zeros((data.n, *here.shape[1:]))
    full[data.first : data.first + data.n_here] = here
    return data.ranks.sum([full], "test")[0]


# --- how rows and queries are shared ------------------------------------------------------------


def apart(group: Any, counts: list[int]) -> dict[str, Tensor]:
    """Ranks that have so many rows, of which some have none."""
    rows, x = problem()
    if group == "one":
        data: Any = TrainingSet(rows)
        huge: Any = TrainingSet(rows.double() * HUGE)
    else:
        rank = torch.distributed.get_rank()
        mine = rows[sum(counts[:rank]) :][: counts[rank]]
        data = shard(mine, group, apart=True)
        huge = shard(mine.double() * HUGE, group, apart=True)
    near, far = memokern.nearest(x, data, 30), memokern.nearest(x.double() * HUGE, huge, 30)
    out = numbers(memokern.posterior(x, data, 0.8)) | {"nearest": near.distance, "row": near.index}
    y = x.clone().requires_grad_()
    memokern.log_density(y, data, 0.8).sum().backward()
    z = x.clone().requires_grad_()
    memokern.nearest(z, data, 3).distance.sum().backward()
    draws = memokern.draw(x, data, 1.0, generator=torch.Generator().manual_seed(2))
    exact = memorization.exact_match(x, data, 0.1)
    out |= {"exact": exact.value, "exact row": exact.index}
    out |= {"far": far.distance / HUGE, "far row": far.index}
    return out | {"gradient": y.grad, "of nearest": z.grad, "draw": draws}


def split(group: Any, counts: list[int], sigma: float) -> dict[str, Tensor]:
    """Each rank has so many of the queries."""
    rows, x = problem(b=sum(counts), kind=torch.float64)
    x[2] /= 20
    s = torch.linspace(sigma, 2 * sigma, len(x), dtype=torch.float64)
    data: Any = TrainingSet(rows)
    y = x.clone()
    y[1] *= HUGE
    if group != "one":
        rank = torch.distributed.get_rank()
        mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        x, y, s, data = x[mine], y[mine], s[mine], shard(rows, group, queries="split")
    x, s = x.clone().requires_grad_(), s.clone().requires_grad_()
    p = memokern.posterior(x, data, s)
    loss = p.mean.sin().sum() + p.log_density.sum() + p.entropy.sum()
    first = torch.autograd.grad(loss, [x, s], create_graph=True)
    second = torch.autograd.grad(first[0].sin().sum(), x)[0]
    near = memokern.nearest(x, data, 3)
    (of_nearest,) = torch.autograd.grad(near.distance.square().sum(), x)
    found = {k: v for k, v in numbers(p).items() if k != "n"}
    found |= {"x": first[0], "s": first[1], "xx": second, "row": near.index, "nn": of_nearest}
    y.requires_grad_()
    far = memokern.nearest(y, data, 3)
    (of_far,) = torch.autograd.grad(far.distance.sum(), y)
    huge = (y.detach().abs().amax(-1, keepdim=True) > 1e100).double()
    scale = huge * HUGE + (1 - huge)
    found |= {"far": far.distance / scale, "far row": far.index, "of far": of_far}
    return {k: v.detach().double() for k, v in found.items()}


def from_files(group: Any, folder: str) -> dict[str, Tensor]:
    """The rows of each file, and of a folder that they make together."""
    rows, x = problem()
    out = {}
    for name in ("rows.npy", "rows.safetensors", "parts", "three"):
        data = rows if group == "one" else shard(f"{folder}/{name}", group)
        out |= {f"{name} {k}": v for k, v in numbers(memokern.posterior(x, data, 0.8)).items()}
    return out


def of_dtensor(group: Any) -> dict[str, Tensor]:
    """A DTensor sharded over its rows."""
    rows, x = problem(n=7)
    if group == "one":
        return numbers(memokern.posterior(x, rows, 0.8))
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (4,))
    return numbers(memokern.posterior(x, shard(distribute_tensor(rows, mesh, [Shard(0)])), 0.8))


def indexed(group: Any, folder: str) -> dict[str, Tensor]:
    """Each rank's rows have an index, which is used, saved and read."""
    data: Any = TrainingSet.digits()
    x = data.gather(torch.arange(0, 1700, 17)) + 0.05
    numbers_of = torch.full((len(x),), 0.2, dtype=torch.float64)
    numbers_of[3], numbers_of[4], numbers_of[5] = 0.0, 1e-170, 8.0
    if group != "one":
        data = shard(data, group).build_index()
        data.save(folder)
        data = shard(folder, group)
        assert data.indexed and data.index.n == data.n_here
    out = {}
    method = "dense" if group == "one" else "pruned"
    found = memokern.posterior(x, data, numbers_of, method=method, tol=1e-7)
    out |= dict(numbers(found).items())
    near = memokern.nearest(x, data, 3, method=method)
    return out | {"row": near.index, "distance": near.distance}


def streamed(group: Any, folder: str) -> dict[str, Tensor]:
    """Each rank reads its rows of a file chunk by chunk."""
    rows, x = problem()
    data: Any = rows
    if group != "one":
        data = shard(f"{folder}/rows.npy", group, stream=True)
        data.part = memokern.StreamedSet(data.part.file("a test"), chunk_bytes=80)
    y = x.clone().requires_grad_()
    p = memokern.posterior(y, data, torch.linspace(0.5, 2, len(x)))
    (gradient,) = torch.autograd.grad(p.mean.sin().sum() + p.entropy.sum(), y)
    near = memokern.nearest(x, data, 8)
    draws = memokern.draw(x, data, 1.0, generator=torch.Generator().manual_seed(2))
    exact = memorization.exact_match(x, data, 0.1)
    found = {"gradient": gradient, "row": near.index, "draw": draws}
    return numbers(p) | found | {"exact": exact.value, "exact row": exact.index}


def streamed_here_and_there(group: Any, folder: str) -> dict[str, Tensor]:
    """More queries than are exchanged together, of which a rank without rows sees as many."""
    rows, _ = problem()
    rows, x = rows[:2], rows.repeat(9, 1)
    if group == "one":
        return numbers(memokern.posterior(x, rows, 0.8))
    path = f"{folder}/{torch.distributed.get_rank()}.npy"
    np.save(path, rows.numpy())
    return numbers(memokern.posterior(x, shard(path, group, stream=True), 0.8))


def certified(group: Any, method: str) -> dict[str, Tensor]:
    """Certificates, and what they are of: the true error of the mean for the weight allowed."""
    digits = TrainingSet.digits()
    x = digits.gather(torch.arange(0, 1700, 53)) + 0.1
    sigma = torch.linspace(0.1, 1.2, len(x), dtype=torch.float64)
    sigma[3], sigma[4] = 0.0, 30.0
    data = digits if group == "one" else shard(digits, group).build_index()
    p = memokern.posterior(x, data, sigma, method=method, certificate=True)
    assert p.certificate is not None
    names = ("weight", "mean_error", "score_error", "log_z_error", "rows_kept", "levels")
    found = {name: getattr(p.certificate, name).double() for name in names}
    return found | {"mean": p.mean.double().flatten(1), "log_z": p.log_z}


def split_asked(group: Any, counts: list[int]) -> dict[str, Tensor]:
    """Each rank has queries of its own, with labels, conditions and rows left out."""
    data = labelled(group, queries="split") if group != "one" else labelled("one")
    b = sum(counts)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(b, 8, 8, generator=g)
    label = torch.tensor([3, 5, 3, -1, 0, 9, 3, 1])[:b]
    leave_out = torch.tensor([3, 4, 13, 60, -1, 119, 23, 7])[:b]
    c = torch.stack([torch.linspace(-1, 1, 120)[leave_out], leave_out % 7.0], 1)
    h = torch.linspace(0.5, 2, b, dtype=torch.float64)
    index = torch.arange(10, 10 + b)
    if group != "one":
        rank = torch.distributed.get_rank()
        mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        x, label, leave_out, c, h, index = (v[mine] for v in (x, label, leave_out, c, h, index))
    out = {"gather": data.gather(index).double()}
    if min(counts):
        with mock.patch.object(distances, "COMPARED", 640):  # one sample at a time
            out["merged"] = memorization.merged_ratio(x, data, 0.5, k=10).value
        out["ratio"] = memorization.ratio(x, data).value
    smooth = Denoiser(data, regularizer=regularizers.GaussianSmoothing(0.1))
    for name, asked in {
        "label": {"label": label},
        "left out": {"leave_out": leave_out},
        "condition": {"condition": c, "bandwidth": h},
        "all": {"label": label, "leave_out": leave_out, "condition": c, "bandwidth": h},
    }.items():
        p = memokern.posterior(x, data, 0.7, **asked)
        out |= {f"{name} {k}": v for k, v in numbers(p).items() if k != "n"}
        if name != "left out" and name != "all":
            out[f"smooth {name}"] = smooth(x, 0.7, **asked).double()
    return out


def explained(group: Any) -> list[str]:
    """What a rank says of a call, without the others."""
    rows, x = problem()
    data = shard(rows, group)
    if torch.distributed.get_rank() == 1:
        return []
    found = memokern.explain(x, data, 0.5)
    return [found.strategy, str(found.runs)]


def from_folder(group: Any, folder: str) -> Tensor:
    """How many rows the parts of a folder have."""
    return torch.tensor(shard(folder, group).n)


def saved_again(group: Any, folder: str, how: str) -> dict[str, Tensor]:
    """Other rows, saved in the same folder, which is read then; rank 1 fails to write, or not."""
    data = shard(TrainingSet.digits().subset(slice(0, 50)), group)
    if how == "whole":
        data.save(folder)
    else:

        def broken(*_: Any) -> None:
            raise OSError("no space left")

        patch: Any = contextlib.nullcontext()
        if torch.distributed.get_rank() == 1:
            patch = mock.patch.object(TrainingSet, "save", broken)
        with patch, contextlib.suppress(OSError, RuntimeError):
            data.save(folder)
    return {"n": from_folder(group, folder)}


def resumed(group: Any, folder: str, stops: bool) -> Any:
    """A build that rank 1 stops after some rows; or how many rows one that goes on projects, and
    whether its index is that of one that was not stopped."""
    projected = []
    coordinates = Cosine.coordinates
    odd = torch.distributed.get_rank() == 1

    def counted(self: Any, rows: Tensor) -> Tensor:
        projected.append(len(rows))
        if stops and len(projected) > (5 if odd else 9):
            raise MemoryError("killed")
        return coordinates(self, rows)

    with (
        mock.patch.object(unfinished, "SECONDS", 0.0),
        mock.patch.object(index_build, "CHUNK_ELEMENTS", 64 * 50),
    ):
        data = shard(TrainingSet.digits(), group)
        with mock.patch.object(Cosine, "coordinates", counted):
            data.build_index(resume=folder)
        whole = shard(TrainingSet.digits(), group).build_index()
    names = ("coarse", "fine", "center")
    equal = all(torch.equal(getattr(data.index, v), getattr(whole.index, v)) for v in names)
    return sum(projected), equal
