"""SCDS, the self-consistent diffusion sampler (Jutras-Dube, Pynadath and Zhang 2025, arXiv:2502.07579, algorithms 2 to 4)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from fewstep.core.grid import uniform
from fewstep.core.noise import Noise, seeded
from fewstep.core.objective import Objective
from fewstep.core.reference import Reference
from fewstep.core.schedule import VariancePreserving
from fewstep.densities.base import DensitySampler
from fewstep.densities.losses._path import detached_paths
from fewstep.densities.paths import exponential
from fewstep.densities.students._maps import GuidedMap, MapConfig
from fewstep.densities.students._sampler import MapSampler
from fewstep.densities.students._self import Learner, SelfDistillation, Shortest
from fewstep.densities.teachers._base import Teacher
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
class SCDS(Teacher):
    """One network for every step size, trained on the density alone in two turns per iteration, on one optimiser.

    Samples are deterministic maps in 1, 2, 4, ..., `steps` steps, and their weights have the exact determinant of every step.
    The published estimate along these maps, a path weight of a diffusion, is not valid and not here.

    Attributes:
        schedule: the noising process.
        steps: N, the shortest steps, a power of two.
        net: size of the network.
        euler: steps of Euler's method in t, as published; otherwise exponential ones, exact for a drift that stays.
    """

    schedule: VariancePreserving = field(default_factory=lambda: VariancePreserving(0.1, 10.0))
    steps: int = 128
    net: MapConfig = field(default_factory=lambda: MapConfig(64, 2, "gelu", 0.0))
    euler: bool = True

    reference = Reference(
        "Consistent Diffusion Samplers: One-Step Samples of Unnormalised Densities",
        "Jutras-Dube, Pascal and Pynadath, Patrick and Zhang, Ruqi",
        2025,
        "arXiv",
        "2502.07579",
    )

    def __post_init__(self) -> None:
        if self.steps < 2 or self.steps & (self.steps - 1):
            raise ValueError(f"steps must be a power of two, got {self.steps}")

    def model(self, whitened: Whitened, seed: int) -> nn.Module:
        """See `Teacher`."""
        return seeded(lambda: Learner(GuidedMap(self.schedule, whitened, self.net, self.euler)), seed)

    def objective(self, whitened: Whitened, loss: str) -> Objective:
        """See `Teacher`; there is one loss, "log_variance"."""
        if loss != self.default_loss:
            raise ValueError(f"SCDS has one loss, {self.default_loss!r}, not {loss!r}")
        return LogVarianceAndItself(whitened, exponential(self.schedule, uniform(self.schedule, self.steps)))

    def sampler(self, whitened: Whitened, model: nn.Module) -> DensitySampler:
        """See `Teacher`."""
        flow_map = GuidedMap(self.schedule, whitened, self.net, self.euler)
        flow_map.load_state_dict(cast(Learner, model).map.state_dict(), strict=True)
        return MapSampler(whitened, flow_map.eval().requires_grad_(False), grid="uniform")
