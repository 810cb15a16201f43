r"""DDIM, and ancestral sampling at eta = 1.

    x_s = alpha_s D + sqrt(sigma_s^2 - std^2) epsilon + std z,    std = eta sqrt(Var[x_s | x_t, x_0])

At eta = 0 this is the exponential integrator of order 1 in either prediction; at eta = 1 it is the reverse SDE's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fewstep.core.kernel import bridge
from fewstep.core.multistep import X0, MultistepSolver, Point, Stage
from fewstep.core.reference import Reference
from fewstep.core.schedule import Schedule


@dataclass(frozen=True)
class DDIM(MultistepSolver):
    """Denoising diffusion implicit model.

    Args:
        steps: network calls.
        eta: share of the bridge's standard deviation that is drawn afresh; 0 is the probability flow, 1 ancestral.
        grid: spacing of the times.
    """

    steps: int = 50
    eta: float = 0.0
    grid: str | tuple[float, ...] = "uniform"

    form: ClassVar = X0
    order: ClassVar = 1
    limit: ClassVar = "the prior as steps grow"
    presets: ClassVar = {"paper": {}, "ancestral": {"eta": 1.0, "steps": 1000}}
    reference: ClassVar = Reference(
        "Denoising Diffusion Implicit Models",
        "Song, Jiaming and Meng, Chenlin and Ermon, Stefano",
        2021,
        "International Conference on Learning Representations",
        "2010.02502",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta}")

    def stages(self, schedule: Schedule, nodes: Sequence[Point], s: Point) -> Sequence[Stage]:
        """See `MultistepSolver`."""
        t = nodes[0]
        kept, fresh = bridge(schedule, t.t, s.t, self.eta)
        return [Stage(s, (kept / t.sigma,), (s.alpha - kept * t.alpha / t.sigma,), fresh)]
