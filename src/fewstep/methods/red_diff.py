r"""RED-diff: variational inference with a Gaussian of vanishing width, i.e. a point estimate.

With x_t = alpha_t mu + sigma_t e the gradient of the objective is

    lambda w_t (epsilon(x_t) - e) / (size of x) + A'(A mu - y) / (size of y),      w_t = sigma_t / alpha_t,

followed by Adam while t descends. The two terms are means over different spaces, as published, so their balance depends on the
number of measurements and not on sigma_y.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fewstep.core.checks import check_not_negative, check_positive
from fewstep.core.kernel import epsilon_of
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.reference import Reference
from fewstep.core.sampler import DiffusionSampler, State


class Moments(NamedTuple):
    """Adam's running moments, (N, *event) each."""

    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class REDDiff(DiffusionSampler):
    """Regularisation by denoising diffusion.

    Args:
        steps: network calls.
        lam: weight of the prior (lambda in the paper).
        lr: Adam's learning rate.
        grid: spacing of the times.
    """

    steps: int = 1000
    lam: float = 0.25
    lr: float = 0.1
    grid: str | tuple[float, ...] = "uniform"

    needs: ClassVar = frozenset({"gaussian"})
    exact: ClassVar = "mode"
    limit: ClassVar = "a point estimate: samples differ only by the noise of the optimiser"
    reference: ClassVar = Reference(
        "A Variational Perspective on Solving Inverse Problems with Diffusion Models",
        "Mardani, Morteza and Song, Jiaming and Kautz, Jan and Vahdat, Arash",
        2024,
        "International Conference on Learning Representations",
        "2305.04391",
    )
    betas: ClassVar[tuple[float, float]] = (0.9, 0.99)

    def __post_init__(self) -> None:
        check_not_negative(self, "lam")
        check_positive(self, "lr")

    def init(self, problem: Posterior, noise: Noise) -> State:
        """See `Sampler`; the pseudo-inverse of y."""
        mu = problem.gaussian.start()
        return State(mu, Moments(torch.zeros_like(mu), torch.zeros_like(mu)))

    def step(self, problem: Posterior, state: State, k: int, noise: Noise) -> State:
        """See `Sampler`."""
        gradient = self.gradient(problem, state.x, self.interval(problem, k)[0], noise)
        b1, b2 = self.betas
        first = b1 * state.memory.first + (1 - b1) * gradient
        second = b2 * state.memory.second + (1 - b2) * gradient**2
        corrected = first / (1 - b1 ** (k + 1)), second / (1 - b2 ** (k + 1))
        update = corrected[0] / (corrected[1].sqrt() + 1e-8)
        return State(state.x - self.lr * update, Moments(first, second))

    def gradient(self, problem: Posterior, mu: Tensor, t: Tensor, noise: Noise) -> Tensor:
        """Return the stochastic gradient at mu, (N, *event), for one draw of the noise at time t, ()."""
        alpha, sigma = problem.coefficients(t, mu)
        e = noise.randn_like(mu)
        x_t = alpha * mu + sigma * e
        epsilon = epsilon_of(problem.schedule, t, x_t, problem.denoise(x_t, t))
        likelihood = problem.gaussian
        data = likelihood.A_adjoint(likelihood.residual(mu)) / likelihood.y[0].numel()
        return self.lam * sigma / alpha * (epsilon - e) / mu[0].numel() - data
