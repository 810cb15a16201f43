r"""DualFast: the newest prediction is pushed away from an earlier, noisier one in the first-order step.

    epsilon' = (1 + c) epsilon(x_t, t) - c epsilon(x_tau, tau),    tau the step before

The published schedule of c is not known, so c is a constant here. At c = 1/2 on a grid even in rho this is Adams-Bashforth 2: on
an exact denoiser the gain is one of discretisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fewstep.core.multistep import EPSILON, MultistepSolver, Point, Stage, row
from fewstep.core.reference import Reference
from fewstep.core.schedule import Schedule


@dataclass(frozen=True)
class DualFast(MultistepSolver):
    """DDIM with DualFast.

    Args:
        steps: network calls.
        c: weight of the earlier prediction; 0 is DDIM.
        grid: spacing of the times.
    """

    steps: int = 20
    c: float = 0.5
    grid: str | tuple[float, ...] = "uniform"

    form: ClassVar = EPSILON
    limit: ClassVar = "the prior as steps grow; of order 2 for c = 1/2 on grids even in sigma/alpha, else of order 1"
    reference: ClassVar = Reference(
        "DualFast: Dual-Speedup Framework for Fast Sampling of Diffusion Models",
        "Yu, Hu and Luo, Hao and Wang, Fan and Zhao, Feng",
        2025,
        "arXiv preprint",
        "2506.13058",
    )

    @property
    def order(self) -> int:
        """See `Solver`."""
        return 2 if self.c == 0.5 else 1

    def stages(self, schedule: Schedule, nodes: Sequence[Point], s: Point) -> Sequence[Stage]:
        """See `MultistepSolver`."""
        t, weights = nodes[0], (1 + self.c, -self.c) if len(nodes) > 1 else (1.0,)
        return [row(EPSILON, t, s, [(s.ratio - t.ratio) * w for w in weights])]
