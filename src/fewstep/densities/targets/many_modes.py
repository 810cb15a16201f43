"""Many unequal modes in many dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewstep.core.noise import Streams
from fewstep.densities.targets._mixture import Components, GaussianMixture


@dataclass(frozen=True)
class ManyModes(GaussianMixture):
    """n Gaussians of variance 1/2, means U(-n, n)^d, weights from 1 to 3 evenly in the logarithm.

    Noble et al. 2025, arXiv:2410.19449: the published law of mixtures, drawn from `seed`; not the published draw.

    Args:
        dim: d; published for 8 to 128.
        count: n.
        seed: of the means.
    """

    dim: int = 32
    count: int = 16
    seed: int = 0

    def build(self) -> Components:
        """See `GaussianMixture`."""
        means = self.count * (2 * Streams(self.seed, range(self.count), torch.float64).rand(self.dim) - 1)
        weights = torch.logspace(0, 1, self.count, base=3, dtype=torch.float64)
        return Components(weights / weights.sum(), means, torch.full_like(means, 0.5**0.5))
