"""Time grids: `steps` + 1 times from 1 down to 0, float64, named by how they are spaced."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.core.schedule import Schedule

Grid = Callable[[Schedule, int], Tensor]


def uniform(schedule: Schedule, steps: int) -> Tensor:
    """Return times evenly spaced in t."""
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def quadratic(schedule: Schedule, steps: int) -> Tensor:
    """Return times whose square roots are evenly spaced: finer near the data."""
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** 2


def _by_ratio(schedule: Schedule, ratios: Tensor) -> Tensor:
    """Return the times of falling noise ratios, ended by t = 0."""
    return torch.cat([schedule.time(ratios).clamp(0, 1), ratios.new_zeros(1)])


def _ends(schedule: Schedule, lowest: float = 0.01) -> tuple[Tensor, Tensor]:
    high = schedule.ratio(torch.ones((), dtype=torch.float64))
    return high, schedule.ratio(torch.zeros((), dtype=torch.float64)).clamp_min(lowest)


def log_snr(schedule: Schedule, steps: int) -> Tensor:
    """Return times evenly spaced in log(alpha/sigma) down to a ratio of 0.01, then 0."""
    high, low = _ends(schedule)
    return _by_ratio(schedule, torch.exp(torch.linspace(0, 1, steps, dtype=torch.float64) * (low / high).log()) * high)


def edm(schedule: Schedule, steps: int, rho: float = 7.0) -> Tensor:
    """Return the times of Karras et al. (2022, arXiv:2206.00364, eq. 5) down to a ratio of 0.01, then 0."""
    high, low = (end ** (1 / rho) for end in _ends(schedule))
    return _by_ratio(schedule, (high + torch.linspace(0, 1, steps, dtype=torch.float64) * (low - high)) ** rho)


GRIDS: dict[str, Grid] = {"uniform": uniform, "quadratic": quadratic, "log_snr": log_snr, "edm": edm}
