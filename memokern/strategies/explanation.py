"""Who would run a call, and why the others would not."""

from __future__ import annotations

from dataclasses import dataclass

from memokern.backends import protocol
from memokern.backends.protocol import Answer, Call
from memokern.calls import Query, Rows
from memokern.calls.checks import name_of
from memokern.index.index import Index
from memokern.ops.flat import tensors
from memokern.util import env
from memokern.util.torch_internals import traced, under_transform


@dataclass(frozen=True)
class Explanation:
    """What :func:`memokern.explain` found; its text is made for reading.

    Attributes:
        operation: of the dense sweep, "posterior" or "nearest". strategy: whether rows are pruned,
            and why. call: what the backends looked at. backends: their answers, the preferred ones
            first. runs: the name of the one that runs the call, None where all that were asked
            refuse it.
    """

    operation: str
    strategy: str
    call: Call
    backends: tuple[Answer, ...]
    runs: str | None

    def __str__(self) -> str:
        c = self.call
        asked = f"{c.b} queries of {name_of(c.x)} on {c.n} rows [{c.dim}] of "
        asked += f"{name_of(c.rows)}, {c.device}" + (f", k = {c.k}" if c.k else "")
        lines = [f"{self.operation}: {asked}", f"strategy: {self.strategy}"]
        for answer in self.backends:
            if answer.name == self.runs:
                verdict = f"runs it: {answer.detail}"
            elif answer.runs:
                verdict = "could run it, and is not asked"
            else:
                verdict = f"does not: {answer.detail}"
            lines.append(f"  {answer.name:<10} {verdict}")
        if self.runs is None:
            lines.append(f"  {env.BACKEND}={env.backend()} asks for one that does not: an error")
        return "\n".join(lines)


def explain(query: Query, rows: Rows, index: Index | None, method: str, k: int) -> Explanation:
    """Of a posterior, or of the k nearest rows where k > 0."""
    operation = "nearest" if k else "posterior"
    every = tensors(query, rows)
    transform = under_transform(*every)
    call = Call.of(query.x, rows.data, k, transform=transform, own_bias=query.own_bias)
    answers = tuple(protocol.explain(operation, call))
    try:
        runs: str | None = protocol.choose(operation, call).name
    except RuntimeError:
        runs = None
    return Explanation(operation, _strategy(query, index, method, every), call, answers, runs)


def _strategy(query: Query, index: Index | None, method: str, every: tuple[object, ...]) -> str:
    if method == "dense":
        return "dense, as asked"
    if index is None:
        return "dense: the data have no index (TrainingSet.build_index makes one)"
    if query.weighting != "gaussian":
        return f"dense: the index has no bounds for weighting {query.weighting!r}"
    if under_transform(*every) or traced(*every):  # type: ignore[arg-type]
        return "dense: rows cannot be selected under a transform, a compiler or a graph's capture"
    if method == "pruned":
        return (
            f"pruned, as asked, with the {index.basis} index; sigma = 0 and NaN are swept densely"
        )
    return f"pruned with the {index.basis} index, or dense, whichever is faster for each query"
