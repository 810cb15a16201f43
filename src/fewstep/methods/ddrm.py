r"""DDRM: denoising diffusion restoration models.

In the basis of right singular vectors of A and in variance-exploding coordinates (x / alpha, noise ratio r = sigma / alpha) each
direction with singular value s is stepped from r_t to r_s by a rule of its own, with y_s = (A^+ y):

    s = 0              x0 + sqrt(1 - eta^2) r_s epsilon + eta r_s z
    r_s <  sigma_y / s   x0 + sqrt(1 - eta^2) r_s (y_s - x0) s / sigma_y + eta r_s z
    r_s >= sigma_y / s   (1 - eta_b) x0 + eta_b y_s + sqrt(r_s^2 - eta_b^2 sigma_y^2 / s^2) z

eta is of the *fraction* convention: calibration gets worse, not better, with more steps. All rules are functions of the
singular value, so no basis is formed: they act through `GaussianLikelihood.spectral`.
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
class DDRM(DiffusionSampler):
    """Denoising diffusion restoration models.

    Args:
        steps: network calls.
        eta: share of fresh noise, fraction convention.
        eta_b: weight of the measurement where it is the cleaner of the two.
        grid: spacing of the times.
    """

    steps: int = 20
    eta: float = 0.85
    eta_b: float = 1.0
    grid: str | tuple[float, ...] = "uniform"

    needs: ClassVar = frozenset({"gaussian", "svd"})
    exact: ClassVar = "biased"
    limit: ClassVar = "no posterior: with more steps measured directions lose variance (fraction convention of eta)"
    reference: ClassVar = Reference(
        "Denoising Diffusion Restoration Models",
        "Kawar, Bahjat and Elad, Michael and Ermon, Stefano and Song, Jiaming",
        2022,
        "Advances in Neural Information Processing Systems",
        "2201.11793",
    )

    def __post_init__(self) -> None:
        check_shares(self, "eta", "eta_b")

    def init(self, problem: Posterior, noise: Noise) -> State:
        """See `Sampler`; directions in which y is the cleaner start at y, noised to the first level."""
        likelihood = problem.gaussian
        alpha, sigma = problem.schedule(torch.ones((), dtype=torch.float64))
        z = noise.randn(*likelihood.event_shape)
        ratio, back = (sigma / alpha).to(z), likelihood.A_adjoint(likelihood.y)
        sigma_y = like(likelihood.sigma, z)
        start = likelihood.spectral(lambda q: inverse_square(q, _cleaner(q, ratio, sigma_y)), back)
        fresh = likelihood.spectral(lambda q: _left(q, ratio, sigma_y, 1.0), z)
        return State(alpha.to(z) * (start + fresh), back)

    def step(self, problem: Posterior, state: State, k: int, noise: Noise) -> State:
        """See `Sampler`; the state carries A'y."""
        t, s = self.interval(problem, k)
        x0 = problem.denoise(state.x, t)
        if k == self.steps - 1:
            return State(x0)
        alpha, sigma = problem.coefficients(s, x0)
        epsilon = epsilon_of(problem.schedule, t, state.x, x0)
        misfit = state.memory - problem.gaussian.spectral(torch.square, x0)
        moved = x0 + self.rules(problem, epsilon, misfit, sigma / alpha, noise.randn_like(x0))
        return State(alpha * moved, state.memory)

    def rules(self, problem: Posterior, epsilon: Tensor, misfit: Tensor, ratio: Tensor, z: Tensor) -> Tensor:
        """Return x_s / alpha_s - x0, (N, *event), at noise ratio r_s = `ratio`; `misfit` is A'(y - A x0)."""
        spectral, sigma_y = problem.gaussian.spectral, like(problem.gaussian.sigma, z)
        keep = (1 - self.eta**2) ** 0.5 * ratio

        def data(q: Tensor) -> Tensor:
            weight = torch.where(_cleaner(q, ratio, sigma_y), self.eta_b, keep * q / sigma_y)
            return weight * inverse_square(q, significant(q))

        def fresh(q: Tensor) -> Tensor:
            return torch.where(_cleaner(q, ratio, sigma_y), _left(q, ratio, sigma_y, self.eta_b), self.eta * ratio)

        null = spectral(lambda q: torch.where(significant(q), 0.0, keep), epsilon)
        return null + spectral(data, misfit) + spectral(fresh, z)


def _cleaner(q: Tensor, ratio: Tensor, sigma_y: Tensor) -> Tensor:
    """Return where y is cleaner than noise of ratio `ratio`: sigma_y / q <= ratio."""
    return significant(q) & (q * ratio >= sigma_y)


def _left(q: Tensor, ratio: Tensor, sigma_y: Tensor, eta_b: float) -> Tensor:
    """Return the standard deviation that `ratio` leaves beside y's own noise, where y is the cleaner."""
    own = eta_b * sigma_y * inverse_square(q, _cleaner(q, ratio, sigma_y)).sqrt()
    return (ratio**2 - own**2).clamp_min(0).sqrt()
