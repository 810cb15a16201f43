"""Sixteen tilted double wells."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fewstep.core.density import TargetDensity
from fewstep.core.noise import Noise
from fewstep.densities.targets._line import Line


@dataclass(frozen=True)
class ManyWell32(TargetDensity):
    """d / 2 copies of -x_1^4 + 6 x_1^2 + x_1 / 2 - x_2^2 / 2: 2^(d/2) unequal modes.

    "ManyWell" of Midgley et al. 2023, arXiv:2208.01893.

    Args:
        dim: d, even; coordinates 0, 2, 4, ... have two wells.
    """

    dim: int = 32

    def __post_init__(self) -> None:
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"the many-well target needs an even dim, got {self.dim}")

    @cached_property
    def line(self) -> Line:
        """The law of a coordinate with two wells."""
        return Line(lambda x: -(x**4) + 6 * x.square() + x / 2, -4.5, 4.5)

    @cached_property
    def log_z(self) -> float:  # type: ignore[override]
        """See `TargetDensity`: by one-dimensional quadrature."""
        return self.dim / 2 * (self.line.log_mass + 0.5 * math.log(2 * math.pi))

    def log_prob(self, x: Tensor) -> Tensor:
        """See `TargetDensity`."""
        wells, rest = x[:, ::2], x[:, 1::2]
        return (wells.square() * (6 - wells.square()) + wells / 2 - rest.square() / 2).sum(1)

    def score(self, x: Tensor) -> Tensor:
        """See `TargetDensity`."""
        wells, rest = x[:, ::2], x[:, 1::2]
        return torch.stack([-4 * wells**3 + 12 * wells + 0.5, -rest], 2).flatten(1)

    def sample(self, noise: Noise) -> Tensor:
        """See `TargetDensity`."""
        pairs = [self.line.quantile(noise.rand(self.dim // 2)), noise.randn(self.dim // 2)]
        return torch.stack(pairs, 2).flatten(1)

    def expectations(self) -> dict[str, Tensor]:
        """See `TargetDensity`; "right_well", the probability that a coordinate with two wells is positive."""
        mean = self.line.mean(lambda x: x)
        variance = self.line.mean(torch.square) - mean**2
        half = torch.ones(self.dim // 2, dtype=torch.float64)
        return {
            "mean": torch.stack([mean * half, 0 * half], 1).flatten(),
            "variance": torch.stack([variance * half, half], 1).flatten(),
            "right_well": torch.tensor(self.line.mean(lambda x: (x > 0).double() + 0.5 * (x == 0))),
        }
