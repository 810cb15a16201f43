"""Thirteen Lennard-Jones particles."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewstep.densities.targets._particles import Particles


@dataclass(frozen=True)
class LJ13(Particles):
    """Thirteen particles in space, d = 36: 2 factor (r^-12 - 2 r^-6) over the 78 pairs, and half the squared distances to the mean.

    The factor 2, because Akhound-Sadegh et al. 2024, arXiv:2402.06121, sum over ordered pairs; in coordinates of centred
    positions, see `Particles`.

    Args:
        factor: 1 for that energy; 0.5 for that of Klein et al. 2023, arXiv:2306.15030, and earlier work.
    """

    factor: float = 1.0

    particles = 13
    space = 3

    def energy(self, squared: Tensor) -> Tensor:
        """See `Particles`; the spring to the mean is the sum over pairs of r^2 / (2 n)."""
        inverse = 1 / squared.clamp_min(1e-4) ** 3  # rho is zero to every digit long before
        return 2 * self.factor * inverse * (inverse - 2) + squared / (2 * self.particles)
