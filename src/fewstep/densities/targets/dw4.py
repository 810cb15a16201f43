"""Four particles in the plane with double-well pair energies."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewstep.core.density import Bounds
from fewstep.densities.targets._particles import Particles


@dataclass(frozen=True)
class DW4(Particles):
    """E(r) = 0.9 (r - 4)^4 - 4 (r - 4)^2 over the six pairs of four particles in the plane, d = 6.

    Koehler et al. 2020, arXiv:2006.02425; parameters of Akhound-Sadegh et al. 2024, arXiv:2402.06121, but in coordinates of
    centred positions, see `Particles`.
    """

    particles = 4
    space = 2
    log_z_bounds = Bounds(29.63, 29.71, "annealed SMC from N(0, 9 I), three runs of 20000 particles")

    def energy(self, squared: Tensor) -> Tensor:
        """See `Particles`."""
        gap = squared.clamp_min(1e-12).sqrt() - 4
        return 0.9 * gap**4 - 4 * gap.square()
