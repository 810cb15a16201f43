r"""HB: heavy-ball momentum after the Adams-Bashforth combination u, for even steps.

    v_n = (1 - beta) v_(n-1) + beta u_n,    x_s / alpha_s = x_t / alpha_t + (rho_s - rho_t) v_n

v_(n-1) is the last change of x / alpha per rho, so the past points carry it and the table stays linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fewstep.core.multistep import ADAMS, EPSILON, Point, Stage, row
from fewstep.core.schedule import Schedule
from fewstep.solvers._momentum import Momentum


@dataclass(frozen=True)
class HB(Momentum):
    """Heavy-ball momentum on Adams-Bashforth.

    Args:
        steps: network calls.
        level: the paper's fractional order: ceil(level) predictions, beta its fractional part (1 at an integer), up to 5.
        grid: spacing of the times.
    """

    limit: ClassVar = "the prior as steps grow"

    @property
    def order(self) -> int:
        """See `Solver`; momentum brings it to 1, and so does a grid that is not even in sigma/alpha."""
        return int(self.level) if self.level == int(self.level) else 1

    def stages(self, schedule: Schedule, nodes: Sequence[Point], s: Point) -> Sequence[Stage]:
        """See `MultistepSolver`."""
        t, beta = nodes[0], self.beta if len(nodes) > 1 else 1.0
        change = s.ratio - t.ratio
        plain = row(EPSILON, t, s, [beta * change * c for c in ADAMS[min(self.terms, len(nodes))]])
        if beta == 1:
            return [plain]
        last = nodes[1]
        carried = s.alpha * (1 - beta) * change / (t.ratio - last.ratio)
        return [plain._replace(x=(plain.x[0] + carried / t.alpha, -carried / last.alpha))]
