"""Samples that walk the levels of a grid at their own pace, and what happens to those that are rejected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.batch import like
from fewstep.core.noise import Noise
from fewstep.core.schedule import Schedule

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

    def streams(self, items: Tensor) -> Noise:
        """Return the noise of some samples; what the others need has no part in it."""
        return self.noise.part(items.tolist())

    def log_ratio_of(self, x: Tensor, level: Tensor) -> Tensor:
        """Return the log-ratio at a level for each point, (n, *event) and (n,) -> (n,) float64."""
        return self.ratio(x, self.times[level].to(x)).double().cpu()

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
