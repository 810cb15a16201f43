"""The problem that every posterior sampler is called on: a prior, a likelihood, and the count of what they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fewstep.core.batch import like
from fewstep.core.denoiser import Denoiser
from fewstep.core.likelihood import Counts, GaussianLikelihood, Likelihood
from fewstep.core.schedule import Schedule

Pullback = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Posterior:
    """p(x | y) = p(x) p(y | x) / p(y).

    Args:
        prior: the diffusion prior.
        likelihood: the likelihood of B measurements.
        cond: extra inputs of the denoiser (a class label, say); tensors of B entries have one for each measurement.
    """

    prior: Denoiser
    likelihood: Likelihood
    cond: dict[str, Any] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts, repr=False, compare=False)

    @property
    def schedule(self) -> Schedule:
        """The schedule of the prior."""
        return self.prior.schedule

    @property
    def gaussian(self) -> GaussianLikelihood:
        """The likelihood, for methods that need "gaussian".

        Raises:
            TypeError: it is not linear-Gaussian.
        """
        if not isinstance(self.likelihood, GaussianLikelihood):
            raise TypeError(f"{type(self.likelihood).__name__} is not linear-Gaussian")
        return self.likelihood

    def expand(self, k: int) -> Posterior:
        """Return the problem with k items per measurement and fresh counters."""
        counts, batch = Counts(), self.likelihood.batch
        own = {n: v for n, v in self.cond.items() if isinstance(v, Tensor) and v.ndim and len(v) == batch}
        cond = {**self.cond, **{n: v.repeat(k, *[1] * (v.ndim - 1)) for n, v in own.items()}}
        return replace(self, likelihood=self.likelihood.expand(k).counted(counts), cond=cond, counts=counts)

    def denoise(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return E[x_0 | x_t], (N, *event), at the cost of one network call and without a graph."""
        self.counts.network += 1
        with torch.no_grad():
            return self.prior(x_t, t, **self.cond)

    def denoise_vjp(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Pullback]:
        """Return D(x_t, t) and the function v -> (dD/dx_t)' v, (N, *event) each; it may be called repeatedly."""
        self.counts.network += 1
        with torch.enable_grad():
            leaf = x_t.detach().requires_grad_()
            x0 = self.prior(leaf, t, **self.cond)

        def pullback(v: Tensor) -> Tensor:
            self.counts.vjp += 1
            return torch.autograd.grad(x0, leaf, v, retain_graph=True)[0]

        return x0.detach(), pullback

    def coefficients(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha_t, sigma_t) in a shape that broadcasts against `x`."""
        alpha, sigma = self.schedule(t)
        return like(alpha, x), like(sigma, x)
