r"""iPNDM: DDIM's step with the Adams-Bashforth combination for even steps, whatever the steps are.

Of the declared order only on grids that are even in rho = sigma / alpha; on others of order 1. Above 2 only where the
schedule starts at a large ratio, so that the first steps, with fewer predictions, leave no error that shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fewstep.core.checks import one_of
from fewstep.core.multistep import ADAMS, EPSILON, MultistepSolver, Point, Stage, row
from fewstep.core.schedule import Schedule
from fewstep.solvers._references import EXPONENTIAL


@dataclass(frozen=True)
class IPNDM(MultistepSolver):
    """Improved pseudo numerical method (the variant of the DEIS paper, after Liu et al. 2022, arXiv:2202.09778).

    Args:
        steps: network calls.
        order: predictions that are combined, 1 to 5.
        grid: spacing of the times.
    """

    steps: int = 10
    order: int = 4
    grid: str | tuple[float, ...] = "uniform"

    form: ClassVar = EPSILON
    limit: ClassVar = "the prior as steps grow; of the declared order on grids even in sigma/alpha, else of order 1"
    reference: ClassVar = EXPONENTIAL

    def __post_init__(self) -> None:
        one_of("order", self.order, ADAMS)

    def stages(self, schedule: Schedule, nodes: Sequence[Point], s: Point) -> Sequence[Stage]:
        """See `MultistepSolver`."""
        t, coefficients = nodes[0], ADAMS[min(self.order, len(nodes))]
        return [row(EPSILON, t, s, [(s.ratio - t.ratio) * c for c in coefficients])]
