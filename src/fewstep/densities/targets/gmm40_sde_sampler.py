"""Forty modes in the plane, as published with sde_sampler."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fewstep.densities.targets._mixture import Components, GaussianMixture, equal


@dataclass(frozen=True)
class Gmm40SdeSampler(GaussianMixture):
    """Forty equal Gaussians of standard deviation softplus(1) with means U(-40, 40)^2 by torch's generator at seed 42.

    One of three different targets that papers call GMM40: Richter and Berner 2024, arXiv:2307.01198.
    """

    dim = 2

    def build(self) -> Components:
        """See `GaussianMixture`."""
        means = torch.rand(40, 2, generator=torch.Generator().manual_seed(42))
        return equal((means - 0.5) * 80, math.log1p(math.e))
