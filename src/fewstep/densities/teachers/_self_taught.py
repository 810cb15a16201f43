"""What samplers that distil themselves share: a guided map is trained on the density alone, and is what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from torch import nn

from fewstep.core.grid import uniform
from fewstep.core.noise import seeded
from fewstep.core.schedule import VariancePreserving
from fewstep.densities.base import DensitySampler
from fewstep.densities.paths import Kernels, exponential
from fewstep.densities.students._maps import GuidedMap, MapConfig
from fewstep.densities.students._sampler import MapSampler
from fewstep.densities.students._self import Learner
from fewstep.densities.teachers._base import Teacher
from fewstep.densities.whitened import Whitened


@dataclass(frozen=True)
class SelfTaught(Teacher):
    """A teacher of one map for every step size.

    Attributes:
        schedule: the noising process.
        steps: N, the shortest steps, a power of two.
        net: size of the network.
    """

    schedule: VariancePreserving = field(default_factory=lambda: VariancePreserving(0.1, 10.0))
    steps: int = 32
    net: MapConfig = field(default_factory=lambda: MapConfig(64, 2, "gelu", 0.0))

    def __post_init__(self) -> None:
        if self.steps < 2 or self.steps & (self.steps - 1):
            raise ValueError(f"steps must be a power of two, got {self.steps}")

    def flow_map(self, whitened: Whitened) -> GuidedMap:
        """Return an untrained map."""
        return GuidedMap(self.schedule, whitened, self.net)

    @property
    def kernels(self) -> Kernels:
        """The shortest steps."""
        return exponential(self.schedule, uniform(self.schedule, self.steps))

    def model(self, whitened: Whitened, seed: int) -> nn.Module:
        """See `Teacher`."""
        return seeded(lambda: Learner(self.flow_map(whitened)), seed)

    def sampler(self, whitened: Whitened, model: nn.Module) -> DensitySampler:
        """See `Teacher`."""
        flow_map = self.flow_map(whitened)
        flow_map.load_state_dict(cast(Learner, model).map.state_dict(), strict=True)
        return MapSampler(whitened, flow_map.eval().requires_grad_(False), grid="uniform")
