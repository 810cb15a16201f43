r"""DiffPIR: plug-and-play image restoration with a diffusion denoiser.

Each step denoises, takes the prox of the data term with weight rho_t = lambda sigma_y^2 / (sigma_t / alpha_t)^2, recomputes
epsilon from the corrected x_0, and re-noises with share zeta of fresh noise (fraction convention with zeta = eta^2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fewstep.core.checks import check_positive, check_shares
from fewstep.core.kernel import epsilon_of, fraction_std, renoise
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.reference import Reference
from fewstep.core.sampler import DiffusionSampler, State


@dataclass(frozen=True)
class DiffPIR(DiffusionSampler):
    """Denoising diffusion models for plug-and-play image restoration.

    Args:
        steps: network calls.
        lam: weight of the prior against the data term (lambda in the paper).
        zeta: variance share of fresh noise.
        grid: spacing of the times.
    """

    steps: int = 100
    lam: float = 7.0
    zeta: float = 0.3
    grid: str | tuple[float, ...] = "quadratic"

    needs: ClassVar = frozenset({"prox"})
    exact: ClassVar = "biased"
    limit: ClassVar = "no posterior: the prior is weighted by lambda and null directions lose variance (fraction zeta)"
    presets: ClassVar = {
        "paper": {},
        # chosen on held-out training photographs at JPEG quality 10 with the shipped prior and `gaussian_jpeg(y, 0.2)`
        "jpeg": {"steps": 16, "lam": 1.0, "zeta": 1.0, "grid": "log_snr"},
    }
    reference: ClassVar = Reference(
        "Denoising Diffusion Models for Plug-and-Play Image Restoration",
        "Zhu, Yuanzhi and Zhang, Kai and Liang, Jingyun and Cao, Jiezhang and Wen, Bihan and Timofte, Radu and "
        "Van Gool, Luc",
        2023,
        "CVPR Workshops",
        "2305.08995",
    )

    def __post_init__(self) -> None:
        check_positive(self, "lam")
        check_shares(self, "zeta")

    def step(self, problem: Posterior, state: State, k: int, noise: Noise) -> State:
        """See `Sampler`."""
        t, s = self.interval(problem, k)
        # argmin |y - A x|^2 + rho_t |x - D|^2 is the prox of -log p(y | x) at radius ratio / sqrt(lambda)
        radius = problem.schedule.ratio(t) / self.lam**0.5
        x0 = problem.likelihood.prox(problem.denoise(state.x, t), radius)
        if k == self.steps - 1:
            return State(x0)
        epsilon = epsilon_of(problem.schedule, t, state.x, x0)
        std = fraction_std(problem.schedule, s, self.zeta**0.5)
        return State(renoise(problem.schedule, s, x0, epsilon, std, noise))
