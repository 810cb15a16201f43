r"""DiffRS: ancestral sampling whose steps are accepted or rejected by the density ratio of data and model.

With L_t(x) = q_t(x) / p_t(x), data over model, q(x_s | x_t) = p(x_s | x_t) L_s(x_s) / L_t(x_t): a step of the model becomes one of
the data by rejection. Four rules, where b_s bounds log L_s and g_s bounds log L_s - log L_t:

* redraw:   accept with probability L_s / e^(b_s), else draw x_s again from the same x_t. Exact for bounds that hold; e^(b_s) draws
            a step on average, and no network call for any but the first.
* fresh:    the same with a network call for each, which a prediction that is itself a draw of x_0 needs.
* restart:  walk down untested, accept the last noisy point with probability L_s / e^(b_s), else begin again at t = 1. Exact for
            bounds that hold; e^(b_s) runs on average.
* backstep: the published rule. Accept with probability L_s / (L_t e^(g_s)), with quantiles for bounds; else put noise back on what
            was rejected and accept it one level up with probability L_t / e^(b_t), else go up another level. It is biased: what
            was rejected stays the parent of what follows.

The step to t = 0 is deterministic and not tested. Without a ratio nothing is rejected, and this is ancestral DDIM.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core.batch import like
from fewstep.core.kernel import bridge, combine, epsilon_of
from fewstep.core.likelihood import Counts
from fewstep.core.multistep import Predict, Solver, one_of, prior_mean
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.reference import Reference
from fewstep.core.sampler import State
from fewstep.solvers._rejection import RULES, Bounds, Ratio, Walk, passes
from fewstep.solvers.ddim import DDIM

__all__ = ["Bounds", "DiffRS", "bounds_of"]


@dataclass(frozen=True)
class DiffRS(Solver):
    """Diffusion rejection sampling.

    Args:
        steps: levels of the grid.
        rule: redraw, fresh, restart or backstep.
        patience: the most proposals of a sample, in multiples of `steps`; near them whatever comes is accepted.
        ratio: (x_t, t), (N, *event) and (N,) -> log of data over model, (N,); a discriminator's logit.
        bounds: of the ratio, see `bounds_of`.
        grid: spacing of the times.
    """

    steps: int = 18
    rule: str = "redraw"
    patience: int = 20
    ratio: Ratio | None = None
    bounds: Bounds | None = None
    grid: str | tuple[float, ...] = "edm"

    order: ClassVar = 1
    undriven: ClassVar = "rejects by a density ratio of the prior, which says nothing of a guided path"
    limit: ClassVar = "the law behind the ratio as steps grow, by redraw, fresh and restart; backstep, as published, is biased"
    presets: ClassVar = {"exact": {}, "paper": {"rule": "backstep", "patience": 3}}
    reference: ClassVar = Reference(
        "Diffusion Rejection Sampling",
        "Na, Byeonghu and Kim, Yeongmin and Park, Minsang and Shin, Donghyeok and Kang, Wanmo and Moon, Il-Chul",
        2024,
        "International Conference on Machine Learning",
        "2405.17880",
    )

    def __post_init__(self) -> None:
        one_of("rule", self.rule, RULES)
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}")
        if self.ratio is not None and (self.bounds is None or {*map(len, self.bounds)} != {self.steps + 1}):
            raise ValueError(f"a ratio must come with bounds at the {self.steps + 1} times of the grid, see bounds_of")

    @property
    def adaptive(self) -> bool:  # type: ignore[override]
        """See `Sampler`."""
        return self.ratio is not None and RULES[self.rule].calls

    @property
    def nfe(self) -> int:
        """See `Sampler`; calls of the ratio are not counted."""
        return self.steps * (self.patience if self.adaptive else 1)

    def advance(self, problem: Posterior, state: State, k: int, noise: Noise, predict: Predict) -> State:
        """See `Solver`; all samples arrive after step k, however often they have been rejected on their way."""
        if self.ratio is None or self.bounds is None:
            base = DDIM(self.steps, eta=1.0, grid=self.grid)
            return base.advance(problem, State(state.x), k, noise, predict)
        x, times = state.x.clone(), self.times(problem)
        level, log_ratio, proposals = state.memory or (
            torch.zeros(len(x), dtype=torch.long),
            self.ratio(x, times[0].to(x).expand(len(x))).double().cpu(),
            torch.zeros(len(x), dtype=torch.long),
        )
        own = [value.clone() for value in (level, log_ratio, proposals)]
        walk = Walk(problem.schedule, times, self.ratio, self.bounds, noise, x, *own)
        x0 = torch.empty_like(x)
        while len(items := (walk.level <= k).nonzero()[:, 0]):
            _refresh(problem, predict, walk, x0, items[walk.stale[items]])
            self._propose(walk, x0[items], items)
        return State(walk.x, (walk.level, walk.log_ratio, walk.proposals))

    def _propose(self, walk: Walk, x0: Tensor, items: Tensor) -> None:
        """Make one proposal for each of `items`, and deal with it."""
        rule, noise, level = RULES[self.rule], walk.streams(items), walk.level[items]
        t, s, x = walk.times[level], walk.times[level + 1], walk.x[items]
        shares, epsilon = bridge(walk.schedule, t, s, 1.0), epsilon_of(walk.schedule, t, x, x0)
        x_s = combine(walk.schedule, s, x0, epsilon, shares, noise)
        x_s = torch.where(like(s, x0) > 0, x_s, x0)
        walk.proposals[items] += 1
        log_ratio = walk.log_ratio_of(x_s, level + 1)
        kept = passes(rule.log_acceptance(walk, items, log_ratio), noise)
        kept |= (s == 0) | (walk.proposals[items] + self.steps > self.patience * self.steps)
        walk.stale[items] = rule.calls
        walk.arrive(items[kept], x_s[kept], level[kept] + 1, log_ratio[kept])
        rule.back(walk, items[~kept], x_s[~kept])


def _refresh(problem: Posterior, predict: Predict, walk: Walk, x0: Tensor, items: Tensor) -> None:
    """Predict x_0 for `items`; a call on some of the samples counts by their share."""
    if len(items):
        some = replace(problem, counts=Counts())
        x0[items] = predict(some, walk.x[items], walk.times[walk.level[items]], walk.streams(items))
        problem.counts.add(some.counts, len(items) / len(x0))


@torch.no_grad()
def bounds_of(solver: DiffRS, problem: Posterior, ratio: Ratio, noise: Noise, share: float = 1.0) -> Bounds:
    """Return bounds of a ratio from a run without rejection.

    Args:
        solver: its steps and grid count.
        problem: the prior with a `FlatLikelihood` of N items; the paper runs ten batches.
        ratio: see `DiffRS`.
        noise: N streams.
        share: the quantile that is taken, the paper's gamma; 1 is the largest seen, which exact rules need to hold.
    """
    plain, times = replace(solver, ratio=None, bounds=None), solver.times(problem)
    state, seen = plain.init(problem, noise), []
    for k in range(solver.steps + 1):
        seen.append(ratio(state.x, times[k].to(state.x).expand(len(state.x))).double().cpu())
        state = plain.advance(problem, state, k, noise, prior_mean) if k < solver.steps else state
    values = torch.stack(seen)
    growth = torch.cat([torch.zeros_like(values[:1]), values.diff(dim=0)])
    quantiles = (torch.quantile(side, share, dim=1) for side in (values, growth.clamp_min(0)))
    return Bounds(*(tuple(side.tolist()) for side in quantiles))
