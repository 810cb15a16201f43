"""Products of one-dimensional laws exp(-(x^2 - delta)^2) and exp(-x^2 / 2)."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from fewstep.core.density import TargetDensity
from fewstep.core.noise import Noise
from fewstep.densities.targets._line import Line


class DoubleWells(TargetDensity):
    """log rho = -sum_{i <= wells} (x_i^2 - delta)^2 - sum_{i > wells} x_i^2 / 2: 2^wells equal modes.

    Attributes:
        wells: how many coordinates have two wells.
        delta: the wells lie at +-sqrt(delta).
    """

    wells: int
    delta: float

    def __post_init__(self) -> None:
        if not 0 <= self.wells <= self.dim:
            raise ValueError(f"of {self.dim} coordinates {self.wells} cannot have two wells")

    @cached_property
    def line(self) -> Line:
        """The law of a coordinate with two wells."""
        far = math.sqrt(self.delta + 7)
        return Line(lambda x: -((x.square() - self.delta) ** 2), -far, far)

    @cached_property
    def log_z(self) -> float:  # type: ignore[override]
        """See `TargetDensity`: by one-dimensional quadrature."""
        return self.wells * self.line.log_mass + (self.dim - self.wells) / 2 * math.log(2 * math.pi)

    def log_prob(self, x: Tensor) -> Tensor:
        """See `TargetDensity`."""
        wells, rest = x[:, : self.wells], x[:, self.wells :]
        return -(wells.square() - self.delta).square().sum(1) - rest.square().sum(1) / 2

    def score(self, x: Tensor) -> Tensor:
        """See `TargetDensity`."""
        wells, rest = x[:, : self.wells], x[:, self.wells :]
        return torch.cat([-4 * wells * (wells.square() - self.delta), -rest], 1)

    def sample(self, noise: Noise) -> Tensor:
        """See `TargetDensity`: quantiles of the wells, normals for the rest."""
        wells = self.line.quantile(noise.rand(self.wells))
        return torch.cat([wells, noise.randn(self.dim)[:, self.wells :]], 1)

    def modes(self, x: Tensor) -> Tensor:
        """Return the mode that each item lies nearest to, (N, d) -> (N,): the signs of its wells, as the bits of a number."""
        return ((x[:, : self.wells] > 0) * 2 ** torch.arange(self.wells, device=x.device)).sum(1)

    def expectations(self) -> dict[str, Tensor]:
        """See `TargetDensity`; beside the moments, "mode_weights", (2^wells,)."""
        variance = torch.ones(self.dim, dtype=torch.float64)
        variance[: self.wells] = self.line.mean(torch.square)
        shares = torch.full((2**self.wells,), 0.5**self.wells, dtype=torch.float64)
        return {"mean": torch.zeros_like(variance), "variance": variance, "mode_weights": shares}
