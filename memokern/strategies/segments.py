"""Queries that each see a segment of the rows, in one call of the CPU kernels.

A sweep over a few hundred rows takes less than the way to it, so that queries of many labels, each
with a call of its own, would mostly wait for Python.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from memokern.backends.protocol import preferred
from memokern.calls import Query, Rows, Segments, Sums
from memokern.ops.flat import tensors
from memokern.util.torch_internals import undispatched


def swept(query: Query, rows: Rows) -> bool:
    """Whether these queries may each see a segment of the rows: no derivative is asked for, and
    the CPU kernels run."""
    return _kernel() is not None and undispatched(*tensors(query, rows))


def posterior(query: Query, rows: Rows, of: Segments) -> Sums:
    """The sums of each query over its segment, where `swept` says that it can be."""
    run = _kernel()
    assert run is not None
    return run(query, rows, of)


def log_total(bias: Tensor | None, of: Segments) -> Tensor:
    """log sum exp of the biases of each query's segment [B]."""
    if bias is None:
        return (of.end - of.first).to(torch.float64).log()
    ends = zip(of.first.tolist(), of.end.tolist(), strict=True)
    return torch.stack([bias[first:end].logsumexp(0) for first, end in ends])


def _kernel() -> Callable[[Query, Rows, Segments], Sums] | None:
    return getattr(preferred("cpu"), "posterior_segments", None)
