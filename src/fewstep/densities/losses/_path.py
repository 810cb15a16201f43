"""What the losses on path weights share: who is trained, how weights are had, which of them count."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from fewstep.core.density import TargetDensity
from fewstep.core.noise import Noise
from fewstep.core.objective import Objective
from fewstep.densities.estimators import weights
from fewstep.densities.networks import Control, ControlNet
from fewstep.densities.paths import Kernels, log_backward, log_forward, walk

LOWEST = -1e8  # paths of smaller log-weight say nothing but that the target could not be evaluated


@dataclass(frozen=True)
class PathLoss(Objective):
    """A loss on the log-weights of paths.

    Attributes:
        target: the density in whitened coordinates.
        kernels: the steps of the paths.
    """

    target: TargetDensity
    kernels: Kernels

    def log_weights(self, control: ControlNet, noise: Noise) -> Tensor:
        """Return the log-weights of a batch of paths, (n,) float64, differentiable in the control; the paths are constants here."""
        return detached_paths(self.target, control, self.kernels, noise)[0]

    @abstractmethod
    def value(self, control: ControlNet, log_w: Tensor) -> Tensor:
        """Return the loss, (), of finite log-weights."""

    @final
    def loss(self, player: str, model: nn.Module, batch: Any, noise: Noise) -> tuple[Tensor, dict[str, float]]:
        """See `Objective`; paths of weight zero or NaN are left out, their share is a figure."""
        control = cast(ControlNet, model)
        log_w = self.log_weights(control, noise)
        good = log_w.detach().isfinite() & (log_w.detach() > LOWEST)
        share = float(good.double().mean())
        if share * len(log_w) < 2:
            raise FloatingPointError("the target is not finite on (almost) all paths; check it, or its scale")
        log_w = log_w[good]
        known = log_w.detach()
        figures = {"elbo": float(known.mean()), "log_z": weights.log_mean(known), "ess": weights.ess(known)}
        return self.value(control, log_w), {**figures, "usable": share}


def detached_paths(target: TargetDensity, control: Control, kernels: Kernels, noise: Noise) -> tuple[Tensor, Tensor]:
    """Return log-weights of paths that are constants, (n,), and their points, (N + 1, n, d).

    The control is called along the paths without gradients, and once at all their points with.
    """
    with torch.no_grad():
        path = walk(control, kernels, noise)
        fixed = target.log_prob(path.points[-1]).double() + log_backward(kernels, path.points)
    return fixed - log_forward(control, kernels, path), path.points
