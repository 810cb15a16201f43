"""The relative entropy of model paths to target paths, less log Z: minus the ELBO (Zhang and Chen 2022, arXiv:2111.15141)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewstep.core.noise import Noise
from fewstep.densities.losses._path import PathLoss
from fewstep.densities.networks import ControlNet
from fewstep.densities.paths import simulate


@dataclass(frozen=True)
class KL(PathLoss):
    """-E[log w], with gradients through the whole simulation; its minimum is -log Z; see `PathLoss`."""

    def log_weights(self, control: ControlNet, noise: Noise) -> Tensor:
        """See `PathLoss`."""
        return simulate(control, self.kernels, noise).log_weights(self.target)

    def value(self, control: ControlNet, log_w: Tensor) -> Tensor:
        """See `PathLoss`."""
        return -log_w.mean()
