"""Mixtures of Gaussians drawn at random."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewstep.core.noise import Streams
from fewstep.densities.targets._mixture import Components, GaussianMixture


@dataclass(frozen=True)
class RandomMixture(GaussianMixture):
    """Equal Gaussians with means U(-10, 10)^d and Wishart(d + 2, I) covariances: "MoG" of Blessing et al. 2024, arXiv:2406.07423.

    The same law of mixtures as published, drawn from `seed`; not the published draw, which hangs on versions of JAX and SciPy.

    Args:
        dim: d.
        count: how many components.
        seed: of means and covariances.
    """

    dim: int = 2
    count: int = 10
    seed: int = 0

    def build(self) -> Components:
        """See `GaussianMixture`."""
        streams = Streams(self.seed, range(self.count), torch.float64)
        means = 20 * streams.rand(self.dim) - 10
        factor = streams.randn(self.dim, self.dim + 2)  # sum of d + 2 outer products of N(0, I)
        weights = torch.full((self.count,), 1 / self.count, dtype=torch.float64)
        return Components(weights, means, torch.linalg.cholesky(factor @ factor.mT))
