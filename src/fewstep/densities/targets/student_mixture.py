"""A mixture with tails so heavy that it has no variance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fewstep.core.density import TargetDensity, floating
from fewstep.core.noise import Noise
from fewstep.densities.targets._threefry import uniform


@dataclass(frozen=True)
class StudentMixture(TargetDensity):
    """Ten equal products of Student t with 2 degrees of freedom, means U(-10, 10)^d by JAX's PRNGKey(0), as drawn before JAX 0.5.

    "MoS" of Blessing et al. 2024, arXiv:2406.07423. Its mean exists, its variance does not: no Wasserstein-2 distance either.

    Args:
        dim: d.
    """

    dim: int = 50

    log_z = 0.0

    @cached_property
    def means(self) -> Tensor:
        """The centres, (10, d)."""
        return uniform(0, 10, self.dim, -10.0, 10.0)

    def log_prob(self, x: Tensor) -> Tensor:
        """See `TargetDensity`."""
        return torch.logsumexp(self._joint(x), 1) - math.log(10) - self.dim * 1.5 * math.log(2)

    def score(self, x: Tensor) -> Tensor:
        """See `TargetDensity`."""
        x = floating(x)
        centred = x[:, None] - self.means.to(x)
        return -(self._joint(x).softmax(1)[..., None] * 3 * centred / (2 + centred.square())).sum(1)

    def sample(self, noise: Noise) -> Tensor:
        """See `TargetDensity`: the quantile function of t with 2 degrees of freedom is (2u - 1) / sqrt(2u (1 - u))."""
        uniforms = noise.rand(self.dim + 1)
        u = (uniforms[:, 1:] + 2**-25).clamp_max(1 - 2**-24)
        return self.means.to(u)[(uniforms[:, 0] * 10).long()] + (2 * u - 1) / (2 * u * (1 - u)).sqrt()

    def modes(self, x: Tensor) -> Tensor:
        """Return the component that each item most likely came from, (N, d) -> (N,)."""
        return self._joint(x).argmax(1)

    def expectations(self) -> dict[str, Tensor]:
        """See `TargetDensity`; there is no variance."""
        return {"mean": self.means.double().mean(0), "mode_weights": torch.full((10,), 0.1, dtype=torch.float64)}

    def _joint(self, x: Tensor) -> Tensor:
        """Return log p(x | component) up to its constant, (N, 10): a t density is (1 + x^2 / 2)^(-3/2) / (2 sqrt 2)."""
        x = floating(x)
        return -1.5 * torch.log1p((x[:, None] - self.means.to(x)).square() / 2).sum(-1)
