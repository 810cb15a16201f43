r"""OSDS, one-step samplers by self-distillation with volumes (Jutras-Dube et al. 2025, arXiv:2512.05251), the successor of SCDS.

Three changes: sampling minimises the relative entropy through the simulation, the two half steps are those of an averaged copy,
and one step must change volumes as two half steps do. The paper's weights take the trace of a step for the logarithm of its
determinant, which is biased at few steps; those of `MapSampler` are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fewstep.core.batch import item_dot
from fewstep.core.noise import Noise
from fewstep.core.objective import Objective
from fewstep.core.reference import Reference
from fewstep.densities.paths import simulate
from fewstep.densities.students._maps import FlowMap
from fewstep.densities.students._self import Learner, SelfDistillation, Shortest
from fewstep.densities.teachers._self_taught import SelfTaught
from fewstep.densities.whitened import Whitened


@dataclass(frozen=True)
class EntropyAndVolume(SelfDistillation):
    """-E log w through the simulation, then one step against two halves of the averaged copy, points and volumes.

    Attributes:
        decay: of the copy.
        weight: of the consistency of points and of volumes, reached after `ramp` steps.
        ramp: steps over which the weight grows.
        penalty: of the squared Jacobian of a step.
    """

    decay: float = 0.999
    weight: float = 0.25
    ramp: int = 2500
    penalty: float = 1e-4

    def sampling(self, control: Shortest, noise: Noise) -> tuple[Tensor, Tensor]:
        """See `SelfDistillation`."""
        paths = simulate(control, self.kernels, noise, keep=True)
        return paths.log_weights(self.target), cast(Tensor, paths.points)

    def value(self, log_w: Tensor) -> Tensor:
        """See `SelfDistillation`."""
        return -log_w.mean()

    def consistency(self, learner: Learner, y: Tensor, times: tuple[Tensor, Tensor, Tensor], noise: Noise) -> Tensor:
        """See `SelfDistillation`; one probe of signs, the same for all three steps."""
        learner.follow(self.decay)
        (t, middle, s), probe = times, (noise.rand(y.shape[1])[: len(y)] < 0.5).to(y) * 2 - 1
        with torch.no_grad():
            half, first, _ = stretched(learner.target, y, t, middle, probe)
            wanted, second, _ = stretched(learner.target, half, middle, s, probe)
        got, trace, action = stretched(learner.map, y, t, s, probe)
        volume = (trace - first - second).square().mean() / y.shape[1]
        ramp = min(1.0, float(learner.turn) / self.ramp)
        return ramp * self.weight * ((got - wanted).square().mean() + volume) + self.penalty * action.square().mean()


def stretched(flow_map: FlowMap, y: Tensor, t: Tensor, s: Tensor, probe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return y_s, (n, d), v'(DG - I)v, (n,), an estimate of log|det DG| for short steps, and (DG - I)v, (n, d)."""
    moved, tangent = torch.func.jvp(lambda x: flow_map(x, t, s), (y,), (probe,))[:2]
    action = tangent - probe
    return moved, item_dot(probe, action), action


@dataclass(frozen=True)
class OSDS(SelfTaught):
    """One network for every step size, trained by relative entropy and by agreement with its own average; see `SCDS`.

    The simulation of the shortest steps is differentiated through. See `SelfTaught`.

    Attributes:
        decay: of the averaged copy.
        ramp: steps over which consistency gains its weight.
    """

    decay: float = 0.999
    ramp: int = 2500

    reference = Reference(
        "One-Step Diffusion Samplers via Self-Distillation and Deterministic Flow",
        "Jutras-Dube, Pascal and Zhang, Jiaru and Wang, Ziran and Zhang, Ruqi",
        2025,
        "AISTATS",
        "2512.05251",
    )
    default_loss = "kl"

    def objective(self, whitened: Whitened, loss: str) -> Objective:
        """See `Teacher`; there is one loss, "kl"."""
        self.check_loss(loss)
        return EntropyAndVolume(whitened, self.kernels, self.decay, ramp=self.ramp)
