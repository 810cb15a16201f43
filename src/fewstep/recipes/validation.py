"""The figure a prior's training is watched by: how well it removes noise from photographs it never saw."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor, nn

from fewstep.core.batch import like
from fewstep.core.checks import check_counts
from fewstep.core.denoiser import Denoiser
from fewstep.core.noise import Noise
from fewstep.data import centre_batch


@dataclass(frozen=True)
class DenoisingPSNR:
    """Mean PSNR of the denoised middle of held-out images, at fixed noise.

    Attributes:
        images: number of images, spread evenly over the held-out ones.
        size: side of the square crop.
        sigmas: noise levels, in units of [0, 255] images.
    """

    images: int = 8
    size: int = 128
    sigmas: tuple[float, ...] = (25.0,)

    def __post_init__(self) -> None:
        check_counts(self, "images", "size")
        whole = isinstance(self.sigmas, list | tuple) and all(isinstance(sigma, Real) for sigma in self.sigmas)
        if not whole or not all(0 < sigma < math.inf for sigma in self.sigmas):
            raise ValueError(f"sigmas must be a list of positive numbers, got {self.sigmas!r}")

    def on(self, held_out: Sequence[Tensor]) -> Callable[[nn.Module], dict[str, float]]:
        """Return the figure as a function of the model; `held_out` are uint8 images, (3, H, W) each."""
        clean = centre_batch(held_out[:: max(1, len(held_out) // self.images)][: self.images], self.size)
        z = Noise(range(len(clean))).randn_like(clean)
        return lambda model: {f"psnr_{s:g}": denoising_psnr(model, clean, 2 * s / 255, z) for s in self.sigmas}


@torch.no_grad()
def denoising_psnr(model: nn.Module, clean: Tensor, ratio: float, z: Tensor) -> float:
    """Return the mean PSNR in dB of D applied to `clean` + `ratio` z; all in [-1, 1] units, results clipped to it."""
    if not isinstance(model, Denoiser):
        raise TypeError(f"expected a Denoiser, got {type(model).__name__}")
    device = next(model.parameters()).device
    clean, z = clean.to(device), z.to(device)
    t = model.schedule.time(torch.full((len(clean),), ratio, device=device))
    alpha, sigma = (like(c, clean) for c in model.schedule(t))
    restored = model(alpha * clean + sigma * z, t).clamp(-1, 1)
    mse = (restored - clean).square().flatten(1).mean(1) / 4  # in [0, 1] units
    return float((-10 * mse.log10()).mean())
