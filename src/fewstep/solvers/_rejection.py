"""Samples that walk the levels of a grid at their own pace, and what happens to those that are rejected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from fewstep.core.batch import like
from fewstep.core.counts import Counts
from fewstep.core.kernel import bridge, combine, epsilon_of
from fewstep.core.multistep import Predict, Solver, prior_mean
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.sampler import State
from fewstep.core.schedule import Schedule
from fewstep.solvers.ddim import DDIM

Ratio = Callable[[Tensor, Tensor], Tensor]  # (x_t, t), (N, *event) and (N,) -> log q_t(x_t) / p_t(x_t), (N,)


class Bounds(NamedTuple):
    """Bounds of the log-ratio at each time of the grid from t = 1 on, and of its growth in the step that leads there."""

    value: tuple[float, ...]
    growth: tuple[float, ...]


@dataclass
class Walk:
    """N samples on their way.

    Attributes:
        x: where they are, (N, *event).
        level: how many steps of the grid they have done, (N,).
        log_ratio: of the points where they are, (N,) float64.
        proposals: how many each has made in all, (N,).
        stale: whether the prediction of x_0 is not that at x, (N,).
    """

    schedule: Schedule
    times: Tensor
    ratio: Ratio
    bounds: Bounds
    noise: Noise
    x: Tensor
    level: Tensor
    log_ratio: Tensor
    proposals: Tensor
    stale: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.stale = torch.ones(len(self.x), dtype=torch.bool)

    @classmethod
    def of(cls, state: State, schedule: Schedule, times: Tensor, ratio: Ratio, bounds: Bounds, noise: Noise) -> Self:
        """Return the walk that goes on from a state; at the start its memory is empty."""
        x, count = state.x.clone(), len(state.x)
        if state.memory is not None:
            return cls(schedule, times, ratio, bounds, noise, x, *(value.clone() for value in state.memory))
        level = torch.zeros(count, dtype=torch.long)
        log_ratio = ratio(x, times[level].to(x)).double().cpu()
        return cls(schedule, times, ratio, bounds, noise, x, level, log_ratio, torch.zeros_like(level))

    def streams(self, items: Tensor) -> Noise:
        """Return the noise of some samples; what the others need has no part in it."""
        return self.noise.part(items.tolist())

    def log_ratio_of(self, x: Tensor, level: Tensor) -> Tensor:
        """Return the log-ratio at a level for each point, (n, *event) and (n,) -> (n,) float64."""
        return self.ratio(x, self.times[level].to(x)).double().cpu()

    def refresh(self, problem: Posterior, predict: Predict, x0: Tensor, items: Tensor) -> None:
        """Put predictions of x_0 into `x0`, (N, *event), for those of `items` that lack one, at the cost of their share."""
        items = items[self.stale[items]]
        if len(items):
            some = replace(problem, cond=problem.cond_with(lambda value: value[items]), counts=Counts())
            x0[items] = predict(some, self.x[items], self.times[self.level[items]], self.streams(items))
            problem.counts.add(some.counts, len(items) / len(x0))

    def step(self, x0: Tensor, items: Tensor, noise: Noise) -> Tensor:
        """Return a draw of the next point given x_t and its prediction, (n, *event); at t = 0 the prediction."""
        x, t, s = self.x[items], self.times[self.level[items]], self.times[self.level[items] + 1]
        shares, epsilon = bridge(self.schedule, t, s, 1.0), epsilon_of(self.schedule, t, x, x0)
        return torch.where(like(s, x0) > 0, combine(self.schedule, s, x0, epsilon, shares, noise), x0)

    def arrive(self, items: Tensor, x: Tensor, level: Tensor, log_ratio: Tensor) -> None:
        """Put some samples where they belong."""
        self.x[items], self.level[items], self.log_ratio[items], self.stale[items] = x, level, log_ratio, True

    def restart(self, items: Tensor) -> None:
        """Draw some samples afresh at t = 1."""
        if not len(items):
            return
        x = like(self.schedule(self.times[:1])[1], self.x) * self.streams(items).randn(*self.x.shape[1:])
        level = torch.zeros_like(items)
        self.arrive(items, x, level, self.log_ratio_of(x, level))


def passes(log_probability: Tensor, noise: Noise) -> Tensor:
    """Return for each item whether it passes with this probability, (N,) -> (N,)."""
    return noise.rand(1)[:, 0].double().cpu().log() < log_probability


def stay(walk: Walk, items: Tensor, rejected: Tensor) -> None:
    """Draw again from the same x_t: its prediction still serves."""


def begin_again(walk: Walk, items: Tensor, rejected: Tensor) -> None:
    """Begin again at t = 1."""
    walk.restart(items)


def step_back(walk: Walk, items: Tensor, rejected: Tensor) -> None:
    """Put noise back on what was rejected until it passes as a sample of its level; at t = 1 begin again."""
    x, level = rejected, walk.level[items]
    while len(items):
        noise = walk.streams(items)
        x = _noised(walk.schedule, x, walk.times[level + 1], walk.times[level], noise)
        log_ratio = walk.log_ratio_of(x, level)
        passed = passes(log_ratio - torch.tensor(walk.bounds.value).double()[level], noise)
        walk.arrive(items[passed], x[passed], level[passed], log_ratio[passed])
        walk.restart(items[~passed & (level == 0)])
        left = ~passed & (level > 0)
        items, x, level = items[left], x[left], level[left] - 1


def _noised(schedule: Schedule, x_s: Tensor, s: Tensor, t: Tensor, noise: Noise) -> Tensor:
    """Return a draw of q(x_t | x_s) for t > s, (N, *event)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule(t), schedule(s)
    std = (sigma_t.square() - (alpha_t / alpha_s * sigma_s).square()).clamp_min(0).sqrt()
    return like(alpha_t / alpha_s, x_s) * x_s + like(std, x_s) * noise.randn_like(x_s)


