r"""Samplers that know the exact E[x_0 | x_t, y] or draw exactly from p(x_0 | x_t, y): the rows that every table is read against.

A guided sampler makes two errors, that of its prediction and that of the few steps. `ExactMean` makes only the second, which
is large: with the exact mean, deterministic DDIM in 4 steps keeps a third of the posterior variance. `ExactDraw` makes none:
an exact draw of p(x_0 | x_t, y) leaves (x_0, epsilon) jointly right, hence every marginal p(x_s | y), at any number of steps
and any eta. Both need a prior with `posterior(likelihood)` (Gaussian, mixture), so they are no methods of the library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewstep.core.likelihood import JointLikelihood
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.reference import Reference
from fewstep.core.sampler import GuidedSampler
from fewstep.priors.exact import ExactPosterior, GaussianPrior, MixturePrior

_DDIM = Reference(
    "Denoising Diffusion Implicit Models",
    "Song, Jiaming and Meng, Chenlin and Ermon, Stefano",
    2021,
    "International Conference on Learning Representations",
    "2010.02502",
)


@dataclass(frozen=True)
class ExactMean(GuidedSampler):
    """DDIM on the exact E[x_0 | x_t, y].

    Args:
        steps: evaluations of the exact mean.
        eta: share of ancestral noise, DDIM convention.
        grid: spacing of the times.
    """

    steps: int = 100
    eta: float = 0.0
    grid: str | tuple[float, ...] = "uniform"

    needs: ClassVar = frozenset({"gaussian"})
    prediction: ClassVar = "mean"
    exact: ClassVar = "posterior"
    limit: ClassVar = "the posterior as steps grow; too narrow before"
    reference: ClassVar = _DDIM

    def predict_x0(self, problem: Posterior, x_t: Tensor, t: Tensor, noise: Noise) -> Tensor:
        """See `GuidedSampler`."""
        return exact_conditional(problem, x_t, t).mean


@dataclass(frozen=True)
class ExactDraw(GuidedSampler):
    """DDIM on exact draws of p(x_0 | x_t, y).

    Args:
        steps: exact draws.
        eta: share of ancestral noise, DDIM convention; 1 is the bridge q(x_s | x_t, x_0).
        grid: spacing of the times.
    """

    steps: int = 10
    eta: float = 1.0
    grid: str | tuple[float, ...] = "uniform"

    needs: ClassVar = frozenset({"gaussian"})
    prediction: ClassVar = "draw"
    exact: ClassVar = "posterior"
    limit: ClassVar = "the posterior, at any number of steps, up to p(x_1) being called pure noise"
    reference: ClassVar = _DDIM

    def predict_x0(self, problem: Posterior, x_t: Tensor, t: Tensor, noise: Noise) -> Tensor:
        """See `GuidedSampler`."""
        return exact_conditional(problem, x_t, t).draw(noise)


def exact_conditional(problem: Posterior, x_t: Tensor, t: Tensor) -> ExactPosterior:
    """Return p(x_0 | x_t, y) of every item.

    Raises:
        ValueError: the prior does not know it.
    """
    if not isinstance(problem.prior, GaussianPrior | MixturePrior):
        raise ValueError(f"{type(problem.prior).__name__} does not know its posterior; use a Gaussian or mixture prior")
    problem.counts.network += 1  # the exact mean is in the place of a network
    return problem.prior.posterior(JointLikelihood(problem.likelihood, x_t, *problem.schedule(t)))
