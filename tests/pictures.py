"""Small images and priors that the tests of the command share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.core.batch import like
from fewstep.core.denoiser import Denoiser
from fewstep.core.schedule import VariancePreserving


class PixelPrior(Denoiser):
    """Independent pixels N(0, scale^2), of any image size: its posterior is known."""

    def __init__(self, scale: float = 0.5) -> None:
        super().__init__()
        self.schedule, self.event_shape, self.scale = VariancePreserving(), (3, None, None), scale

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        alpha, sigma = (like(c, x_t) for c in self.schedule(torch.as_tensor(t, dtype=x_t.dtype)))
        return alpha * self.scale**2 / (alpha**2 * self.scale**2 + sigma**2) * x_t


class ConvPrior(Denoiser):
    """A non-linear network with a receptive field of 2 * reach + 1 pixels; counts what it saw."""

    def __init__(self, reach: int = 2) -> None:
        super().__init__()
        self.schedule, self.event_shape = VariancePreserving(), (3, None, None)
        generator = torch.Generator().manual_seed(0)
        kernel = torch.randn(3, 3, 2 * reach + 1, 2 * reach + 1, generator=generator) * 0.1
        self.kernel, self.reach = nn.Parameter(kernel), reach
        self.seen: list[torch.Size] = []

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        self.seen.append(x_t.shape)
        return torch.tanh(F.conv2d(x_t, self.kernel, padding=self.reach)) * like(1 + torch.as_tensor(t), x_t)


def pixels(height: int = 24, width: int = 32, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth colours, (H, W[, C]) uint8."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    out = np.stack(
        [
            128 + 90 * np.sin(rows / rng.uniform(3, 6) + c) * np.cos(columns / rng.uniform(3, 6))
            for c in range(channels)
        ],
        -1,
    )
    return (out if channels > 1 else out[..., 0]).astype(np.uint8)


def write_png(folder: Path, name: str = "photo.png", **shape: int) -> Path:
    """Write a small photograph."""
    path = folder / name
    Image.fromarray(pixels(**shape)).save(path)
    return path
