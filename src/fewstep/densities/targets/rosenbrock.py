"""The Rosenbrock function as an energy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.densities.targets._chain import GaussianChain


@dataclass(frozen=True)
class Rosenbrock(GaussianChain):
    """log rho = log scale - sum_i [100 (x_{i+1} - x_i^2)^2 + (1 - x_i)^2] / flatness (Richter and Berner 2024, arXiv:2307.01198).

    A chain, so log Z, moments and samples are exact; nobody publishes its log Z.

    Args:
        dim: d, at least 2.
        flatness: divides the function.
        scale: multiplies the density.
    """

    dim: int = 15
    flatness: float = 10.0
    scale: float = 1e5

    nodes, free_end = 3801, True

    def __post_init__(self) -> None:
        if self.dim < 2:
            raise ValueError(f"needs two coordinates at least, got dim = {self.dim}: one alone has no normaliser")

    @property
    def low(self) -> float:  # type: ignore[override]
        """See `GaussianChain`: (1 - x_i)^2 / flatness is 36 there, and at `high`."""
        return 1 - 6 * math.sqrt(self.flatness)

    @property
    def high(self) -> float:  # type: ignore[override]
        """See `GaussianChain`."""
        return 1 + 6 * math.sqrt(self.flatness)

    @property
    def width(self) -> float:
        """See `GaussianChain`."""
        return math.sqrt(self.flatness / 200)

    def link(self, x: Tensor) -> Tensor:
        """See `GaussianChain`."""
        return x.square()

    def unary(self, i: int, x: Tensor) -> Tensor:
        """See `GaussianChain`."""
        if i == self.dim - 1:
            return torch.zeros_like(x)
        return (math.log(self.scale) if i == 0 else 0.0) - (1 - x).square() / self.flatness

    def score(self, x: Tensor) -> Tensor:
        """See `TargetDensity`."""
        gap = x[:, 1:] - x[:, :-1].square()
        own = 400 * gap * x[:, :-1] + 2 * (1 - x[:, :-1])
        pad = torch.nn.functional.pad
        return (pad(own, (0, 1)) - 200 * pad(gap, (1, 0))) / self.flatness
