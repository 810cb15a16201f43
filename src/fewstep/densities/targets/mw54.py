"""Five double wells."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.densities.targets._wells import DoubleWells


@dataclass(frozen=True)
class MW54(DoubleWells):
    """log rho = -sum (x_i^2 - 4)^2, five coordinates, 32 equal modes: "MW" (Wu et al. 2020, arXiv:2002.06707; arXiv:2307.01198).

    Args:
        dim: d.
        wells: how many coordinates have two wells, the others being N(0, 1).
        delta: the wells lie at +-sqrt(delta).
    """

    dim: int = 5
    wells: int = 5
    delta: float = 4.0
