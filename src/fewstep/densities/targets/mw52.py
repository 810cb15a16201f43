"""Five double wells among fifty coordinates."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.densities.targets._wells import DoubleWells


@dataclass(frozen=True)
class MW52(DoubleWells):
    """log rho = -sum_{i <= 5} (x_i^2 - 2)^2 - sum_{i > 5} x_i^2 / 2, fifty coordinates, 32 equal modes (arXiv:2307.01198).

    Args:
        dim: d.
        wells: how many coordinates have two wells, the others being N(0, 1).
        delta: the wells lie at +-sqrt(delta).
    """

    dim: int = 50
    wells: int = 5
    delta: float = 2.0
