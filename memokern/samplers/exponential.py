r"""The probability flow with both ends in closed form, and an exponential multistep method between.

Let u = x / alpha, p = alpha / sigma, and D the denoiser. The flow is du / dp = (D - u) / p. For a
Gaussian N(m, C) in place of the rows' law, D_g = m + C (C + 1 / p^2)^{-1} (u - m), and in the
eigenbasis of C, with v = (x - alpha m) / sqrt(alpha^2 lambda + sigma^2), the flow of D = D_g + r is

    dv / dp = r / sqrt(1 + lambda p^2)

so that it is solved exactly where r = 0, and is finite from p = 0 on. With lambda = 0 and m = 0
that is d(x / sigma) / dp = D, the integrator of D's values (data prediction).

Both are integrated by the same method: through the values of r at the levels evaluated last goes a
polynomial, whose integral against 1 / sqrt(1 + lambda p^2) is exact up to rounding. It first
predicts the state at the next level; the denoiser is evaluated there; and with this value the step
is taken again. So a step costs one evaluation, and is of the order of the values that it uses.

**The Gaussian part.** At high noise r = K_3(z, z) p^2 / 2 + ..., with K_3 the rows' third cumulant:
the polynomial is one in p^2, and r = 0 at p = 0 is known without an evaluation. The first step goes
from the start to where \|r\| / \|D - m\| is expected to reach `SHARE`, and is repeated from the
start to a higher level if it is found to be 1.5 times that. Where it is more than `SHARE`, or would
be twice that at the next level, the part is left.

**The middle** integrates D, by polynomials in log p.

**The end** is reached, sample by sample, where :mod:`memokern.samplers.closed_end` proves it from
the weights of the evaluation.

Source: exponential integrators (Hochbruck & Ostermann, Acta Numerica 2010); for diffusion, with
lambda = 0, DPM-Solver++ (arXiv 2211.01095), DEIS (2204.13902), and UniPC (2302.04867), whose
corrector costs no evaluation either. The basis of the Gaussian and its free first node, and the
proof of the end, are memokern's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from memokern.denoiser import Denoiser
from memokern.given import Given
from memokern.samplers.base import Denoises, Level, Run, Samples, held, level_of, levels_of
from memokern.samplers.closed_end import ClosedEnd
from memokern.samplers.gaussian import Gaussian, of_samples
from memokern.samplers.gaussian_part import GaussianPart
from memokern.samplers.interpolation import NODES, WEIGHTS, added, lagrange

# Levels of the process's grid for one step asked for: as exact as Heun's method with so many steps.
LEVELS = 4 / 3
# How large |r| / |D - m| may be where the next step integrates r, with 18 steps. On photographs the
# error of the Gaussian part falls with the third power of its size.
SHARE, STEPS, POWER, MOST = 0.2, 18, 0.75, 0.25
# |r| / |D - m| is expected to be this times the largest standard deviation over s.
EXPECTED = 0.25
TRIALS = 3
# How many values are kept; and the log of the step in p above which fewer are trusted.
ORDER = 3
LONG = (0.7, 1.4)


@dataclass(frozen=True)
class Node:
    """An evaluation at a level: D [S, *shape]; r [S, K] where there is a Gaussian."""

    level: Level
    x0: Tensor
    rest: Tensor | None = None

    @property
    def p(self) -> float:
        return self.level.alpha / self.level.sigma

    def take(self, at: Tensor) -> Node:
        rest = None if self.rest is None else self.rest[at]
        return Node(self.level, self.x0[at], rest)


def gaussian_of(denoiser: Denoises, given: Gaussian | bool | None, run: Run) -> Gaussian | None:
    """The Gaussian to start with, or None.

    Raises: TypeError for anything else; ValueError where one is asked for and nothing known.
    """
    if given is False:
        return None
    if isinstance(given, Gaussian):
        if given.mean.shape[-1] != run.x[0].numel():
            raise ValueError(
                f"expected a Gaussian of {run.x[0].numel()} features, got one of"
                f" {given.mean.shape[-1]}"
            )
        return given.to(run.x.device)
    if given is not None and given is not True:
        raise TypeError(
            f"expected gaussian as a samplers.Gaussian, True or False, got {type(given).__name__}"
        )
    plain: Any = denoiser
    label = run.label
    plainly = True
    if isinstance(plain, Given):
        label = plain.label if label is None else label
        plainly = plain.condition is None and plain.guidance in (None, 1)
        plain = plain.denoiser
    if isinstance(plain, Denoiser) and plainly:
        return of_samples(plain.data, label, run.bias, len(run.x))
    if given:
        raise ValueError(
            "the rows that this denoiser stands for are not known: give"
            " gaussian=samplers.Gaussian.fit(data), or leave it out"
        )
    return None


def exponential(
    run: Run,
    steps: int,
    sigma_min: float | None,
    denoise_last: bool,
    gaussian: Gaussian | None,
    finish: bool,
    progress: bool,
) -> Samples:
    """The solver; arguments as :func:`memokern.samplers.ode`."""
    levels = levels_of(run.process, math.ceil(LEVELS * steps), sigma_min, False)
    first, end = levels[0], levels[-1]
    reached = [first]
    with run.gradients(), tqdm(levels[1:], disable=not progress, desc="exponential") as bar:
        flow = _Flow(run, ClosedEnd(run.denoiser, run.bias) if finish else None, end)
        rest, jump = levels[1:], None
        if gaussian is not None:
            share = min(MOST, SHARE * (STEPS / steps) ** POWER)
            jump = flow.leave_noise(gaussian, first, rest, share)
        if jump is not None:
            reached.append(rest[jump])
            rest = rest[jump + 1 :]
            bar.update(jump + 1)
            flow.keep(reached[-1])
        for to in rest:
            if flow.done:
                break
            flow.step(reached[-1], to)
            reached.append(to)
            bar.update()
            flow.keep(to)
        if reached[-1] != end:
            reached.append(end)
            flow.keep(end)
            bar.update(len(levels) - 1 - bar.n)
        run.x = flow.whole(end)
        if end.sigma == 0:
            flow.settle(levels[-2])
        if denoise_last:
            run.phase = "end"
            reached.append(level_of(run.process, run.process.t_data))
            run.x = held(*run.evaluate(run.x, end.t), reached[-1])
            run.keep()
    return run.samples(
        torch.tensor([level.t for level in reached], dtype=torch.float64, device="cpu")
    )


@dataclass(frozen=True)
class _Ended:
    """Samples whose end is known: at [s] int64; the row y and the state x where that was proven
    [s, *shape]; whether the row is exact, or close."""

    at: Tensor
    level: Level
    x: Tensor
    y: Tensor
    exact: Tensor


class _Flow:
    """The state of the solver.

    x [A, *shape] are the samples whose end is not known, of the numbers at [A]; nodes their last
    evaluations. In the Gaussian part the state is kept in the Gaussian's coordinates, and x is made
    of it where it is asked for.
    """

    def __init__(self, run: Run, closed: ClosedEnd | None, end: Level) -> None:
        self.run, self.closed, self.end = run, closed, end
        self.gaussian: GaussianPart | None = None
        self.share = self.size = 0.0
        self._x: Tensor | None = run.x
        self.at = torch.arange(len(run.x), device=run.x.device)
        self.nodes: list[Node] = []
        self.ended: list[_Ended] = []

    @property
    def x(self) -> Tensor:
        if self._x is None:
            assert self.gaussian is not None
            self._x = self.gaussian.values(self.gaussian.z, self.nodes[-1].level)
        return self._x

    @property
    def done(self) -> bool:
        """Whether all ends are known."""
        return len(self.at) == 0

    # --- steps --------------------------------------------------------------------------------

    def leave_noise(
        self, gaussian: Gaussian, now: Level, rest: Sequence[Level], share: float
    ) -> int | None:
        """The first step, to the lowest of these levels where the rest of the Gaussian is small;
        which of them it is. None, and no step, where there is none."""
        self.share, self.gaussian = share, GaussianPart(gaussian, self.x, now)
        aim = EXPECTED * gaussian.top / share
        highest = now.sigma / now.alpha if now.alpha > 0 else math.inf
        for _ in range(TRIALS):
            high = [to.sigma > 0 and aim <= to.sigma / to.alpha < highest for to in rest]
            jump = sum(high) - 1
            if jump < 0:
                break
            state, node, size = self._advance(now, rest[jump])
            if size <= 1.5 * share:
                self._accept(state, node, size)
                return jump
            # |r| / |D - m| grows like p.
            aim = rest[jump].sigma / rest[jump].alpha * size / share
        self._leave_gaussian()
        return None

    def step(self, now: Level, to: Level) -> None:
        """One step; that to sigma = 0 holds D."""
        run = self.run
        if self.gaussian is not None and to.sigma > 0:
            longer = to.alpha / to.sigma * now.sigma / now.alpha
            if self.size * longer > 2 * self.share:
                self._leave_gaussian()
        run.phase = "gaussian" if self.gaussian is not None else "middle"
        if to.sigma == 0 or (not self.nodes and self.gaussian is None):
            found = run.predict(self.x, now.t, self.at)
            if to.sigma == 0 or not now.signal:
                self._x = held(found.x0, found.eps, to)
                return
            self.nodes.append(Node(now, found.x0))
        self._accept(*self._advance(now, to))

    def _advance(self, now: Level, to: Level) -> tuple[Tensor, Node, float]:
        """The state at the next level, as it is kept; the evaluation that it rests on; and how
        large the rest of the Gaussian is there."""
        run, g = self.run, self.gaussian
        if g is not None:
            run.phase = "gaussian"
            old = self.nodes[-ORDER:]
            predict, correct = g.steps(now, to, [n.p for n in old], ORDER)
            rests = [n.rest for n in old if n.rest is not None]
            z = predict(rests)
            x = g.values(z, to)
            self.found = run.predict(x, to.t, self.at)
            rest, size = g.rest(z, self.found.x0, to)
            return correct([*rests, rest]), Node(to, self.found.x0, rest), size
        run.phase = "middle"
        ahead = math.log(to.alpha / to.sigma * now.sigma / now.alpha)
        order = ORDER - sum(ahead > long for long in LONG)
        x = self._by_data(now, to, self.nodes[-order:])
        self.found = run.predict(x, to.t, self.at)
        node = Node(to, self.found.x0)
        return self._by_data(now, to, [*self.nodes[-order:], node]), node, math.inf

    def _leave_gaussian(self) -> None:
        self._x, self.gaussian = self.x, None

    def _accept(self, state: Tensor, node: Node, size: float) -> None:
        """Ends a step with this state; the samples whose end is proven are put aside."""
        self.nodes, self.size = [*self.nodes[1 - ORDER :], node], size
        if self.gaussian is None:
            self._x = state
        else:
            self._x, self.gaussian.z = None, state
        if size > self.share:
            self._leave_gaussian()
        if self.closed is None:
            return
        proven = self.closed.proven(self.found)
        if not bool(proven.any()):
            return
        exact = self.closed.exact(self.found)
        if not (self.end.sigma == 0 and self.closed.plain):
            proven = proven & exact  # where a row that is close would move the end
        here, left = proven.nonzero()[:, 0], (~proven).nonzero()[:, 0]
        mean = self.found.posterior.mean
        self.ended.append(
            _Ended(self.at[here], node.level, self.found.x[here], mean[here], exact[here])
        )
        self.at = self.at[left]
        self._x = None if self._x is None else self._x[left]
        self.nodes = [part.take(left) for part in self.nodes]
        if self.gaussian is not None:
            self.gaussian.take(left)

    def _by_data(self, now: Level, to: Level, nodes: Sequence[Node]) -> Tensor:
        """The step that integrates D, through its values."""
        p = [level.alpha / level.sigma for level in (now, to)]
        length = math.log(p[1] / p[0])
        at = length / 2 * (1 + NODES)
        grown = np.exp(at)  # p over that of now
        through = lagrange([math.log(n.p / p[0]) for n in nodes], at)
        integrals = through @ (WEIGHTS * grown) * (length / 2) / math.expm1(length)
        kept = to.sigma / now.sigma
        factors = ((to.alpha - kept * now.alpha) * integrals).tolist()
        return added(kept * self.x, factors, [n.x0 for n in nodes])

    # --- the end ------------------------------------------------------------------------------

    def whole(self, level: Level) -> Tensor:
        """All samples at a level that was reached, those that are put aside by their closed
        form."""
        if not self.ended:
            return self.x
        parts, order = [self.x], [self.at]
        for group in self.ended:
            assert self.closed is not None
            left = self.closed.left(group.level, level)
            away = group.x - group.level.alpha * group.y
            moved = level.alpha * group.y
            if left > 0:
                moved = moved + (level.alpha * left / group.level.alpha) * away
            parts.append(moved)
            order.append(group.at)
        return torch.cat(parts)[torch.argsort(torch.cat(order))]

    def keep(self, level: Level) -> None:
        """Ends a step of the run's record."""
        if self.run.record is not None:
            self.run.x = self.whole(level)
        self.run.keep()

    def settle(self, lowest: Level) -> None:
        """Puts rows in the place of means that are only close to them."""
        if not self.ended:
            return
        at = torch.cat([group.at[~group.exact] for group in self.ended])
        if len(at) == 0:
            return
        run = self.run
        run.phase = "end"
        scale = self.end.alpha
        found = run.predict(run.x[at] * (lowest.alpha / scale), lowest.t, at)
        run.x = run.x.index_copy(0, at, scale * found.x0)
        if run.record is not None:
            run.record[-1] = run.x
