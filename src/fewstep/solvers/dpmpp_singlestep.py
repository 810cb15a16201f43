"""DPM-Solver++, single step: no history, inner points within each step (algorithm 1 of the paper, and its third-order kin)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core.checks import one_of
from fewstep.core.multistep import X0, MultistepSolver, Point, Stage, midpoint, row
from fewstep.core.schedule import Schedule
from fewstep.solvers._references import DPM_SOLVER_PP


@dataclass(frozen=True)
class SinglestepDPMSolverPP(MultistepSolver):
    """DPM-Solver++ (1, 2S, 3S).

    Args:
        steps: steps, of `order` network calls each and of one at the last.
        order: 1 (DDIM), 2 (2S) or 3 (3S).
        grid: spacing of the times.
    """

    steps: int = 10
    order: int = 2
    grid: str | tuple[float, ...] = "log_snr"

    form: ClassVar = X0
    limit: ClassVar = "the prior as steps grow"
    reference: ClassVar = DPM_SOLVER_PP

    def __post_init__(self) -> None:
        one_of("order", self.order, SCHEMES)

    def stages(self, schedule: Schedule, nodes: Sequence[Point], s: Point) -> Sequence[Stage]:
        """See `MultistepSolver`."""
        return SCHEMES[self.order](schedule, nodes[0], s)


def first(schedule: Schedule, t: Point, s: Point) -> Sequence[Stage]:
    """Return DDIM's step."""
    return [row(X0, t, s, (-torch.expm1(t.log_snr - s.log_snr),))]


def third(schedule: Schedule, t: Point, s: Point) -> Sequence[Stage]:
    """Return the third-order step with inner points at h / 3 and 2 h / 3: each row is linear through t and the newest."""
    h = s.log_snr - t.log_snr
    one, two = (Point.at_ratio(schedule, torch.exp(-t.log_snr - share * h)) for share in (1 / 3, 2 / 3))
    (late, early), (last, start) = _linear(2 * h / 3, 1 / 2), _linear(h, 2 / 3)
    return [
        row(X0, t, one, (-torch.expm1(-h / 3),)),
        row(X0, t, two, (late, early), back=1),
        row(X0, t, s, (last, 0.0, start), back=2),
    ]


def _linear(h: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return the weights, over a step h, of predictions at its share `share` and at its start, between which D is linear."""
    p1 = torch.expm1(-h)
    inner = (p1 / h + 1) / share
    return inner, -p1 - inner


SCHEMES = {1: first, 2: midpoint, 3: third}
