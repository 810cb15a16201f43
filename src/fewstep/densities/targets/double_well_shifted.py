"""One double well that is not centred."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fewstep.core.density import TargetDensity
from fewstep.core.noise import Noise
from fewstep.densities.targets._line import Line


@dataclass(frozen=True)
class DoubleWellShifted(TargetDensity):
    """log rho = -((x - shift)^2 - delta)^2 in one dimension (Richter and Berner 2024, arXiv:2307.01198).

    Args:
        shift: the middle between the wells.
        delta: the wells lie at shift +- sqrt(delta).
    """

    shift: float = 1.5
    delta: float = 2.0

    dim = 1

    @cached_property
    def line(self) -> Line:
        """The law."""
        far = (self.delta + 7) ** 0.5
        return Line(lambda x: self.log_prob(x[:, None]), self.shift - far, self.shift + far)

    @cached_property
    def log_z(self) -> float:  # type: ignore[override]
        """See `TargetDensity`: by quadrature."""
        return self.line.log_mass

    def log_prob(self, x: Tensor) -> Tensor:
        """See `TargetDensity`."""
        return -((x - self.shift).square() - self.delta).square().sum(1)

    def score(self, x: Tensor) -> Tensor:
        """See `TargetDensity`."""
        return -4 * (x - self.shift) * ((x - self.shift).square() - self.delta)

    def sample(self, noise: Noise) -> Tensor:
        """See `TargetDensity`."""
        return self.line.quantile(noise.rand(1))

    def expectations(self) -> dict[str, Tensor]:
        """See `TargetDensity`."""
        variance = self.line.mean(lambda x: (x - self.shift).square())
        return {
            "mean": torch.tensor([self.shift], dtype=torch.float64),
            "variance": torch.tensor([variance], dtype=torch.float64),
        }
