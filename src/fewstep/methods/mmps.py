r"""MMPS: moment-matching posterior sampling.

p(y | x_t) is approximated by N(y; A D, sigma_y^2 I + A V A') with D = E[x_0 | x_t] and Tweedie's covariance V = Cov[x_0 | x_t] =
(sigma_t^2 / alpha_t) dD/dx_t. The posterior mean that goes with it is

    E[x_0 | x_t, y] = D + V A' (sigma_y^2 I + A V A')^-1 (y - A D),

solved by a few conjugate-gradient iterations, each with one vector-Jacobian product. Exact on a Gaussian prior; on a mixture
biased, since V is held fixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewstep.core.batch import like
from fewstep.core.checks import check_counts
from fewstep.core.linalg import cg
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.reference import Reference
from fewstep.core.sampler import GuidedSampler


@dataclass(frozen=True)
class MMPS(GuidedSampler):
    """Moment-matching posterior sampling.

    Args:
        steps: network calls.
        eta: share of ancestral noise, DDIM convention.
        iterations: conjugate-gradient iterations per step, one vector-Jacobian product each.
        grid: spacing of the times.
    """

    steps: int = 100
    eta: float = 1.0
    iterations: int = 3
    grid: str | tuple[float, ...] = "uniform"

    needs: ClassVar = frozenset({"gaussian", "gradient"})
    prediction: ClassVar = "mean"
    exact: ClassVar = "biased"
    limit: ClassVar = "the posterior for a Gaussian prior; biased mode weights on mixtures (the covariance is frozen)"
    reference: ClassVar = Reference(
        "Learning Diffusion Priors from Observations by Expectation Maximization",
        "Rozet, François and Andry, Gérôme and Lanusse, François and Louppe, Gilles",
        2024,
        "Advances in Neural Information Processing Systems",
        "2405.13712",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "iterations")

    def predict_x0(self, problem: Posterior, x_t: Tensor, t: Tensor, noise: Noise) -> Tensor:
        """See `GuidedSampler`."""
        likelihood = problem.gaussian
        alpha, sigma = problem.coefficients(t, x_t)
        x0, pullback = problem.denoise_vjp(x_t, t)
        variance = like(likelihood.sigma**2, likelihood.y)

        def covariance(v: Tensor) -> Tensor:
            return sigma**2 / alpha * pullback(v)

        def system(r: Tensor) -> Tensor:
            return variance * r + likelihood.A(covariance(likelihood.A_adjoint(r)))

        r = cg(system, likelihood.residual(x0), max_iter=self.iterations, tol=1e-8).x
        return x0 + covariance(likelihood.A_adjoint(r))
