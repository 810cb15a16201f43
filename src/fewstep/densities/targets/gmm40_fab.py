"""Forty modes in the plane, as published with FAB and iDEM."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fewstep.densities.targets._mixture import Components, GaussianMixture, equal


@dataclass(frozen=True)
class Gmm40Fab(GaussianMixture):
    """Forty equal Gaussians of standard deviation softplus(1) with means U(-40, 40)^2 by torch's generator at seed 0.

    One of three different targets that papers call GMM40: Midgley et al. 2023, arXiv:2208.01893; iDEM, arXiv:2402.06121.
    """

    dim = 2

    def build(self) -> Components:
        """See `GaussianMixture`."""
        means = torch.rand(40, 2, generator=torch.Generator().manual_seed(0))
        return equal((means - 0.5) * 80, math.log1p(math.e))
