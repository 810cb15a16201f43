"""The problem that every posterior sampler is called on: a prior, a likelihood, and the count of what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from fewstep.core.batch import like, tile
from fewstep.core.checks import check_gradients
from fewstep.core.counts import Counts
from fewstep.core.denoiser import Denoiser
from fewstep.core.likelihood import GaussianLikelihood, Likelihood
from fewstep.core.schedule import Schedule

Pullback = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Posterior:
    """p(x | y) = p(x) p(y | x) / p(y).

    Args:
        prior: the diffusion prior.
        likelihood: the likelihood of B measurements.
        cond: extra inputs of the denoiser by name, {"label": torch.tensor([7])} say; tensors of B entries have one for each
            measurement.

    Raises:
        TypeError: one of them is of another kind.
        ValueError: a part of the prior is in training mode and would not act on each item alone.
    """

    prior: Denoiser
    likelihood: Likelihood
    cond: dict[str, Any] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_prior(self.prior)
        check_mode(self.prior)
        if not hasattr(self.likelihood, "provides"):
            raise TypeError(
                f"the likelihood must be a Likelihood, got {type(self.likelihood).__name__} without `provides`; "
                "fewstep.image_likelihood(y, physics, sigma) makes one of a measurement of an image in [0, 1]"
            )
        if not isinstance(self.cond, Mapping):
            raise TypeError(f'cond must map names to values, {{"label": torch.tensor([7])}} say, got {self.cond!r}')

    def __repr__(self) -> str:
        cond = f", cond={sorted(self.cond)}" if self.cond else ""
        return f"Posterior(prior={type(self.prior).__name__}, likelihood={self.likelihood!r}{cond})"

    @property
    def misfit(self) -> str:
        """Why the prior and the likelihood are not of the same items, empty where they may be."""
        given = tuple(self.likelihood.event_shape)
        own = getattr(self.prior, "event_shape", given)  # what does not say its shape is trusted
        if len(own) == len(given) and all(n in (None, m) for n, m in zip(own, given, strict=True)):
            return ""
        return f"the prior is of items of shape {tuple(own)}, the measurement of items of shape {given}"

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
        counts = Counts()
        cond = self.cond_with(lambda value: tile(value, k))
        return replace(self, likelihood=self.likelihood.expand(k).counted(counts), cond=cond, counts=counts)

    def cond_with(self, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Return `cond` with a change of the tensors that have an entry for each item."""
        batch = self.likelihood.batch
        own = {n: v for n, v in self.cond.items() if isinstance(v, Tensor) and v.ndim and len(v) == batch}
        return {**self.cond, **{n: change(v) for n, v in own.items()}}

    def denoise(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return E[x_0 | x_t], (N, *event), at the cost of one network call and without a graph."""
        self.counts.network += 1
        with torch.no_grad():
            return self.prior(x_t, t, **self.cond)

    def denoise_vjp(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Pullback]:
        """Return D(x_t, t) and the function v -> (dD/dx_t)' v, (N, *event) each; it may be called repeatedly.

        Raises:
            RuntimeError: torch is in inference mode.
        """
        check_gradients()
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


def check_prior(prior: Any) -> None:
    """Raise TypeError where `prior` is no denoiser with a schedule."""
    if not hasattr(prior, "schedule"):
        raise TypeError(
            f"the prior must be a Denoiser, got {type(prior).__name__} without `schedule`; "
            "fewstep.load_prior makes one of a name, a folder or a network"
        )


def check_mode(prior: Any) -> None:
    """Raise ValueError where a part of `prior` is in training mode and draws from torch's generator or mixes the batch."""
    for part in prior.modules() if isinstance(prior, nn.Module) else ():
        drops = isinstance(part, _DropoutNd) and part.p > 0
        tracks = isinstance(part, _NormBase) and part.track_running_stats
        if part.training and (drops or tracks):
            raise ValueError(
                f"{type(part).__name__} of the prior is in training mode, in which a sample does not depend on its "
                "measurement and seed alone: call prior.eval() first"
            )
