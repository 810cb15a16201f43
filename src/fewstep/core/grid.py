"""Time grids: `steps` + 1 times from 1 down to 0, float64, named by how they are spaced."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.core.checks import one_of
from fewstep.core.schedule import Schedule

Grid = Callable[[Schedule, int], Tensor]


def uniform(schedule: Schedule, steps: int) -> Tensor:
    """Return times evenly spaced in t."""
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def quadratic(schedule: Schedule, steps: int) -> Tensor:
    """Return times whose square roots are evenly spaced: finer near the data."""
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64) ** 2


def spaced(high: Tensor, low: Tensor, count: int, rho: float = 7.0) -> Tensor:
    """Return `count` falling ratios from `high` to `low`, even in ratio^(1/rho) (Karras et al. 2022, eq. 5), float64."""
    first, last = (end.double() ** (1 / rho) for end in (high, low))
    return (first + torch.linspace(0, 1, count, dtype=torch.float64) * (last - first)) ** rho


def _by_ratio(schedule: Schedule, ratios: Tensor) -> Tensor:
    """Return the times of falling noise ratios, ended by t = 0."""
    return torch.cat([schedule.time(ratios).clamp(0, 1), ratios.new_zeros(1)])


def lowest_ratio(schedule: Schedule) -> Tensor:
    """Return the least noise ratio whose time is above 0 in spite of rounding, () float64; 0 where the schedule begins there."""
    return schedule.ratio(torch.zeros((), dtype=torch.float64)) * (1 + 1e-9)


def _ends(schedule: Schedule, lowest: float = 0.01) -> tuple[Tensor, Tensor]:
    high = schedule.ratio(torch.ones((), dtype=torch.float64))
    return high, lowest_ratio(schedule).clamp_min(lowest)


def log_snr(schedule: Schedule, steps: int) -> Tensor:
    """Return times evenly spaced in log(alpha/sigma) down to a ratio of 0.01, then 0."""
    high, low = _ends(schedule)
    return _by_ratio(schedule, torch.exp(torch.linspace(0, 1, steps, dtype=torch.float64) * (low / high).log()) * high)


def edm(schedule: Schedule, steps: int, rho: float = 7.0) -> Tensor:
    """Return the times of Karras et al. (2022, arXiv:2206.00364, eq. 5) down to a ratio of 0.01, then 0."""
    return _by_ratio(schedule, spaced(*_ends(schedule), steps, rho))


def arctan(schedule: Schedule, steps: int) -> Tensor:
    """Return the times that are best for first-order steps on N(0, 0.5^2 I), down to a ratio of 0.01, then 0.

    arctan(ratio / 0.5) is evenly spaced (Sabour et al. 2024, arXiv:2404.14507, theorem 3.1).
    """
    spread = 0.5
    high, low = (torch.atan(end / spread) for end in _ends(schedule))
    angles = high + torch.linspace(0, 1, steps, dtype=torch.float64) * (low - high)
    return _by_ratio(schedule, spread * torch.tan(angles))


def angle(schedule: Schedule, steps: int, power: float = 1.0) -> Tensor:
    """Return times of evenly spaced arctan(ratio)^(1/power), so that every second time of 2 n steps is one of n."""
    high, low = (torch.atan(end) for end in _ends(schedule, 0.0))
    shares = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1] ** power
    return _by_ratio(schedule, torch.tan(low + (high - low) * shares))


GRIDS: dict[str, Grid] = {
    "uniform": uniform,
    "quadratic": quadratic,
    "log_snr": log_snr,
    "edm": edm,
    "arctan": arctan,
    "angle": angle,
}


def times_of(grid: str | tuple[float, ...], schedule: Schedule, steps: int) -> Tensor:
    """Return the `steps` + 1 falling times of a grid, (steps + 1,) float64.

    Args:
        grid: a name in `GRIDS`, or the times themselves, from at most 1 down to at least 0. Times of another number are
            resampled: log(ratio) is interpolated linearly in the share of steps done, and an end at 0 stays one step.
        schedule: the noise schedule.
        steps: the number of steps.

    Raises:
        ValueError: an unknown name, or times that do not fall within [0, 1] or are too few to be resampled.
    """
    if isinstance(grid, str):
        one_of("grid", grid, GRIDS)
        return GRIDS[grid](schedule, steps)
    times = torch.tensor(grid, dtype=torch.float64)
    if len(times) < 2 or not bool((times[1:] < times[:-1]).all()) or float(times[0]) > 1 or float(times[-1]) < 0:
        raise ValueError(f"the times of a grid must fall strictly within [0, 1], got {grid}")
    if len(times) == steps + 1:
        return times
    if int((times > 0).sum()) < 2:
        raise ValueError(f"a grid of {len(times)} times cannot be resampled to {steps} steps: two must be above 0")
    return _resampled(times, schedule, steps)


def _resampled(times: Tensor, schedule: Schedule, steps: int) -> Tensor:
    ends = times[-1] == 0
    inner, count = (times[:-1], steps) if ends else (times, steps + 1)
    place = torch.linspace(0, len(inner) - 1, count, dtype=torch.float64)
    low = place.floor().clamp(0, len(inner) - 2).long()
    logs = schedule.ratio(inner).log()
    logs = logs[low] + (place - low) * (logs[low + 1] - logs[low])
    ratios = schedule.time(torch.exp(logs)).clamp(0, 1)
    return torch.cat([ratios, times[-1:]]) if ends else ratios
