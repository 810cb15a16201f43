"""A smooth move of the noise that a map starts from; `_balance` says what for."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_COUNT, _PACE = (
    128,
    0.7,
)  # cosines, and how fast they turn: modes are not what they should tell apart, but regions of noise


class Warp(nn.Module):
    """g(z) = z + grad psi(z) with psi(z) = sum_k c_k cos(s_k . z + b_k): |g(z) - z| is bounded, and g the identity for c = 0.

    Args:
        dim: d.
        count: number of cosines, m.
    """

    slopes: Tensor
    phases: Tensor
    heights: Tensor

    def __init__(self, dim: int, count: int = _COUNT) -> None:
        super().__init__()
        self.register_buffer("slopes", torch.zeros(count, dim))
        self.register_buffer("phases", torch.zeros(count))
        self.register_buffer("heights", torch.zeros(count))

    @classmethod
    def drawn(cls, dim: int, generator: torch.Generator) -> Warp:
        """Return the identity, with cosines along random directions."""
        warp = cls(dim)
        warp.slopes.copy_(_PACE * torch.randn(_COUNT, dim, generator=generator) / math.sqrt(dim / 2))
        warp.phases.copy_(2 * math.pi * torch.rand(_COUNT, generator=generator))
        return warp

    def forward(self, z: Tensor) -> Tensor:
        """Return g(z), (N, d)."""
        return z - (self._angles(z).sin() * self.heights) @ self.slopes

    def generated(self, z: Tensor) -> Tensor:
        """Return L cos(s_k . z + b_k) = (Laplace - z . grad) of it, (N, m): of mean zero over z ~ N(0, I)."""
        angles = self._angles(z)
        return (angles - self.phases) * angles.sin() - self.slopes.square().sum(1) * angles.cos()

    def _angles(self, z: Tensor) -> Tensor:
        return z @ self.slopes.T + self.phases
