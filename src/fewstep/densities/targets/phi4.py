"""The phi^4 model on a chain."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.densities.targets._chain import GaussianChain


@dataclass(frozen=True)
class Phi4(GaussianChain):
    """log rho = -beta [a d / 2 sum_{i=0}^d (x_{i+1} - x_i)^2 + 1 / (a d) sum_i ((1 - x_i^2)^2 / 4 + b x_i)], x_0 = x_{d+1} = 0.

    Gabrie, Rotskoff and Vanden-Eijnden 2022, PNAS 119(10); as a sampling target in Noble et al. 2025, arXiv:2410.19449. A chain, so
    log Z, moments and samples are exact, and with them the ratio of the two modes that papers estimate.

    Args:
        dim: d.
        a: the coupling.
        beta: the inverse temperature.
        b: the local field, which makes the modes unequal.
    """

    dim: int = 100
    a: float = 0.1
    beta: float = 20.0
    b: float = 0.0

    nodes, free_end = 1401, False

    @property
    def high(self) -> float:  # type: ignore[override]
        """See `GaussianChain`: the potential alone has fallen by 36 there."""
        return max(3.5, math.sqrt(1 + 12 * math.sqrt(self.a * self.dim / self.beta)) + abs(self.b))

    @property
    def low(self) -> float:  # type: ignore[override]
        """See `GaussianChain`."""
        return -self.high

    @property
    def width(self) -> float:
        """See `GaussianChain`."""
        return 1 / math.sqrt(self.beta * self.a * self.dim)

    def link(self, x: Tensor) -> Tensor:
        """See `GaussianChain`."""
        return x

    def unary(self, i: int, x: Tensor) -> Tensor:
        """See `GaussianChain`: the potential, and the pull of the ends to zero."""
        ends = (i == 0) + (i == self.dim - 1)
        potential = (1 - x.square()).square() / 4 + self.b * x
        return -self.beta / (self.a * self.dim) * potential - ends * x.square() / (2 * self.width**2)

    def score(self, x: Tensor) -> Tensor:
        """See `TargetDensity`."""
        gaps = torch.nn.functional.pad(x, (1, 1)).diff(dim=1) / self.width**2
        slope = self.beta / (self.a * self.dim) * (x * (1 - x.square()) - self.b)
        return gaps.diff(dim=1) + slope
