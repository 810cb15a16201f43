r"""DPS: diffusion posterior sampling.

An unconditional DDIM step is followed by a gradient step on the misfit of D = E[x_0 | x_t] to y, differentiated through the
network. The paper takes the gradient of the *norm* |y - A D| with a constant step `zeta`: the data weight does not depend on
sigma_y, so the output law does not either as it should. With `norm=False` the step is that of the exact score of
N(y; A D, sigma_y^2 I) under the same kernel, which still neglects the uncertainty of x_0 given x_t and is unstable on coarse
grids. The norm is taken per item.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core.batch import item_norm, like
from fewstep.core.checks import check_positive, check_shares
from fewstep.core.kernel import ddim_std, epsilon_of, renoise
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior, Pullback
from fewstep.core.reference import Reference
from fewstep.core.sampler import DiffusionSampler, State


@dataclass(frozen=True)
class DPS(DiffusionSampler):
    """Diffusion posterior sampling.

    Args:
        steps: network calls, each with a vector-Jacobian product.
        zeta: step on the gradient of the norm; the factor of the exact step where `norm` is False.
        eta: share of ancestral noise, DDIM convention.
        norm: whether the gradient is that of |y - A D| (the paper's) or of |y - A D|^2 / (2 sigma_y^2).
        grid: spacing of the times.
    """

    steps: int = 1000
    zeta: float = 1.0
    eta: float = 1.0
    norm: bool = True
    grid: str | tuple[float, ...] = "uniform"

    needs: ClassVar = frozenset({"gaussian", "gradient"})
    exact: ClassVar = "biased"
    limit: ClassVar = (
        "no posterior: the data weight is a constant (norm=True), or Cov[x0 | xt] is neglected (norm=False)"
    )
    presets: ClassVar = {"paper": {}, "squared": {"norm": False}}
    reference: ClassVar = Reference(
        "Diffusion Posterior Sampling for General Noisy Inverse Problems",
        "Chung, Hyungjin and Kim, Jeongsol and McCann, Michael T. and Klasky, Marc L. and Ye, Jong Chul",
        2023,
        "International Conference on Learning Representations",
        "2209.14687",
    )

    def __post_init__(self) -> None:
        check_shares(self, "eta")
        check_positive(self, "zeta")

    def step(self, problem: Posterior, state: State, k: int, noise: Noise) -> State:
        """See `Sampler`."""
        t, s = self.interval(problem, k)
        x0, pullback = problem.denoise_vjp(state.x, t)
        guidance = self.guidance(problem, x0, pullback, t, s)
        if k == self.steps - 1:
            return State(x0 + guidance)
        epsilon = epsilon_of(problem.schedule, t, state.x, x0)
        x_s = renoise(problem.schedule, s, x0, epsilon, ddim_std(problem.schedule, t, s, self.eta), noise)
        return State(x_s + guidance)

    def guidance(self, problem: Posterior, x0: Tensor, pullback: Pullback, t: Tensor, s: Tensor) -> Tensor:
        """Return what is added to x_s, (N, *event)."""
        likelihood = problem.gaussian
        residual = likelihood.residual(x0)
        gradient = pullback(likelihood.A_adjoint(residual))
        if self.norm:
            return self.zeta * gradient / like(item_norm(residual).clamp_min(torch.finfo(x0.dtype).tiny), x0)
        return self.zeta * self.score_weight(problem, t, s).to(x0) * gradient / like(likelihood.sigma**2, x0)

    def score_weight(self, problem: Posterior, t: Tensor, s: Tensor) -> Tensor:
        """Return d x_s / d score of the DDIM kernel: a change g of the score moves x0 by sigma_t^2 / alpha_t g."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = problem.schedule(t), problem.schedule(s)
        kept = (sigma_s**2 - ddim_std(problem.schedule, t, s, self.eta) ** 2).clamp_min(0).sqrt()
        return alpha_s * sigma_t**2 / alpha_t - kept * sigma_t
