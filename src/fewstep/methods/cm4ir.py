r"""CM4IR: restoration with a consistency model in four network calls.

Start at A^+ y noised to a moderate level; then decode (telling the network (1 + delta) times the level), back-project,

    x0 <- x0 - mu A' (A A' + zeta sigma_y^2 I)^-1 (A x0 - y),

and re-noise with the uncorrected epsilon and share eta of fresh noise (fraction convention) at a level whose alpha^2 has grown by
(1 + gamma). The last back-projection is left out, as published, for noisy measurements. With `decoder_steps` = 1 the decoder is
the MMSE denoiser, with more it is the probability-flow map that a consistency model approximates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core.checks import check_counts, check_not_negative, check_positive, check_shares
from fewstep.core.flow import flow_calls, ladder, probability_flow
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.reference import Reference
from fewstep.core.sampler import Sampler, State


@dataclass(frozen=True)
class CM4IR(Sampler):
    """Consistency models for image restoration.

    Args:
        steps: decodings.
        start: alpha^2 of the first level (0.196 is iN = 400 of 1000 in the paper's linear schedule).
        gamma: growth of alpha^2 from level to level, which stops short of 1.
        eta: share of fresh noise, fraction convention.
        delta: excess of the noise level that the network is told.
        mu: step of the back-projection.
        zeta: regularisation of the back-projection in units of sigma_y^2.
        decoder_steps: 1 decodes with the MMSE denoiser, more with that many Heun steps of the probability flow.
    """

    steps: int = 4
    start: float = 0.196
    gamma: float = 0.7
    eta: float = 0.85
    delta: float = 0.0
    mu: float = 1.0
    zeta: float = 1.0
    decoder_steps: int = 1

    needs: ClassVar = frozenset({"gaussian"})
    exact: ClassVar = "biased"
    limit: ClassVar = (
        "no posterior: four nearly deterministic restorations (null-space variance about 0.15 of the truth)"
    )
    presets: ClassVar = {
        "paper": {},
        "deblur": {"start": 0.92, "gamma": 0.01, "zeta": 3.0},
        "inpaint": {"start": 0.78, "gamma": 0.2},
    }
    reference: ClassVar = Reference(
        "Zero-Shot Image Restoration Using Few-Step Guidance of Consistency Models (and Beyond)",
        "Garber, Tomer and Tirer, Tom",
        2025,
        "Conference on Computer Vision and Pattern Recognition",
        "2412.20596",
    )

    def __post_init__(self) -> None:
        check_shares(self, "eta")
        check_not_negative(self, "gamma")
        check_positive(self, "mu", "zeta")
        check_counts(self, "decoder_steps")
        if not 0 < self.start < 1:
            raise ValueError(f"start must lie inside (0, 1), got {self.start}")
        if not -1 < self.delta < math.inf:
            raise ValueError(f"delta must be finite and above -1, got {self.delta}")

    @property
    def nfe(self) -> int:
        """See `Sampler`."""
        return self.steps * flow_calls(self.decoder_steps)

    def init(self, problem: Posterior, noise: Noise) -> State:
        """See `Sampler`; the noised pseudo-inverse, in units of x_0."""
        start = problem.gaussian.start()
        return State(start + self.ratio(0).to(start) * noise.randn_like(start))

    def step(self, problem: Posterior, state: State, k: int, noise: Noise) -> State:
        """See `Sampler`; the state is x_t / alpha_t."""
        ratio, following = self.ratio(k), self.ratio(k + 1)
        decoded = self.decode(problem, state.x, ratio * (1 + self.delta))
        if k == self.steps - 1:
            return State(decoded)
        x0 = decoded + self.mu * self.back_projection(problem, decoded)
        direction = (state.x - decoded) / ratio
        fresh = self.eta * noise.randn_like(x0)
        return State(x0 + following * ((1 - self.eta**2) ** 0.5 * direction + fresh))

    def ratio(self, k: int) -> Tensor:
        """Return the noise ratio of level k, (), float64."""
        square = min(self.start * (1 + self.gamma) ** k, 0.995)
        return torch.tensor((1 / square - 1) ** 0.5, dtype=torch.float64)

    def decode(self, problem: Posterior, z: Tensor, ratio: Tensor) -> Tensor:
        """Return the decoder's output at x_t = alpha z, (N, *event)."""
        return probability_flow(problem, z, ladder(ratio, self.decoder_steps))

    def back_projection(self, problem: Posterior, x0: Tensor) -> Tensor:
        """Return A' (A A' + zeta sigma_y^2 I)^-1 (y - A x0), (N, *event)."""
        likelihood = problem.gaussian
        # (A A' / zeta + sigma^2 I)^-1 = zeta (A A' + zeta sigma^2 I)^-1
        return likelihood.back_project(likelihood.residual(x0), self.zeta**-0.5) / self.zeta
