"""DIS, the time-reversed diffusion sampler (Berner, Richter and Ullrich 2024, arXiv:2211.01364)."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.core.reference import Reference
from fewstep.densities.teachers._base import PathTeacher


@dataclass(frozen=True)
class DIS(PathTeacher):
    """A learned reversal of a variance-preserving noising process, from N(0, I) to the target.

    The network starts as an interpolation between the score of N(0, I) and that of the target. As published: Euler steps on
    a uniform grid of 128 times with beta from 0.1 to 10. The defaults are exact kernels on a grid by variance, with learned
    widths, which give better weights from fewer steps. See `PathTeacher`.
    """

    reference = Reference(
        "An optimal control perspective on diffusion-based generative modeling",
        "Berner, Julius and Richter, Lorenz and Ullrich, Karen",
        2024,
        "TMLR",
        "2211.01364",
    )
