"""The measurements of `fewstep bench images`: those of its table, and others, of which trained samplers have not seen some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fewstep.operators.base import Operator, Shape, Smaller, option
from fewstep.operators.image import deepinv_physics
from fewstep.operators.words import (
    Deblur,
    DeblurGaussian,
    DeblurMotion,
    DeblurUniform,
    InpaintBox,
    InpaintRandom,
    Jpeg,
    SuperResolution,
)

KERNELS = 8  # of Levin et al. 2009


class Task(NamedTuple):
    """An operator and the noise level of its measurements, in [0, 1] units; None where the operator adds none."""

    operator: Operator
    sigma: float | None

    def title(self, name: str) -> str:
        """Return the heading of the task's table."""
        noise = f", sigma {self.sigma:g}" if self.sigma is not None else ""
        return f"{name}: {self.operator.describe()}{noise}"


@dataclass(frozen=True)
class RandomSensing(Smaller):
    """Compressed sensing: pixels with random signs, an orthonormal sine transform, a square of its coefficients.

    The signs spread every image evenly over all coefficients, so which of them are kept does not matter.
    """

    word: ClassVar[str] = "random-sensing"
    summary: ClassVar[str] = "random projections: one of factor^2 is kept"
    factor: int = option(2, "edge of the image over that of the measurement")
    signs_seed: int = option(0, "seed of the signs")

    def build(self, image_shape: Shape, dtype: torch.dtype = torch.float32) -> Any:
        """See `Operator`."""
        library, (channels, h, w) = deepinv_physics(), image_shape
        small = (channels, h // self.factor, w // self.factor)

        def transform(x: Tensor) -> Tensor:
            rows = library.functional.dst1(x.contiguous())
            return library.functional.dst1(rows.mT.contiguous()).mT

        signs = torch.Generator().manual_seed(self.signs_seed)
        return library.StructuredRandom(
            tuple(image_shape), small, transform_func=transform, transform_func_inv=transform, rng=signs
        )

    def baseline(self, y: Any) -> Tensor:
        """Return A' y, which is A^+ y: the rows of A are orthonormal."""
        return self._physics(y).A_adjoint(y).clamp(0, 1)


TASKS: dict[str, Task] = {
    "deblur-gaussian": Task(DeblurGaussian(), 0.01),
    "deblur-gaussian-noisy": Task(DeblurGaussian(), 0.025),
    "deblur-uniform": Task(DeblurUniform(), 0.01),
    "deblur-motion": Task(DeblurMotion(), 0.01),
    "sr2": Task(SuperResolution(factor=2), 0.01),
    "sr4": Task(SuperResolution(factor=4), 0.01),
    "sr4-noisy": Task(SuperResolution(factor=4), 0.025),
    "inpaint-random": Task(InpaintRandom(rate=0.7), 0.025),
    "inpaint-box": Task(InpaintBox(size=64), 0.025),
    "jpeg10": Task(Jpeg(quality=10, step_std=0.0), None),
    "jpeg10-gaussian": Task(Jpeg(quality=10, step_std=0.2), None),
}
OTHERS: dict[str, Task] = {
    "jpeg75-gaussian": Task(Jpeg(quality=75, step_std=0.2), None),
    "jpeg92-gaussian": Task(Jpeg(quality=92, step_std=0.2), None),
    "deblur-gaussian-heavy": Task(DeblurGaussian(), 0.2),
    "sr3": Task(SuperResolution(factor=3), 0.01),
    "inpaint-random-90": Task(InpaintRandom(rate=0.9), 0.025),
    "inpaint-box-24": Task(InpaintBox(size=24), 0.025),
    "deblur-gaussian-valid": Task(DeblurGaussian(boundary="valid"), 0.01),
    "deblur-uniform-valid": Task(DeblurUniform(boundary="valid"), 0.01),
    "deblur-motion-valid": Task(DeblurMotion(boundary="valid"), 0.01),
    "random-sensing": Task(RandomSensing(), 0.01),
}


def named_tasks(names: Sequence[str] | None, kernels: str | Path | None = None) -> dict[str, Task]:
    """Return the tasks of these names: of `TASKS` (all of them where None), `OTHERS`, or deblur-levin1 to -levin8.

    Args:
        names: which.
        kernels: file of the eight kernels of Levin et al. 2009 (CVPR), for deblur-levin.

    Raises:
        ValueError: there is none of that name, or its kernels are missing.
    """
    if names is None:
        return TASKS
    levin = {f"deblur-levin{i + 1}": Task(Deblur(str(kernels or ""), i), 0.01) for i in range(KERNELS)}
    known = TASKS | OTHERS | levin
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown task {unknown[0]!r}; choose one of {', '.join(known)}")
    if kernels is None and (needy := [name for name in names if name in levin]):
        raise ValueError(f"{needy[0]} needs its kernels: give --kernels FILE")
    return {name: known[name] for name in names}


def with_sigma(task: Task, sigma: float | None) -> Task:
    """Return the task with another noise level, where one is given and the task has noise."""
    return task if sigma is None or task.sigma is None else Task(task.operator, sigma)
