"""DDS, the denoising diffusion sampler (Vargas, Grathwohl and Doucet 2023, arXiv:2302.13834)."""

from __future__ import annotations

from dataclasses import dataclass, field

from fewstep.core.reference import Reference
from fewstep.densities.networks import NetConfig
from fewstep.densities.teachers._base import PathTeacher


@dataclass(frozen=True)
class DDS(PathTeacher):
    """A controlled Ornstein-Uhlenbeck process that starts in its stationary law, with steps that shrink as cos^4.

    With the discretisation "exponential" these are the paper's kernels, with "euler" those of its reimplementations. The
    network starts at the uncontrolled process. See `PathTeacher`.
    """

    reference = Reference(
        "Denoising Diffusion Samplers",
        "Vargas, Francisco and Grathwohl, Will and Doucet, Arnaud",
        2023,
        "International Conference on Learning Representations",
        "2302.13834",
    )
    default_loss = "kl"
    grid: str | tuple[float, ...] = "cosine"
    net: NetConfig = field(default_factory=lambda: NetConfig(gain=0.01))
