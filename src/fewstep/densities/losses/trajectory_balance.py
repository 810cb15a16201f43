"""Trajectory balance with a learned normaliser (Malkin et al. 2022, arXiv:2201.13259; Sendera et al. 2024, arXiv:2402.05098)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewstep.densities.losses._path import PathLoss
from fewstep.densities.networks import ControlNet


@dataclass(frozen=True)
class TrajectoryBalance(PathLoss):
    """E[(log Z_theta - log w)^2] / 2 over paths that are constants; zero where log w = log Z_theta; see `PathLoss`.

    Attributes:
        rate: how much faster log Z_theta moves than the network, for optimisers whose steps do not grow with gradients.
    """

    rate: float = 100.0

    def value(self, control: ControlNet, log_w: Tensor) -> Tensor:
        """See `PathLoss`."""
        return (self.rate * control.log_z.double() - log_w).square().mean() / 2
