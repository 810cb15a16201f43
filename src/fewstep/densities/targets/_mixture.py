"""Mixtures of Gaussians with everything known: log Z = 0, the score, a sampler, moments and the weight of every mode."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.density import TargetDensity, floating
from fewstep.core.noise import Noise


class Components(NamedTuple):
    """weights (M,), that sum to one; means (M, d); roots (M, d), standard deviations, or (M, d, d), Cholesky factors."""

    weights: Tensor
    means: Tensor
    roots: Tensor


class GaussianMixture(TargetDensity):
    """sum_m w_m N(m_m, C_m); subclasses say which."""

    log_z = 0.0

    @abstractmethod
    def build(self) -> Components:
        """Return the components, float64."""

    @cached_property
    def components(self) -> Components:
        """The components, float64."""
        return self.build()

    def log_prob(self, x: Tensor) -> Tensor:
        """See `TargetDensity`."""
        return torch.logsumexp(self._joint(x)[0], 1)

    def score(self, x: Tensor) -> Tensor:
        """See `TargetDensity`: the components' scores weighted by responsibilities."""
        joint, z, inverse = self._joint(x)
        slopes = z * inverse if inverse.ndim == 2 else torch.einsum("mij,nmi->nmj", inverse, z)
        return -(joint.softmax(1)[..., None] * slopes).sum(1)

    def sample(self, noise: Noise) -> Tensor:
        """See `TargetDensity`."""
        chosen = torch.searchsorted(self.components.weights.cumsum(0), noise.rand(1)[:, 0].double().cpu())
        chosen = chosen.clamp_max(len(self.components.weights) - 1)
        z = noise.randn(self.dim)
        means, roots = self.components.means[chosen].to(z), self.components.roots[chosen].to(z)
        return means + (roots * z if roots.ndim == 2 else torch.einsum("nij,nj->ni", roots, z))

    def modes(self, x: Tensor) -> Tensor:
        """Return the component that each item most likely came from, (N, d) -> (N,)."""
        return self._joint(x)[0].argmax(1)

    def expectations(self) -> dict[str, Tensor]:
        """See `TargetDensity`; beside the moments, "mode_weights", (M,)."""
        weights, means, roots = self.components
        own = roots.square() if roots.ndim == 2 else roots.square().sum(-1)
        mean = weights @ means
        return {"mean": mean, "variance": weights @ (own + (means - mean).square()), "mode_weights": weights.clone()}

    def _joint(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log w_m N(x; m_m, C_m), (N, M), the whitened distances z, (N, M, d), and the inverse roots."""
        x, (weights, means, inverse) = floating(x), self._ready
        centred = x[:, None] - means.to(x)
        inverse = inverse.to(x)
        z = centred * inverse if inverse.ndim == 2 else torch.einsum("mij,nmj->nmi", inverse, centred)
        return weights.to(x) - z.square().sum(-1) / 2, z, inverse

    @cached_property
    def _ready(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return log weights with the constants of the Gaussians, (M,), means, and inverse roots."""
        weights, means, roots = self.components
        widths = roots if roots.ndim == 2 else roots.diagonal(dim1=-2, dim2=-1)
        logs = weights.log() - widths.log().sum(1) - self.dim / 2 * math.log(2 * math.pi)
        return logs, means, 1 / roots if roots.ndim == 2 else torch.linalg.inv(roots)


def equal(means: Tensor, width: float) -> Components:
    """Return components of equal weight and standard deviation at `means`, (M, d)."""
    weights = torch.full((len(means),), 1 / len(means), dtype=torch.float64)
    return Components(weights, means.double(), torch.full_like(means, width, dtype=torch.float64))


class Concentric(GaussianMixture):
    """Normal laws around 0, N(0, w^2 I) for each w of `widths`, in equal parts."""

    def __init__(self, dim: int, widths: Sequence[float]) -> None:
        self.dim, self.widths = dim, widths

    def build(self) -> Components:
        """See `GaussianMixture`."""
        roots = torch.tensor(self.widths, dtype=torch.float64)[:, None].repeat(1, self.dim)
        return Components(
            torch.full((len(roots),), 1 / len(roots), dtype=torch.float64), torch.zeros_like(roots), roots
        )
