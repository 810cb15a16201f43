"""Forty modes in any dimension, as published by Blessing et al."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.densities.targets._mixture import Components, GaussianMixture, equal
from fewstep.densities.targets._threefry import uniform


@dataclass(frozen=True)
class Gmm40Jax(GaussianMixture):
    """Forty equal Gaussians of unit variance with means U(-40, 40)^d by JAX's PRNGKey(0), as drawn before JAX 0.5.

    One of three different targets that papers call GMM40: Blessing et al. 2024, arXiv:2406.07423, "GMM40-50D" for d = 50.

    Args:
        dim: d.
    """

    dim: int = 50

    def build(self) -> Components:
        """See `GaussianMixture`."""
        return equal(40 * uniform(0, 40, self.dim, -1.0, 1.0), 1.0)
