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

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core.checks import one_of
from fewstep.core.multistep import Predict, Solver
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.reference import Reference
from fewstep.core.sampler import State
from fewstep.solvers._rejection import RULES, Bounds, Ratio, Walk, bounds_of, passes
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
    limit: ClassVar = (
        "the law behind the ratio as steps grow, by redraw, fresh and restart; backstep, as published, is biased"
    )
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
    def nfe_varies(self) -> bool:  # type: ignore[override]
        """See `Sampler`."""
        return self.ratio is not None and RULES[self.rule].calls

    @property
    def nfe(self) -> int:
        """See `Sampler`; calls of the ratio are not counted."""
        return self.steps * (self.patience if self.nfe_varies else 1)

    def advance(self, problem: Posterior, state: State, k: int, noise: Noise, predict: Predict) -> State:
        """See `Solver`; all samples arrive after step k, however often they have been rejected on their way."""
        if self.ratio is None or self.bounds is None:
            base = DDIM(self.steps, eta=1.0, grid=self.grid)
            return base.advance(problem, State(state.x), k, noise, predict)
        walk = Walk.of(state, problem.schedule, self.times(problem), self.ratio, self.bounds, noise)
        x0 = torch.empty_like(walk.x)
        while len(items := (walk.level <= k).nonzero()[:, 0]):
            walk.refresh(problem, predict, x0, items)
            self._propose(walk, x0[items], items)
        return State(walk.x, (walk.level, walk.log_ratio, walk.proposals))

    def _propose(self, walk: Walk, x0: Tensor, items: Tensor) -> None:
        """Make one proposal for each of `items`, and deal with it."""
        rule, noise, level = RULES[self.rule], walk.streams(items), walk.level[items]
        x_s, last = walk.step(x0, items, noise), walk.times[level + 1] == 0
        walk.proposals[items] += 1
        log_ratio = walk.log_ratio_of(x_s, level + 1)
        kept = passes(rule.log_acceptance(walk, items, log_ratio), noise)
        kept |= last | (walk.proposals[items] + self.steps > self.patience * self.steps)
        walk.stale[items] = rule.calls
        walk.arrive(items[kept], x_s[kept], level[kept] + 1, log_ratio[kept])
        rule.back(walk, items[~kept], x_s[~kept])
