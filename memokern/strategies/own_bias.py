"""Whether conditions and rows left out that differ from query to query fit one sweep."""

from __future__ import annotations

from torch.compiler import is_compiling

from memokern.backends.protocol import Call, choose
from memokern.calls import Query, Rows
from memokern.ops.flat import tensors
from memokern.util.torch_internals import under_transform


def refusal(query: Query, rows: Rows) -> str | None:
    """Why the backend that sweeps for these queries would not, were each to have a bias of its own;
    None where it would. A compiler cannot follow the choice: there the answer is None."""
    if is_compiling():
        return None
    transform = under_transform(*tensors(query, rows))
    call = Call.of(query.x, rows.data, transform=transform)
    backend = choose("posterior", call)
    reason = backend.refusal("posterior", call._replace(own_bias=True))
    return None if reason is None else f"{backend.name} does not: {reason}"
