"""Denoising score matching with the weighting of EDM (Karras et al. 2022, arXiv:2206.00364, section 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.core.batch import like
from fewstep.core.denoiser import Denoiser
from fewstep.core.noise import Noise
from fewstep.core.objective import Objective


@dataclass(frozen=True)
class DenoisingScoreMatching(Objective):
    r"""E over x_0, z and the ratio r of lambda(r) |D(x_t, t) - x_0|^2, the mean over items and pixels.

    lambda = (r^2 + sigma_data^2) / (r sigma_data)^2 makes the loss the plain squared error of the network behind EDM's
    preconditioning. r is log-normal for most items and log-uniform for the rest, so that no noise level goes unseen.

    Attributes:
        median: median of the log-normal part of r = sigma / alpha.
        spread: standard deviation of ln r in that part.
        uniform: share of items whose ln r is uniform on [ln ratio_min, ln ratio_max].
        ratio_min: lower end of the uniform part; every r is clamped to it.
        ratio_max: upper end of the uniform part; every r is clamped to it.
        sigma_data: standard deviation of the data, in the units of the prior.
    """

    median: float = 0.2
    spread: float = 1.1
    uniform: float = 0.2
    ratio_min: float = 0.005
    ratio_max: float = 160.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.ratio_min < self.ratio_max or self.median <= 0 or self.sigma_data <= 0:
            raise ValueError("0 < ratio_min < ratio_max, median > 0 and sigma_data > 0 are needed")
        if not 0 <= self.uniform <= 1 or self.spread < 0:
            raise ValueError("uniform is a share in [0, 1] and spread must not be negative")

    def ratios(self, noise: Noise) -> Tensor:
        """Return one ratio per item, (N,)."""
        low, high = math.log(self.ratio_min), math.log(self.ratio_max)
        normal = math.log(self.median) + self.spread * noise.randn()
        flat = low + (high - low) * noise.rand()
        chosen = torch.where(noise.rand() < self.uniform, flat, normal)
        return chosen.clamp(low, high).exp()

    def weight(self, ratio: Tensor) -> Tensor:
        """Return lambda(ratio), of the shape of `ratio`."""
        return (ratio.square() + self.sigma_data**2) / (ratio * self.sigma_data).square()

    def loss(
        self, player: str, model: nn.Module, batch: Tensor | dict[str, Any], noise: Noise
    ) -> tuple[Tensor, dict[str, float]]:
        """See `Objective`; `model` is a `Denoiser`.

        `batch` is x_0, (N, *event), in the prior's units, or {"x0": x_0, "cond": what the denoiser is told beside x_t}.
        """
        x0, cond = (batch, {}) if isinstance(batch, Tensor) else (batch["x0"], batch["cond"])
        if not isinstance(model, Denoiser):
            raise TypeError(f"denoising score matching trains a Denoiser, not {type(model).__name__}")
        ratio = self.ratios(noise)
        t = model.schedule.time(ratio)
        alpha, sigma = (like(c, x0) for c in model.schedule(t))
        error = model(alpha * x0 + sigma * noise.randn_like(x0), t, **cond) - x0
        loss = (like(self.weight(ratio), x0) * error.square()).mean()
        return loss, {}
