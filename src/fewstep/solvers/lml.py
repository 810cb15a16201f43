r"""LML: the direction of DDIM is turned by (m m' + lambda I)^-1 and brought back to its length.

With n the newest epsilon, p the one before, m = kappa p + (1 - kappa) n, and p = c n + u with u orthogonal to n, the turned
direction is proportional to

    (lambda + kappa^2 |u|^2) n - kappa (1 - kappa + kappa c) |n|^2 u.

This form does not cancel. The usual order, n - m <m, n> / (lambda + |m|^2), subtracts nearly equal vectors and in single precision
is about 10 % rounding at the published lambda. At kappa = 0, the released default, LML is DDIM exactly. With kappa > 0 it tends
to DDIM as u, which shrinks with the step, becomes small: by about kappa |n| |u| / lambda, which must be far below 1. At the
published lambda that takes more steps than anybody makes.
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
        kappa: share of the epsilon before in m; 0 changes nothing.
        grid: spacing of the times.
    """

    steps: int = 20
    damping: float = 0.001
    kappa: float = 0.0
    grid: str | tuple[float, ...] = "uniform"

    form: ClassVar = EPSILON
    order: ClassVar = 1
    recall: ClassVar = 1
    limit: ClassVar = "the prior as steps grow; DDIM at kappa = 0, else only once kappa |n| |u| is far below damping"
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

    def direction(self, kept: Sequence[Tensor]) -> Tensor:
        """See `MultistepSolver`; turned, item by item of the length of the newest."""
        if len(kept) == 1:
            return kept[0]
        n, p, kappa = kept[0].double(), kept[1].double(), self.kappa
        length = item_dot(n, n)
        along = item_dot(p, n) / length
        u = p - like(along, n) * n
        keep = self.damping + kappa**2 * item_dot(u, u)
        turned = like(keep, n) * n - like(kappa * (1 - kappa + kappa * along) * length, n) * u
        return (turned * like((length / item_dot(turned, turned)).sqrt(), n)).to(kept[0].dtype)
