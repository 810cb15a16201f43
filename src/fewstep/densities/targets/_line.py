"""One-dimensional laws by quadrature: their mass, their moments and their quantiles."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


class Line:
    """The law proportional to exp(log_density) on [low, high], which has to hold all but a negligible part of the mass.

    The trapezoidal rule converges faster than any power of the spacing for a smooth density that vanishes at both ends. The
    quantile function interpolates the distribution function linearly between the nodes.

    Args:
        log_density: (G,) -> (G,), float64.
        low, high: the interval.
        size: nodes.
    """

    def __init__(self, log_density: Callable[[Tensor], Tensor], low: float, high: float, size: int = 20_001) -> None:
        self.x = torch.linspace(low, high, size, dtype=torch.float64)
        log = log_density(self.x)
        density = torch.exp(log - log.max())
        cells = (density[1:] + density[:-1]) / 2 * (self.x[1] - self.x[0])
        self._below = torch.cat([cells.new_zeros(1), cells.cumsum(0)])
        self.log_mass = float(log.max() + self._below[-1].log())
        self._below, self._density = self._below / self._below[-1], density / self._below[-1]

    def mean(self, function: Callable[[Tensor], Tensor]) -> float:
        """Return the expectation of `function`, (G,) -> (G,)."""
        return float(torch.trapezoid(self._density * function(self.x), self.x))

    def quantile(self, u: Tensor) -> Tensor:
        """Return where the distribution function is `u`, of the same shape and dtype."""
        return torch.from_numpy(np.interp(u.double().cpu().numpy(), self._below.numpy(), self.x.numpy())).to(u)
