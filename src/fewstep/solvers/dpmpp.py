r"""DPM-Solver++, multistep: the prediction of x_0 is a polynomial in lambda through the last one, two or three.

With h the step in lambda, r_0 h and r_1 h the two before it, p_1 = expm1(-h), p_2 = p_1 / h + 1, p_3 = p_2 / h - 1 / 2 and

    a = (D_0 - D_-1) / r_0,  b = (D_-1 - D_-2) / r_1,  D' = a + r_0 / (r_0 + r_1) (a - b),  D'' = 2 (a - b) / (r_0 + r_1)

the exact integral of the polynomial gives x_s = (sigma_s / sigma_t) x_t - alpha_s (p_1 D_0 - p_2 D' + p_3 D''). The paper's 2M
puts -p_1 / 2 for p_2, which keeps order 2. The released 3M has half of D'', which brings it down to order 2. A third-order run
also needs a first step of order 2: here the midpoint rule (2S), whose inner prediction then serves as a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core.batch import like
from fewstep.core.checks import one_of
from fewstep.core.multistep import X0, MultistepSolver, Point, Stage, interpolated, midpoint, row
from fewstep.core.schedule import Schedule
from fewstep.solvers._references import DPM_SOLVER_PP


@dataclass(frozen=True)
class DPMSolverPP(MultistepSolver):
    """DPM-Solver++ (1, 2M, 3M).

    Args:
        steps: steps, of one network call each; with three exact terms the first step makes two.
        terms: predictions that are combined, 1, 2 or 3.
        released: whether the second- and third-order terms are those of the public code instead of the exact ones.
        threshold: quantile of |D| per item beyond which D is clipped and rescaled (dynamic thresholding, for images in
            [-1, 1]); 1 is off, 0.995 the paper's value for pixels.
        grid: spacing of the times.
    """

    steps: int = 20
    terms: int = 2
    released: bool = True
    threshold: float = 1.0
    grid: str | tuple[float, ...] = "log_snr"

    form: ClassVar = X0
    limit: ClassVar = "the prior as steps grow"
    presets: ClassVar = {"paper": {}, "third-order": {"terms": 3, "released": False}}
    reference: ClassVar = DPM_SOLVER_PP

    def __post_init__(self) -> None:
        one_of("terms", self.terms, (1, 2, 3))
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must lie in (0, 1], got {self.threshold}")

    @property
    def order(self) -> int:
        """See `Solver`."""
        return min(self.terms, 2) if self.released else self.terms

    def stages(self, schedule: Schedule, nodes: Sequence[Point], s: Point) -> Sequence[Stage]:
        """See `MultistepSolver`."""
        known = nodes[: self.terms]
        if self.released and len(known) > 1:
            return [_released(known, s)]
        if self.order == 3 and len(known) == 1:
            return midpoint(schedule, nodes[0], s)
        return [interpolated(X0, schedule, known, s, lambda p: p.log_snr)]

    def on_prediction(self, prediction: Tensor, past: Sequence[Tensor]) -> Tensor:
        """See `MultistepSolver`; Imagen's dynamic thresholding (Saharia et al. 2022, arXiv:2205.11487, sec. 2.3)."""
        if self.threshold == 1:
            return prediction
        limit = like(torch.quantile(prediction.flatten(1).abs(), self.threshold, dim=1).clamp_min(1), prediction)
        return prediction.clamp(-limit, limit) / limit


def _released(nodes: Sequence[Point], s: Point) -> Stage:
    """Return the row of the public code for two or three predictions."""
    steps = [b.log_snr - a.log_snr for b, a in zip((s, *nodes), nodes, strict=False)]
    h, r0 = steps[0], steps[1] / steps[0]
    p1 = torch.expm1(-h)
    if len(nodes) == 2:
        return row(X0, nodes[0], s, (-p1 * (1 + 0.5 / r0), p1 * 0.5 / r0))
    r1 = steps[2] / h
    p2 = p1 / h + 1
    p3 = p2 / h - 0.5
    a, b = (p2 * (2 * r0 + r1) - p3) / (r0 + r1), (p3 - p2 * r0) / (r0 + r1)
    return row(X0, nodes[0], s, (-p1 + a / r0, b / r1 - a / r0, -b / r1))
