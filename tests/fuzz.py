"""A differential fuzz: random problems, every operation on every backend and instruction set that
takes it, against the definition in float64.

    make fuzz ARGS="--minutes 10 --seed 3"

A finding is printed as the problem that makes it; the run goes on, and its exit status is 1.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator

import click
import torch

from memokern import TrainingSet, calls
from memokern.calls import Query, Rows
from memokern.strategies import pruned
from tests import cases, compare, harness, oracle
from tests.cases import F32, F64, Case

# Interpreted kernels are given small problems only: multiply-adds of one sweep.
INTERPRETED = 20_000
SIZES = (1, 2, 3, 5, 8, 13, 16, 17, 31, 33, 64, 65, 100, 129, 257, 400)
WIDTHS = (1, 2, 3, 4, 7, 8, 16, 17, 33, 64, 65, 100, 130, 257, 300, 784)


def draw(rng: random.Random, most: int = 1 << 40) -> Case:
    """A problem of at most so many multiply-adds."""
    while (case := _draw(rng)).b * case.n * case.d > most:
        pass
    return case


def _draw(rng: random.Random) -> Case:
    """What is seldom is drawn about one time in five."""
    rows = rng.choice(cases.ROW_TYPES)
    seldom = lambda value, usual: value if rng.random() < 0.2 else usual  # noqa: E731
    return Case(
        b=rng.choice(SIZES),
        n=rng.choice(SIZES),
        d=rng.choice(WIDTHS),
        rows=rows,
        x=seldom(F64, F32),
        sigma=10 ** rng.uniform(-1.5, 1.5),
        alpha=seldom(rng.choice([0.5, -1.0, 0.1]), 1.0),
        temperature=seldom(rng.choice([0.5, 2.0]), 1.0),
        bias=seldom(rng.choice(["normal", "holes", "hole"]), None),
        weighting=seldom("log", "gaussian"),
        known=rng.random() < 0.5,
        offset=seldom(rng.choice([3.0, -10.0]), 0.0),
        repeat=seldom(1e-3, None) if rows != torch.uint8 else None,
        seed=rng.randrange(1 << 30),
    )


def findings(case: Case) -> Iterator[str]:
    """What is wrong with the operations on this problem, if anything."""
    if case.bias == "holes" and case.n == 1:
        return  # no row would be left
    query, rows = case.problem()
    want = oracle.sums(query, rows)
    if not all(torch.isfinite(v).all() for v in want):
        return  # an exact hit of the log weighting
    grads = cases.random_like(cases.basic(want), case.seed)
    pulled = oracle.gradients(query, rows, grads)
    k = min(rows.n, 1 + case.seed % 5)
    near = oracle.nearest(query.x, rows, k)
    for name in (*harness.INSTALLED, *harness.ISAS):
        if name == "triton" and case.b * case.n * case.d > INTERPRETED:
            continue
        kind = compare.unit(name, query, rows)
        for operation, check in _checks(name, kind, query, rows, want, grads, pulled, near).items():
            if harness.refusal(name, operation, query.x, rows, k) is not None:
                continue
            try:
                check()
            except AssertionError as error:
                yield f"{name} {operation}: {str(error).strip().splitlines()[0]}"
    if case.weighting == "gaussian" and rows.dim > 16 and rows.n >= 31:
        yield from _pruned(case, query, rows, want)


def _checks(name, kind, query, rows, want, grads, pulled, near):
    def forward() -> None:
        compare.sums(harness.posterior(name, query, rows), want, query, rows, kind, name)

    def state() -> None:
        half = rows.n // 2
        whole = []
        for at in (slice(0, half), slice(half, None)):
            part = Rows(rows.data[at], rows.scale, rows.shift)
            asked = query if query.bias is None else query._replace(bias=query.bias[at])
            if part.n:
                found = harness.posterior_state(name, asked, part)
                whole.append(found)
        state = whole[0] if len(whole) == 1 else calls.merge(*whole, calls.by_key(query))
        compare.sums(calls.to_sums(state, query), want, query, rows, kind, name)

    def backward() -> None:
        sums = harness.posterior(name, query, rows)
        got = harness.backward(name, query, rows, sums, grads)
        compare.gradients(got, pulled, want, query, kind, name)

    def neighbours() -> None:
        sq, index = harness.nearest(name, query.x, rows, near[0].shape[1])
        torch.testing.assert_close(sq, near[0], rtol=1e-11, atol=0)
        chosen = oracle.squares(query.x, oracle.values(rows)).gather(1, index)
        torch.testing.assert_close(chosen, near[0], rtol=1e-11, atol=0)

    return {
        "posterior": forward,
        "posterior_state": state,
        "posterior_backward": backward,
        "nearest": neighbours,
    }


def _pruned(case: Case, query: Query, rows: Rows, want: calls.Sums) -> Iterator[str]:
    """The certificate of a pruned posterior must hold."""
    data = TrainingSet(rows.data, scale=rows.scale, shift=rows.shift).build_index(progress=False)
    held, index = data.as_rows(), data.index
    assert index is not None
    eps = pruned.weight_allowed(query, held, index, None)
    for name in harness.ON_CPU:
        with harness.preferred(name):
            sums, bounds = pruned.posterior(query, held, index, eps=eps, certificate=True)
        assert bounds is not None
        kind = compare.unit(name, query, rows)
        largest = oracle.values(rows).abs().max().item()
        off = torch.linalg.vector_norm(sums.mean.double() - want.mean, dim=1)
        rounding = math.sqrt(rows.dim) * (compare.MEAN[kind] + 1e-7) * largest
        allowed = bounds.mean_error + rounding
        if bool((off > allowed).any()):
            yield f"{name} pruned: off by {off.max():.3g}, and {allowed.min():.3g} is proven"


@click.command(context_settings={"show_default": True})
@click.option("--minutes", default=1.0, help="How long it runs.")
@click.option("--seed", default=0, help="Of the first problem; the others follow from it.")
def main(minutes: float, seed: int) -> None:
    """Random problems, every backend against the definition in float64."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    end, count, wrong = time.monotonic() + 60 * minutes, 0, 0
    rng = random.Random(seed)
    while time.monotonic() < end:
        case = draw(rng)
        count += 1
        for finding in findings(case):
            wrong += 1
            print(f"{case!r}\n    {finding}", flush=True)
    print(f"{count} problems (seed {seed}), {wrong} findings")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
