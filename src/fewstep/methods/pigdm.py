r"""PiGDM: pseudoinverse-guided diffusion.

p(x_0 | x_t) is approximated by N(D, r_t^2 I) with r_t^2 = sigma_t^2 / (alpha_t^2 + sigma_t^2), which is exact for a prior of unit
variance in every direction. The score of y is then

    (dD/dx_t)' A' (r_t^2 A A' + sigma_y^2 I)^-1 (y - A D),

and adding it to the score moves the prediction of x_0 by sigma_t^2 / alpha_t times it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewstep.core.checks import check_positive
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.reference import Reference
from fewstep.core.sampler import GuidedSampler


@dataclass(frozen=True)
class PiGDM(GuidedSampler):
    """Pseudoinverse-guided diffusion.

    Args:
        steps: network calls, each with a vector-Jacobian product.
        eta: share of ancestral noise, DDIM convention.
        spread: standard deviation assumed for the prior in every direction.
        adaptive: whether the guidance is multiplied by alpha_t (the public code's) instead of the exact 1.
        grid: spacing of the times.
    """

    steps: int = 100
    eta: float = 1.0
    spread: float = 1.0
    adaptive: bool = False
    grid: str | tuple[float, ...] = "uniform"

    needs: ClassVar = frozenset({"gaussian", "gradient"})
    prediction: ClassVar = "mean"
    exact: ClassVar = "biased"
    limit: ClassVar = (
        "the posterior where every direction of a Gaussian prior has standard deviation `spread`; else biased"
    )
    presets: ClassVar = {"paper": {}, "public-code": {"adaptive": True}}
    reference: ClassVar = Reference(
        "Pseudoinverse-Guided Diffusion Models for Inverse Problems",
        "Song, Jiaming and Vahdat, Arash and Mardani, Morteza and Kautz, Jan",
        2023,
        "International Conference on Learning Representations",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "spread")

    def predict_x0(self, problem: Posterior, x_t: Tensor, t: Tensor, noise: Noise) -> Tensor:
        """See `GuidedSampler`."""
        likelihood = problem.gaussian
        alpha, sigma = problem.coefficients(t, x_t)
        x0, pullback = problem.denoise_vjp(x_t, t)
        radius = self.spread * sigma / (alpha**2 * self.spread**2 + sigma**2).sqrt()
        score = pullback(likelihood.back_project(likelihood.residual(x0), radius.flatten().expand(len(x_t))))
        return x0 + sigma**2 / alpha * score * (alpha if self.adaptive else 1)
