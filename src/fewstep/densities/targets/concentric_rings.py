"""Smooth concentric rings with an exponential tail."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.densities.targets._radial import Radial

_EDGE = 4.5 * math.pi


@dataclass(frozen=True)
class ConcentricRings(Radial):
    """rho = cos |x| + 1.001 up to |x| = 4.5 pi, exp(4.5 pi - |x|) beyond (Blessing et al. 2024, arXiv:2406.07423).

    The published sampler draws |x| without the factor |x|^(d-1) and so follows another law; this one does not. The published log
    density also jumps by 1e-3 at the edge, as here.

    Args:
        dim: d.
    """

    dim: int = 2

    @property
    def reach(self) -> float:  # type: ignore[override]
        """See `Radial`: beyond the rings the radius has a Gamma law of shape d."""
        return _EDGE + self.dim + 55 + 10 * math.sqrt(self.dim)

    def profile(self, r: Tensor) -> Tensor:
        """See `Radial`."""
        inside = torch.log(torch.cos(r.clamp_max(_EDGE)) + 1.001)
        return torch.where(r <= _EDGE, inside, _EDGE - r)
