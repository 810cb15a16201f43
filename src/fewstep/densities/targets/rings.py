"""Three thin rings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.densities.targets._radial import Radial


@dataclass(frozen=True)
class Rings(Radial):
    """log rho = -100 min_k (|x| - r_k)^2 in the plane, r = 1, 3, 5 (Zhang and Chen 2022, arXiv:2111.15141)."""

    dim = 2
    reach = 7.0

    def profile(self, r: Tensor) -> Tensor:
        """See `Radial`."""
        radii = torch.tensor([1.0, 3.0, 5.0], dtype=r.dtype, device=r.device)
        return -100 * (r[..., None] - radii).square().amin(-1)
