r"""DDNM+: denoising diffusion null-space model, for noisy measurements.

The prediction of x_0 is corrected in the range of A', x0' = x0 - Lambda A^+ (A x0 - y), and re-noised with the *uncorrected*
epsilon. Per singular value q, with a = alpha_s and std = eta sigma_s (fraction convention), the noise that y brings,
a sigma_y Lambda / q, is kept inside what the level allows:

    sigma_s >= a sigma_y / q   Lambda = 1,  fresh noise sqrt(sigma_s^2 - a^2 sigma_y^2 / q^2), no epsilon
    sigma_s <  a sigma_y / q   Lambda = q sigma_s sqrt(1 - eta^2) / (a sigma_y),  fresh noise eta sigma_s, no epsilon
    q = 0                      the usual step

With sigma_y -> 0 this is DDNM: A x = y to round-off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core.batch import like
from fewstep.core.checks import check_shares
from fewstep.core.kernel import epsilon_of
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.reference import Reference
from fewstep.core.sampler import DiffusionSampler, State
from fewstep.core.spectral import inverse_square, significant


@dataclass(frozen=True)
class DDNM(DiffusionSampler):
    """Denoising diffusion null-space model (DDNM+).

    Args:
        steps: network calls.
        eta: share of fresh noise, fraction convention.
        grid: spacing of the times.
    """

    steps: int = 100
    eta: float = 0.85
    grid: str | tuple[float, ...] = "uniform"

    needs: ClassVar = frozenset({"gaussian", "svd"})
    exact: ClassVar = "biased"
    limit: ClassVar = "no posterior: measured directions follow y alone, unmeasured ones lose variance (fraction eta)"
    reference: ClassVar = Reference(
        "Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model",
        "Wang, Yinhuai and Yu, Jiwen and Zhang, Jian",
        2023,
        "International Conference on Learning Representations",
        "2212.00490",
    )

    def __post_init__(self) -> None:
        check_shares(self, "eta")

    def step(self, problem: Posterior, state: State, k: int, noise: Noise) -> State:
        """See `Sampler`."""
        t, s = self.interval(problem, k)
        x0 = problem.denoise(state.x, t)
        if k == self.steps - 1:
            return State(x0 + self.projection(problem, x0, t))
        alpha, _ = problem.coefficients(s, x0)
        corrected = x0 + self.correction(problem, x0, s)
        epsilon = epsilon_of(problem.schedule, t, state.x, x0)
        return State(alpha * corrected + self.renoise(problem, epsilon, s, noise))

    def correction(self, problem: Posterior, x0: Tensor, s: Tensor) -> Tensor:
        """Return Lambda A^+ (y - A x0), (N, *event)."""
        alpha, sigma = problem.coefficients(s, x0)
        sigma_y, keep = like(problem.gaussian.sigma, x0), (1 - self.eta**2) ** 0.5

        def scale(q: Tensor) -> Tensor:
            damped = q * sigma * keep / (alpha * sigma_y)
            weight = torch.where(q * sigma >= alpha * sigma_y, 1.0, damped)
            return weight * inverse_square(q, significant(q))

        likelihood = problem.gaussian
        return likelihood.spectral(scale, likelihood.A_adjoint(likelihood.residual(x0)))

    def projection(self, problem: Posterior, x0: Tensor, t: Tensor) -> Tensor:
        """Return A^+ (y - A x0) where y is cleaner than the last level t, (N, *event).

        There Lambda at sigma_s = 0 would ignore y; with sigma_y -> 0 this is DDNM's final projection.
        """
        ratio, likelihood = problem.schedule.ratio(t).to(x0), problem.gaussian
        sigma_y = like(likelihood.sigma, x0)
        misfit = likelihood.A_adjoint(likelihood.residual(x0))
        return likelihood.spectral(lambda q: inverse_square(q, significant(q) & (q * ratio >= sigma_y)), misfit)

    def renoise(self, problem: Posterior, epsilon: Tensor, s: Tensor, noise: Noise) -> Tensor:
        """Return what is added to alpha_s x0', (N, *event)."""
        alpha, sigma = problem.coefficients(s, epsilon)
        sigma_y, spectral = like(problem.gaussian.sigma, epsilon), problem.gaussian.spectral

        def fresh(q: Tensor) -> Tensor:
            own = alpha * sigma_y / q.clamp_min(1e-12)
            return torch.where(
                significant(q) & (sigma >= own), (sigma**2 - own**2).clamp_min(0).sqrt(), self.eta * sigma
            )

        kept = (1 - self.eta**2) ** 0.5 * sigma
        return spectral(lambda q: torch.where(significant(q), 0.0, kept), epsilon) + spectral(
            fresh, noise.randn_like(epsilon)
        )
