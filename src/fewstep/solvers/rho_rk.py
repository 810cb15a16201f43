r"""rhoRK: explicit Runge-Kutta methods on d(x / alpha) / drho = epsilon: Euler, Heun, Kutta's third and the classical fourth.

In an exploding schedule Heun's is the deterministic sampler of Karras et al. (2022, arXiv:2206.00364, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fewstep.core.checks import one_of
from fewstep.core.multistep import EPSILON, MultistepSolver, Point, Stage, row
from fewstep.core.schedule import Schedule
from fewstep.solvers._references import EXPONENTIAL

# for each order the rows of Butcher's tableau after the first: (where the row leads to, weights of the slopes so far)
TABLEAUS: dict[int, list[tuple[float, tuple[float, ...]]]] = {
    1: [(1.0, (1.0,))],
    2: [(1.0, (1.0,)), (1.0, (1 / 2, 1 / 2))],
    3: [(1 / 2, (1 / 2,)), (1.0, (-1.0, 2.0)), (1.0, (1 / 6, 4 / 6, 1 / 6))],
    4: [(1 / 2, (1 / 2,)), (1 / 2, (0.0, 1 / 2)), (1.0, (0.0, 0.0, 1.0)), (1.0, (1 / 6, 2 / 6, 2 / 6, 1 / 6))],
}


@dataclass(frozen=True)
class RhoRK(MultistepSolver):
    """Runge-Kutta in rho.

    Args:
        steps: steps, of `order` network calls each and of one at the last.
        order: 1 (Euler, which is DDIM), 2 (Heun), 3 (Kutta) or 4 (classical).
        grid: spacing of the times.
    """

    steps: int = 18
    order: int = 2
    grid: str | tuple[float, ...] = "edm"

    form: ClassVar = EPSILON
    limit: ClassVar = "the prior as steps grow"
    reference: ClassVar = EXPONENTIAL

    def __post_init__(self) -> None:
        one_of("order", self.order, TABLEAUS)

    def stages(self, schedule: Schedule, nodes: Sequence[Point], s: Point) -> Sequence[Stage]:
        """See `MultistepSolver`."""
        t, out = nodes[0], []
        for back, (share, weights) in enumerate(TABLEAUS[self.order]):
            end = s if share == 1 else Point.at_ratio(schedule, t.ratio + share * (s.ratio - t.ratio))
            # row() multiplies by alpha at its own end, so the slopes come in as they are
            out.append(row(EPSILON, t, end, [(s.ratio - t.ratio) * w for w in reversed(weights)], back))
        return out
