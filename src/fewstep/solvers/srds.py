r"""SRDS: a sample refined in parallel in time (parareal).

The fine grid falls into blocks. One coarse step G per block gives a first guess X_j of the points between them; each iteration
then runs the fine solver F on all blocks at once and sweeps the corrections through,

    X_(j+1) <- F(X_j) + (G(X_j) - G(X_j before)).

Both are DDIM: one step per block and `fine` of them. After p iterations the first p blocks are those of the plain solver, so
after as many iterations as blocks the sample is, and earlier to within the tolerance. It makes more network calls than the plain
solver, but most of them at the same time: worth it where a batch of blocks costs little more than one item.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fewstep.core.batch import like
from fewstep.core.checks import check_counts
from fewstep.core.grid import times_of
from fewstep.core.multistep import Predict, Solver
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.reference import Reference
from fewstep.core.sampler import State
from fewstep.core.schedule import Schedule


class Sweep(NamedTuple):
    """What an iteration leaves: ends of all blocks, where the coarse step led from each start, and who still moves, (N,)."""

    points: tuple[Tensor, ...]
    guesses: tuple[Tensor, ...]
    moving: Tensor


@dataclass(frozen=True)
class SRDS(Solver):
    """Self-refining diffusion sampler: DDIM in steps x fine steps, parallel in time; `steps` items at once for each sample.

    Args:
        steps: blocks, and the most iterations; the paper has as many as fine steps in a block.
        fine: steps of the fine solver in each block.
        tolerance: a sample is done when an iteration moves its end by less than this on average over the coordinates; 0.1 in
            units of 255 by default, 0 never.
        grid: spacing of the times.
    """

    steps: int = 8
    fine: int = 8
    tolerance: float = 0.2 / 255
    grid: str | tuple[float, ...] = "uniform"

    order: ClassVar = 1
    nfe_varies: ClassVar = True
    limit: ClassVar = "DDIM in steps x fine steps to within the tolerance, and with it the prior"
    presets: ClassVar = {"paper": {}, "exact": {"tolerance": 0.0}}
    reference: ClassVar = Reference(
        "Self-Refining Diffusion Samplers: Enabling Parallelization via Parareal Iterations",
        "Selvam, Nikil Roashan and Merchant, Amil and Ermon, Stefano",
        2024,
        "Advances in Neural Information Processing Systems",
        "2412.08292",
    )

    def __post_init__(self) -> None:
        check_counts(self, "fine")
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance must not be negative, got {self.tolerance}")

    @property
    def nfe(self) -> int:
        """See `Sampler`; of all iterations."""
        return self.steps + self.fine * self.steps * (self.steps + 1) // 2 + self.steps * (self.steps - 1) // 2

    def depth(self, iterations: int) -> int:
        """Return the network calls one after another, all blocks of an iteration counting as one."""
        return self.steps + sum(self.fine + self.steps - 1 - k for k in range(iterations))

    def advance(self, problem: Posterior, state: State, k: int, noise: Noise, predict: Predict) -> State:
        """See `Solver`; step k is iteration k + 1, and the point of the state is the end of the last block."""
        times = times_of(self.grid, problem.schedule, self.steps * self.fine)
        ends = times[:: self.fine]

        def coarse(x: Tensor, j: int) -> Tensor:
            return _follow(problem, predict, noise, x, ends[j : j + 2])

        sweep = state.memory or _guess(state.x, coarse, self.steps)
        if not bool(sweep.moving.any()):
            return state
        starts = sweep.points[k:-1]
        # all blocks at once: each is a further sample of every measurement
        many = problem.expand(len(starts))
        inner = times[k * self.fine :].unfold(0, self.fine + 1, self.fine).T.repeat_interleave(len(state.x), 1)
        fine = _follow(many, predict, noise, torch.cat(starts), inner).chunk(len(starts))
        problem.counts.add(many.counts, len(starts))
        points, guesses = [*sweep.points[: k + 1], fine[0]], list(sweep.guesses)
        for j in range(k + 1, self.steps):
            guess = coarse(points[j], j)
            points.append(fine[j - k] + (guess - guesses[j]))
            guesses[j] = guess
        return _settled(sweep, Sweep(tuple(points), tuple(guesses), sweep.moving), self.tolerance)


def _guess(x: Tensor, coarse: Callable[[Tensor, int], Tensor], blocks: int) -> Sweep:
    points = list(itertools.accumulate(range(blocks), coarse, initial=x))
    return Sweep(tuple(points), tuple(points[1:]), torch.ones(len(x), dtype=torch.bool, device=x.device))


def _settled(old: Sweep, new: Sweep, tolerance: float) -> State:
    """Return the state in which samples that had arrived stay where they were."""
    keep = new.moving.reshape(-1, *[1] * (old.points[0].ndim - 1))
    points, guesses = (
        tuple(torch.where(keep, a, b) for a, b in zip(after, before, strict=True))
        for after, before in ((new.points, old.points), (new.guesses, old.guesses))
    )
    change = (points[-1] - old.points[-1]).abs().flatten(1).mean(1)
    return State(points[-1], Sweep(points, guesses, new.moving & (change >= tolerance)))


def _follow(problem: Posterior, predict: Predict, noise: Noise, x: Tensor, times: Tensor) -> Tensor:
    """Return where DDIM leads from `x`, (N, *event), along falling `times`, (S + 1,) or (S + 1, N)."""
    for t, s in itertools.pairwise(times):
        x0 = predict(problem, x, t, noise)
        kept, weight = _ddim(problem.schedule, t, s)
        x = like(kept, x) * x + like(weight, x) * x0
    return x


def _ddim(schedule: Schedule, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights of x_t and of the prediction in x_s, shape of `t`; at s = 0 the prediction is the result."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
    kept = torch.where(s > 0, sigma_s / sigma_t, 0.0)
    return kept, torch.where(s > 0, alpha_s - kept * alpha_t, 1.0)
