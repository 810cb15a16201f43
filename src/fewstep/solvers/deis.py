r"""DEIS: Adams-Bashforth on the exponential form, epsilon a Lagrange polynomial through the last few predictions.

The polynomial is in t (the paper's tAB), in rho = sigma / alpha (rhoAB) or in log rho (the form that other libraries ship). The
start is of order 1, 2, ... until there are enough predictions; with one of them it is DDIM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fewstep.core.checks import one_of
from fewstep.core.multistep import EPSILON, VARIABLES, MultistepSolver, Point, Stage, interpolated
from fewstep.core.schedule import Schedule
from fewstep.solvers._references import EXPONENTIAL


@dataclass(frozen=True)
class DEIS(MultistepSolver):
    """Diffusion exponential integrator sampler.

    Args:
        steps: network calls.
        order: predictions that are combined; the paper's tAB3 is order 4.
        variable: what the polynomial is in: t, rho or log_rho.
        grid: spacing of the times.
    """

    steps: int = 10
    order: int = 4
    variable: str = "t"
    grid: str | tuple[float, ...] = "quadratic"

    form: ClassVar = EPSILON
    limit: ClassVar = "the prior as steps grow"
    reference: ClassVar = EXPONENTIAL

    def __post_init__(self) -> None:
        one_of("variable", self.variable, VARIABLES)
        one_of("order", self.order, (1, 2, 3, 4))

    def stages(self, schedule: Schedule, nodes: Sequence[Point], s: Point) -> Sequence[Stage]:
        """See `MultistepSolver`."""
        return [interpolated(EPSILON, schedule, nodes[: self.order], s, VARIABLES[self.variable])]
