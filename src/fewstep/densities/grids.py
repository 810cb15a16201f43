"""Time grids of samplers of densities: those of `core.grid`, and some of their own."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from fewstep.core import grid as general
from fewstep.core.schedule import Schedule
from fewstep.densities.paths import even_variance, falling_cosine

OWN: dict[str, general.Grid] = {
    "variance": even_variance,
    "cosine": falling_cosine,
    "angle_squared": partial(general.angle, power=2.0),
}
GRIDS = {**OWN, **general.GRIDS}


def times_of(grid: str | tuple[float, ...], schedule: Schedule, steps: int) -> Tensor:
    """Return the `steps` + 1 falling times of a grid of `GRIDS`, or those given; see `core.grid.times_of`."""
    own = OWN.get(grid) if isinstance(grid, str) else None
    return own(schedule, steps) if own else general.times_of(grid, schedule, steps)
