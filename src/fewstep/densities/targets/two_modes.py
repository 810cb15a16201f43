"""Two unequal modes in many dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewstep.densities.targets._mixture import Components, GaussianMixture


@dataclass(frozen=True)
class TwoModes(GaussianMixture):
    """2/3 N(-1, C) + 1/3 N(+1, C), C = 0.05 diag(s): "TwoModes" of Noble et al. 2025, arXiv:2410.19449.

    Args:
        dim: d; published for 8 to 128.
        condition: s runs from 1 / `condition` to 1, evenly in the logarithm: 1 easy, 10 medium, 100 hard.
    """

    dim: int = 32
    condition: float = 1.0

    def build(self) -> Components:
        """See `GaussianMixture`."""
        steps = torch.linspace(-1, 0, self.dim, dtype=torch.float64)
        width = (0.05 * self.condition**steps).sqrt()
        ones = torch.ones(2, self.dim, dtype=torch.float64)
        weights = torch.tensor([2 / 3, 1 / 3], dtype=torch.float64)
        return Components(weights, torch.tensor([[-1.0], [1.0]]) * ones, width * ones)
