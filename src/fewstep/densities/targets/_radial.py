"""Laws on R^d that depend on the radius alone."""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from fewstep.core.density import TargetDensity
from fewstep.core.noise import Noise
from fewstep.densities.targets._line import Line


class Radial(TargetDensity):
    """rho(x) = g(|x|): the radius has density proportional to r^(d-1) g(r), the direction is uniform.

    Attributes:
        reach: a radius beyond which the mass is negligible.
    """

    reach: float

    @abstractmethod
    def profile(self, r: Tensor) -> Tensor:
        """Return log g(r), of the shape of `r`."""

    @cached_property
    def line(self) -> Line:
        """The law of the radius."""
        power = torch.tensor(self.dim - 1.0, dtype=torch.float64)
        return Line(lambda r: torch.xlogy(power, r) + self.profile(r), 0.0, self.reach, 200_001)

    @cached_property
    def log_z(self) -> float:  # type: ignore[override]
        """See `TargetDensity`: the surface of the unit sphere times an integral over the radius."""
        surface = math.log(2) + self.dim / 2 * math.log(math.pi) - math.lgamma(self.dim / 2)
        return surface + self.line.log_mass

    def log_prob(self, x: Tensor) -> Tensor:
        """See `TargetDensity`."""
        return self.profile(torch.linalg.vector_norm(x, dim=1))

    def sample(self, noise: Noise) -> Tensor:
        """See `TargetDensity`."""
        direction = torch.nn.functional.normalize(noise.randn(self.dim), dim=1)
        return self.line.quantile(noise.rand(1)) * direction

    def expectations(self) -> dict[str, Tensor]:
        """See `TargetDensity`."""
        variance = torch.full((self.dim,), self.line.mean(torch.square) / self.dim, dtype=torch.float64)
        return {"mean": torch.zeros_like(variance), "variance": variance}
