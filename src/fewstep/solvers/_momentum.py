"""What the two solvers with momentum share: the fractional order and what it stands for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from fewstep.core.multistep import EPSILON, MultistepSolver
from fewstep.solvers._references import MOMENTUM


@dataclass(frozen=True)
class Momentum(MultistepSolver):
    """Adams-Bashforth with momentum.

    Args:
        steps: network calls.
        level: the paper's fractional order, up to 5.
        grid: spacing of the times.
    """

    steps: int = 20
    level: float = 1.8
    grid: str | tuple[float, ...] = "uniform"

    form: ClassVar = EPSILON
    reference: ClassVar = MOMENTUM

    def __post_init__(self) -> None:
        if not 0 < self.level <= 5:
            raise ValueError(f"level must lie in (0, 5], got {self.level}")

    @property
    def terms(self) -> int:
        """Predictions that are combined."""
        return math.ceil(self.level)

    @property
    def beta(self) -> float:
        """Share of the new in the velocity, 1 at an integer."""
        return 1 - (self.terms - self.level)
