"""Neal's funnel."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.density import TargetDensity
from fewstep.core.noise import Noise


@dataclass(frozen=True)
class Funnel(TargetDensity):
    """x_1 ~ N(0, 9), x_2, ..., x_d | x_1 ~ N(0, e^{x_1}): Neal 2003, Ann. Statist. 31(3), section 8.

    Its samples are exact; some benchmarks clip theirs to [-30, 30] and not the density, and then fit another law.

    Args:
        dim: d, at least 2.
    """

    dim: int = 10

    log_z = 0.0

    def __post_init__(self) -> None:
        if self.dim < 2:
            raise ValueError(f"the funnel needs dim >= 2, got {self.dim}")

    def log_prob(self, x: Tensor) -> Tensor:
        """See `TargetDensity`."""
        head, rest = x[:, 0], x[:, 1:].square().sum(1)
        quadratic = head.square() / 18 + rest * torch.exp(-head) / 2 + (self.dim - 1) * head / 2
        return -quadratic - math.log(3) - self.dim / 2 * math.log(2 * math.pi)

    def score(self, x: Tensor) -> Tensor:
        """See `TargetDensity`."""
        head, rest = x[:, :1], x[:, 1:]
        narrow = torch.exp(-head)
        first = -head / 9 + (rest.square().sum(1, keepdim=True) * narrow - (self.dim - 1)) / 2
        return torch.cat([first, -rest * narrow], 1)

    def sample(self, noise: Noise) -> Tensor:
        """See `TargetDensity`."""
        z = noise.randn(self.dim)
        head = 3 * z[:, :1]
        return torch.cat([head, torch.exp(head / 2) * z[:, 1:]], 1)

    def expectations(self) -> dict[str, Tensor]:
        """See `TargetDensity`: E x_i^2 = e^{9/2} for i > 1."""
        variance = torch.full((self.dim,), math.exp(4.5), dtype=torch.float64)
        variance[0] = 9
        return {"mean": torch.zeros(self.dim, dtype=torch.float64), "variance": variance}
