"""The mixture of nine modes on a grid."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fewstep.densities.targets._mixture import Components, GaussianMixture, equal


@dataclass(frozen=True)
class NineModes(GaussianMixture):
    """Nine equal Gaussians of variance 0.3 at {-5, 0, 5}^2: "gmm" or "grid" (Zhang and Chen 2022, arXiv:2111.15141)."""

    dim = 2

    def build(self) -> Components:
        """See `GaussianMixture`."""
        places = torch.tensor([-5.0, 0.0, 5.0])
        return equal(torch.cartesian_prod(places, places), math.sqrt(0.3))
