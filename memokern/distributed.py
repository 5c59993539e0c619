"""Rows that are shared out over processes: see ``docs/distributed.md``."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memokern.data.sharded import ShardedSet, own_rows
from memokern.data.storage import require_finite
from memokern.data.streamed import StreamedSet
from memokern.data.training_set import TrainingSet
from memokern.util.ranks import Ranks

__all__ = ["ShardedSet", "shard"]


def shard(
    data: TrainingSet | Tensor | np.ndarray | str | os.PathLike[str],
    group: Any = None,
    *,
    queries: str = "replicated",
    apart: bool = False,
    stream: bool = False,
    device: torch.device | str = "cpu",
    timeout: float | None = None,
    check: bool = True,
    **options: Any,
) -> ShardedSet:
    r"""A training set of which each process keeps a part; every function of memokern takes it.

    Each rank sweeps its own rows, and two collectives join what they found: the result is that of
    all rows in one process, but for rounding, at sigma = 0 and with ties over a boundary too.

    Args:
        data: all rows, of which each rank takes its share, in their order: a TrainingSet, tensor or
            array that every rank has; a path that every rank can read, of which each reads its own
            rows only (`.npy` and `.safetensors` are memory-mapped); a folder of such files, which
            follow each other by name, as many files as ranks being one for each. A DTensor
            sharded over its rows stays where it is, on the group of its mesh.
        group: of torch.distributed, initialised; None for all processes.
        queries: "replicated", every rank calls with the same queries and has the whole result; or
            "split", each with its own, also of other numbers or none: they are gathered, swept and
            given back.
        apart: the data are this rank's own rows already, as many as it has, or none.
        stream: each rank reads its rows of a file chunk by chunk, as a
            :class:`memokern.StreamedSet`, and sweeps them on the device.
        timeout: seconds that a rank waits for the others; None for the group's. A rank that dies,
            raises or was asked something else ends the call on all others with an error.
        check: False skips the search for NaN and infinite values in the rank's own rows.
        options: as of :class:`memokern.TrainingSet` (labels, conditions, log_weights, scale, shift,
            shape, key, name).

    Returns: a :class:`ShardedSet`, a TrainingSet whose `n` counts all rows. Row numbers count
        through all ranks; biases, labels, conditions and log weights are those of the rank's rows.

    Raises: RuntimeError without torch.distributed, and where another rank fails; ValueError where
        the ranks' rows differ in type, shape, scale or what belongs to them; as TrainingSet, on all
        ranks.

    Gradients: for x, sigma, alpha, temperature, condition and bandwidth, summed over the ranks
        (twice differentiable); for the bias of the rank's rows. Not for rows. With replicated
        queries, every rank computes the same loss and gets its whole gradient. With split ones the
        loss is the sum of the ranks'.

    Cost: per query 48 bytes from each rank to each, and 8 D (float64: 16 D) bytes summed, behind
        the sweep of the next 256 queries; 1.5 kB per call, with which calls are compared.

    Example:
        >>> import os, tempfile, torch, memokern
        >>> import torch.distributed as dist
        >>> from memokern.distributed import shard
        >>> store = dist.FileStore(os.path.join(tempfile.mkdtemp(), "store"), 1)
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> data = shard(memokern.TrainingSet.digits())
        >>> memokern.posterior(torch.zeros(2, 8, 8), data, 1.0).n
        1797
        >>> dist.destroy_process_group()
    """
    mesh = getattr(data, "device_mesh", None)
    if mesh is not None:
        group, data, apart = *_of_dtensor(data, mesh, group), True
    ranks = Ranks(group, timeout)
    error: Exception | None = None
    mine, n = None, 0
    try:
        mine, n = own_rows(data, ranks, options, apart)
        if stream and n:
            mine = StreamedSet(mine, check=check, device=device)
        elif check and n:
            require_finite(mine.rows)
    except Exception as raised:
        error = raised
    ranks.settle("shard", error)
    assert mine is not None
    return ShardedSet(mine, n, ranks, queries)


def _of_dtensor(data: Any, mesh: Any, group: Any) -> tuple[Any, Tensor]:
    """The group over which a DTensor's rows are sharded, and those that are here."""
    if group is not None:
        raise ValueError("a DTensor brings the group of its mesh: leave out group=")
    if mesh.ndim != 1 or not data.placements[0].is_shard(0):
        raise ValueError(
            "expected a DTensor on a mesh of one dimension, sharded over its rows (Shard(0)), got"
            f" {data.placements} on {mesh.ndim} dimensions: redistribute it"
        )
    rows = data.to_local().detach()
    if math.prod(rows.shape[1:]) != math.prod(data.shape[1:]):  # of a rank without rows
        rows = torch.empty((0, *data.shape[1:]), dtype=rows.dtype, device=rows.device)
    return mesh.get_group(), rows
