"""SCDS, the self-consistent diffusion sampler (Jutras-Dube, Pynadath and Zhang 2025, arXiv:2502.07579, algorithms 2 to 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.noise import Noise
from fewstep.core.objective import Objective
from fewstep.core.reference import Reference
from fewstep.densities.losses._path import detached_paths
from fewstep.densities.students._maps import GuidedMap
from fewstep.densities.students._self import Learner, SelfDistillation, Shortest
from fewstep.densities.teachers._self_taught import SelfTaught
from fewstep.densities.whitened import Whitened


@dataclass(frozen=True)
class LogVarianceAndItself(SelfDistillation):
    """Log-variance on detached paths, then one Euler step against two halves with the same weights, held fixed."""

    def sampling(self, control: Shortest, noise: Noise) -> tuple[Tensor, Tensor]:
        """See `SelfDistillation`."""
        return detached_paths(self.target, control, self.kernels, noise)

    def value(self, log_w: Tensor) -> Tensor:
        """See `SelfDistillation`."""
        return log_w.var()

    def consistency(self, learner: Learner, y: Tensor, times: tuple[Tensor, Tensor, Tensor], noise: Noise) -> Tensor:
        """See `SelfDistillation`."""
        t, middle, s = times
        with torch.no_grad():
            wanted = learner.map(learner.map(y, t, middle), middle, s)
        return (learner.map(y, t, s) - wanted).square().mean()


@dataclass(frozen=True)
class SCDS(SelfTaught):
    """One network for every step size, trained on the density alone in two turns per iteration, on one optimiser.

    Samples are deterministic maps in 1, 2, 4, ..., `steps` steps, and their weights have the exact determinant of every step.
    The published estimate along these maps, a path weight of a diffusion, is not valid and not here. See `SelfTaught`.

    Attributes:
        euler: steps of Euler's method in t, as published; otherwise exponential ones, exact for a drift that stays.
    """

    steps: int = 128
    euler: bool = True

    reference = Reference(
        "Consistent Diffusion Samplers: One-Step Samples of Unnormalised Densities",
        "Jutras-Dube, Pascal and Pynadath, Patrick and Zhang, Ruqi",
        2025,
        "arXiv",
        "2502.07579",
    )

    def flow_map(self, whitened: Whitened) -> GuidedMap:
        """See `SelfTaught`."""
        return GuidedMap(self.schedule, whitened, self.net, self.euler)

    def objective(self, whitened: Whitened, loss: str) -> Objective:
        """See `Teacher`; there is one loss, "log_variance"."""
        self.check_loss(loss)
        return LogVarianceAndItself(whitened, self.kernels)
