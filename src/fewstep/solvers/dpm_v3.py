r"""DPM-Solver-v3: the linear part of the flow and of its integrand is fitted to the prior before it is integrated exactly.

With z = x / alpha, f = (1 - l) z - D and coefficients l, s, b of lambda, one per coordinate, dz/dlambda = -(l z + f), and f is
taken to follow df/dlambda = s f + b but for a factor g, which is interpolated. With L, S, B the integrals of l, s and e^-S b,

    f = e^(S - S_t) (g + e^(S_t) (B - B_t)),    z_s = e^(L_t - L_s) z_t - e^(-L_s) int_t^s e^L f dlambda.

(l, s, b) = (1, 0, 0) is DPM-Solver++. For N(m, diag v), l = sigma^2 / (alpha^2 v + sigma^2) with b = f' makes one step exact.
This is the predictor alone, without the paper's corrector; `estimate` gives the statistics of any prior.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core.checks import one_of
from fewstep.core.multistep import X0, MultistepSolver, Point, Stage, lagrange, quadrature
from fewstep.core.reference import Reference
from fewstep.core.schedule import Schedule
from fewstep.solvers._statistics import Statistics, estimate

__all__ = ["DPMSolverV3", "Statistics", "estimate"]


@dataclass(frozen=True)
class DPMSolverV3(MultistepSolver):
    """DPM-Solver-v3, predictor.

    Args:
        steps: network calls.
        order: predictions that are combined, 1 to 3.
        statistics: of the prior; without them it is DPM-Solver++ with exact terms.
        grid: spacing of the times.
    """

    steps: int = 10
    order: int = 3
    statistics: Statistics | None = None
    grid: str | tuple[float, ...] = "log_snr"

    form: ClassVar = X0
    limit: ClassVar = "the prior as steps grow"
    reference: ClassVar = Reference(
        "DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model Statistics",
        "Zheng, Kaiwen and Lu, Cheng and Chen, Jianfei and Zhu, Jun",
        2023,
        "Advances in Neural Information Processing Systems",
        "2310.13268",
    )

    def __post_init__(self) -> None:
        one_of("order", self.order, (1, 2, 3))

    def stages(self, schedule: Schedule, nodes: Sequence[Point], s: Point) -> Sequence[Stage]:
        """See `MultistepSolver`."""
        table, known, t = self.statistics or Statistics.neutral(), nodes[: self.order], nodes[0]
        log_snr, weights = quadrature(t.log_snr, s.log_snr)
        _, l_q, s_q, b_q = table.at(log_snr)
        (_, l_t, s_t, b_t), (_, l_s, _, _) = table.at(t.log_snr), table.at(s.log_snr)
        column = (-1, *[1] * (l_q.ndim - 1))
        measure = weights.reshape(column) * torch.exp(l_q - l_s + s_q - s_t)
        offset = -(measure * torch.exp(s_t) * (b_q - b_t)).sum(0)
        x: list[Tensor] = [torch.exp(l_t - l_s) / t.alpha]
        predictions: list[Tensor] = []
        for node, polynomial in zip(known, lagrange(log_snr, [n.log_snr for n in known]), strict=True):
            l_j, _, s_j, b_j = table.at(node.log_snr)
            weight = (measure * polynomial.reshape(column)).sum(0)
            share = weight * torch.exp(s_t - s_j)
            x = [*x, torch.zeros_like(share)] if predictions else x
            x[-1] = x[-1] - share * (1 - l_j) / node.alpha
            predictions.append(share)
            offset = offset + weight * torch.exp(s_t) * (b_j - b_t)
        left, right = (tuple(s.alpha * _row(c) for c in side) for side in (x, predictions))
        return [Stage(s, left, right, offset=s.alpha * _row(offset))]


def _row(coefficient: Tensor) -> Tensor:
    """Return a coefficient per coordinate as (1, *event), one for all as it is."""
    return coefficient[None] if coefficient.ndim else coefficient
