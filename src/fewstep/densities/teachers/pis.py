"""PIS, the path integral sampler (Zhang and Chen 2022, arXiv:2111.15141)."""

from __future__ import annotations

from dataclasses import dataclass, field

from fewstep.core.reference import Reference
from fewstep.core.schedule import Brownian, Schedule
from fewstep.densities.networks import NetConfig
from fewstep.densities.teachers._base import PathTeacher


@dataclass(frozen=True)
class PIS(PathTeacher):
    """A controlled Brownian motion that starts at 0, in coordinates where it keeps variance one.

    Over sqrt(r), r = 1 - t, the motion that is pinned to x_0 at r = 1 has alpha = sqrt(r) and sigma = sqrt(1 - r). Its exact
    kernels are the paper's Euler steps, and the draw at t = 1 has weight one whatever it is. See `PathTeacher`.
    """

    reference = Reference(
        "Path Integral Sampler: A Stochastic Control Approach For Sampling",
        "Zhang, Qinsheng and Chen, Yongxin",
        2022,
        "International Conference on Learning Representations",
        "2111.15141",
    )
    default_loss = "kl"
    schedule: Schedule = field(default_factory=Brownian)
    net: NetConfig = field(default_factory=lambda: NetConfig(gain=0.01))