def by_value(walk: Walk, items: Tensor, log_ratio: Tensor) -> Tensor:
    """Return log L_s - b_s, (n,)."""
    return log_ratio - torch.tensor(walk.bounds.value).double()[walk.level[items] + 1]


def by_growth(walk: Walk, items: Tensor, log_ratio: Tensor) -> Tensor:
    """Return log L_s - log L_t - g_s, (n,)."""
    return log_ratio - walk.log_ratio[items] - torch.tensor(walk.bounds.growth).double()[walk.level[items] + 1]


def by_last_value(walk: Walk, items: Tensor, log_ratio: Tensor) -> Tensor:
    """Return log L_s - b_s at the last noisy time of the grid and 0 before, (n,)."""
    last = int((walk.times > 0).sum()) - 1
    return torch.where(walk.level[items] + 1 == last, by_value(walk, items, log_ratio), 0.0)


class Rule(NamedTuple):
    """What a step is tested for, and what follows a rejection.

    Attributes:
        log_acceptance: (walk, items, log L_s) -> log of the probability to accept their steps.
        back: what follows a rejection.
        calls: whether the proposal after it costs a network call.
    """

    log_acceptance: Callable[[Walk, Tensor, Tensor], Tensor]
    back: Callable[[Walk, Tensor, Tensor], None]
    calls: bool


RULES = {
    "redraw": Rule(by_value, stay, False),
    "fresh": Rule(by_value, stay, True),
    "restart": Rule(by_last_value, begin_again, True),
    "backstep": Rule(by_growth, step_back, True),
}


@torch.no_grad()
def bounds_of(solver: Solver, problem: Posterior, ratio: Ratio, noise: Noise, share: float = 1.0) -> Bounds:
    """Return bounds of a ratio from a run without rejection.

    Args:
        solver: whose steps and grid count.
        problem: the prior with a `FlatLikelihood` of N items; the paper runs ten batches.
        ratio: see `DiffRS`.
        noise: N streams.
        share: the quantile that is taken, the paper's gamma; 1 is the largest seen, which exact rules need to hold.
    """
    plain = DDIM(solver.steps, eta=1.0, grid=solver.grid)
    state, seen = plain.init(problem, noise), []
    for k, t in enumerate(plain.times(problem)):
        seen.append(ratio(state.x, t.to(state.x).expand(len(state.x))).double().cpu())
        state = plain.advance(problem, state, k, noise, prior_mean) if k < plain.steps else state
    values = torch.stack(seen)
    growth = torch.cat([torch.zeros_like(values[:1]), values.diff(dim=0)])
    quantiles = (torch.quantile(side, share, dim=1) for side in (values, growth.clamp_min(0)))
    return Bounds(*(tuple(side.tolist()) for side in quantiles))
