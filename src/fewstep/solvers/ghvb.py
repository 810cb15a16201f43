r"""GHVB: momentum before the Adams-Bashforth combination, whose coefficients are adapted to it, for even steps.

    v_n = (1 - beta) v_(n-1) + beta epsilon_n,    x_s / alpha_s = x_t / alpha_t + (rho_s - rho_t) / beta sum_j c_j v_(n-j)

The order is kept: at beta = 1 it is Adams-Bashforth, at smaller beta the region of stability grows. Above 2 only where the
schedule starts at a large ratio, as of iPNDM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewstep.core.multistep import EPSILON, Point, Stage, row
from fewstep.core.schedule import Schedule
from fewstep.solvers._momentum import Momentum


@dataclass(frozen=True)
class GHVB(Momentum):
    """Generalised heavy-ball momentum.

    Args:
        steps: network calls.
        level: the paper's fractional order: ceil(level) predictions, beta its fractional part (1 at an integer), up to 5.
        grid: spacing of the times.
    """

    recall: ClassVar = 1
    limit: ClassVar = "the prior as steps grow; of the declared order on grids even in sigma/alpha, else of order 1"

    @property
    def order(self) -> int:
        """See `Solver`."""
        return self.terms

    def on_prediction(self, prediction: Tensor, past: Sequence[Tensor]) -> Tensor:
        """See `MultistepSolver`; the velocity."""
        return past[0].lerp(prediction, self.beta) if past else prediction

    def stages(self, schedule: Schedule, nodes: Sequence[Point], s: Point) -> Sequence[Stage]:
        """See `MultistepSolver`."""
        t = nodes[0]
        weights = _coefficients(min(self.terms, len(nodes)), self.beta)
        return [row(EPSILON, t, s, [(s.ratio - t.ratio) * w / self.beta for w in weights])]


def _coefficients(count: int, b: float) -> list[float]:
    """Return the coefficients of the paper (table of GHVB), newest first."""
    table = {
        1: (1, [b]),
        2: (2, [2 + b, b - 2]),
        3: (12, [18 + 5 * b, 8 * b - 24, 6 - b]),
        4: (24, [46 + 9 * b, 19 * b - 78, 42 - 5 * b, b - 10]),
        5: (720, [1650 + 251 * b, 646 * b - 3420, 2880 - 264 * b, 106 * b - 1380, 270 - 19 * b]),
    }
    divisor, values = table[count]
    return [value / divisor for value in values]
