r"""LML: the direction of DDIM is turned by (m m' + lambda I)^-1 and brought back to its length.

With n the newest epsilon, p the one before, m = kappa p + (1 - kappa) n, and p = c n + u with u orthogonal to n, the turned
direction is proportional to

    (lambda + kappa^2 |u|^2) n - kappa (1 - kappa + kappa c) |n|^2 u.

This form does not cancel. The usual order, n - m <m, n> / (lambda + |m|^2), subtracts nearly equal vectors and in single precision
is about 10 % rounding at the published lambda. At kappa = 0, the released default, LML is DDIM exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewstep.core.batch import item_dot, like
from fewstep.core.multistep import EPSILON, MultistepSolver, Point, Stage, row
from fewstep.core.reference import Reference
from fewstep.core.schedule import Schedule


@dataclass(frozen=True)
class LML(MultistepSolver):
    """Levenberg-Marquardt-Langevin on DDIM.

    Args:
        steps: network calls.
        damping: the paper's lambda, positive, against squared norms of epsilon over an item.
        kappa: share of the direction before in m; 0 changes nothing.
        grid: spacing of the times.
    """

    steps: int = 20
    damping: float = 0.001
    kappa: float = 0.0
    grid: str | tuple[float, ...] = "uniform"

    form: ClassVar = EPSILON
    order: ClassVar = 1
    recall: ClassVar = 1
    limit: ClassVar = "the prior as steps grow; with kappa = 0 it is DDIM"
    reference: ClassVar = Reference(
        "Unleashing High-Quality Image Generation in Diffusion Sampling Using Second-Order Levenberg-Marquardt-Langevin",
        "Wang, Fangyikang and Yin, Hubery and Qian, Lei and Li, Yinan and Zhuang, Shaobin and Zhu, Huminhao and "
        "Zhang, Yilin and Tang, Yanlong and Zhang, Chao and Zhao, Hanbin and Qian, Hui and Li, Chen",
        2025,
        "IEEE/CVF International Conference on Computer Vision",
        "2505.24222",
    )

    def __post_init__(self) -> None:
        if self.damping <= 0 or not 0 <= self.kappa < 1:
            raise ValueError(f"damping must be positive and kappa lie in [0, 1), got {self.damping} and {self.kappa}")

    def stages(self, schedule: Schedule, nodes: Sequence[Point], s: Point) -> Sequence[Stage]:
        """See `MultistepSolver`."""
        return [row(EPSILON, nodes[0], s, (s.ratio - nodes[0].ratio,))]

    def on_prediction(self, prediction: Tensor, past: Sequence[Tensor]) -> Tensor:
        """See `MultistepSolver`; (N, *event), of the length of `prediction` item by item."""
        if not past:
            return prediction
        n, p, kappa = prediction.double(), past[0].double(), self.kappa
        length = item_dot(n, n)
        along = item_dot(p, n) / length
        u = p - like(along, n) * n
        keep = self.damping + kappa**2 * item_dot(u, u)
        turned = like(keep, n) * n - like(kappa * (1 - kappa + kappa * along) * length, n) * u
        return (turned * like((length / item_dot(turned, turned)).sqrt(), n)).to(prediction.dtype)
