r"""SDE-DPM-Solver++: the reverse SDE with a linear extrapolation of the prediction.

    x_s = (sigma_s / sigma_t) e^-h x_t + alpha_s (1 - e^-2h) (D_0 + (D_0 - D_-1) / (2 r)) + sigma_s sqrt(1 - e^-2h) z

With one term this is ancestral DDIM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from fewstep.core.checks import one_of
from fewstep.core.multistep import X0, MultistepSolver, Point, Stage
from fewstep.core.schedule import Schedule
from fewstep.solvers._references import DPM_SOLVER_PP


@dataclass(frozen=True)
class SDEDPMSolverPP(MultistepSolver):
    """SDE-DPM-Solver++ (1, 2M).

    Args:
        steps: network calls.
        terms: predictions that are combined, 1 or 2.
        grid: spacing of the times.
    """

    steps: int = 25
    terms: int = 2
    grid: str | tuple[float, ...] = "log_snr"

    form: ClassVar = X0
    limit: ClassVar = "the prior as steps grow; path by path at order 1"
    reference: ClassVar = DPM_SOLVER_PP

    def __post_init__(self) -> None:
        one_of("terms", self.terms, (1, 2))

    @property
    def order(self) -> int:
        """See `Solver`; the weak one. The extrapolated noise of D reaches the law one step late, which costs no order."""
        return self.terms

    def stages(self, schedule: Schedule, nodes: Sequence[Point], s: Point) -> Sequence[Stage]:
        """See `MultistepSolver`."""
        t, h = nodes[0], s.log_snr - nodes[0].log_snr
        share = -torch.expm1(-2 * h)
        weights = [torch.ones_like(h)]
        if self.terms == 2 and len(nodes) > 1:
            half = 0.5 * h / (t.log_snr - nodes[1].log_snr)
            weights = [1 + half, -half]
        x = s.sigma / t.sigma * torch.exp(-h)
        return [Stage(s, (x,), tuple(s.alpha * share * w for w in weights), s.sigma * share.sqrt())]
