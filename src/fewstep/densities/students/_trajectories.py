r"""A teacher's probability flow from noise to data, and training pairs from it.

In z = y / alpha and r = sigma / alpha the flow reads dz/dr = (z - D) / r for any denoiser D: a trained control, LRDS, or a
`MixturePrior` fitted to draws of MCMC or SMC. Heun's steps in r are exact where D is constant.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fewstep.core.batch import like
from fewstep.core.denoiser import Denoiser
from fewstep.core.noise import Streams, mix


@torch.no_grad()
def flow_points(denoiser: Denoiser, y: Tensor, times: Tensor, order: int = 2) -> Tensor:
    """Return the flow's points at all `times`, (steps + 1, N, d), from y at the first, (N, d).

    Args:
        denoiser: the teacher.
        y: (N, d).
        times: falling, (steps + 1,) float64.
        order: 2 is Heun's method in the noise ratio, 1 Euler's. The step to a ratio of 0 is Euler's.
    """
    schedule = denoiser.schedule
    ratios, alphas = schedule.ratio(times), schedule(times)[0]
    z, points = y / float(alphas[0]), [y]

    def slope(z: Tensor, k: int) -> Tensor:
        return (z - denoiser(float(alphas[k]) * z, times[k].to(z.dtype))) / float(ratios[k])

    for k in range(len(times) - 1):
        change, first = float(ratios[k + 1] - ratios[k]), slope(z, k)
        if order == 2 and float(ratios[k + 1]) > 0:
            first = (first + slope(z + change * first, k + 1)) / 2
        z = z + change * first
        points.append(float(alphas[k + 1]) * z)
    return torch.stack(points)


@torch.no_grad()
def euler_in_time(denoiser: Denoiser, y: Tensor, times: Tensor) -> Tensor:
    """Return the flow's points, (steps + 1, N, d), by Euler's method in t itself, as the papers have it.

    dy/dt = alpha' D + sigma' epsilon; `times` falling, (steps + 1,) float64.
    """
    schedule = denoiser.schedule
    (alphas, sigmas), (alpha_slopes, sigma_slopes) = torch.func.jvp(schedule, (times,), (torch.ones_like(times),))[:2]
    points = [y]
    for k in range(len(times) - 1):
        x0 = denoiser(y, times[k].to(y.dtype))
        epsilon = (y - like(alphas[k], y) * x0) / like(sigmas[k], y)
        y = y + like(times[k + 1] - times[k], y) * (like(alpha_slopes[k], y) * x0 + like(sigma_slopes[k], y) * epsilon)
        points.append(y)
    return torch.stack(points)


@dataclass(frozen=True, eq=False)
class Trajectories:
    """Pairs of points on the teacher's trajectories, as batches for the trainer.

    A shard of trajectories is computed once and serves many steps. A pair is (y_t, t, y_s, s) with t > s; a share `direct` of the
    items is the whole way, the others are steps of all lengths: half of the way, a quarter, down to one level. What step k
    sees depends on (seed, k) only.

    Attributes:
        denoiser: the teacher, in whitened coordinates.
        times: the fine grid of the solver, (steps + 1,) float64, from 1 to 0.
        every: fine steps from one level to the next; divides their number, by a power of two.
        batch_size: items per step.
        rows: trajectories per shard.
        refresh: steps that one shard serves.
        direct: share of items that go from t = 1 to 0.
        order: of the solver, see `flow_points`.
        seed: of all of it.
        apart: how far from each trajectory, along a coordinate, a second one starts that shows how the flow shrinks; 0 is none.
    """

    denoiser: Denoiser
    times: Tensor
    every: int = 4
    batch_size: int = 512
    rows: int = 65_536
    refresh: int = 20_000
    direct: float = 0.5
    order: int = 2
    seed: int = 0
    apart: float = 0.0
    _shard: list[tuple[int, Tensor]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if (len(self.times) - 1) % self.every:
            raise ValueError(f"{len(self.times) - 1} steps cannot be cut into levels of {self.every}")
        count = len(self.levels) - 1
        if count & (count - 1):
            raise ValueError(f"the number of levels must be a power of two, not {count}")

    def count(self, step: int) -> int:
        """See `Batches`."""
        return self.batch_size

    @property
    def levels(self) -> Tensor:
        """The times of the levels, (levels + 1,) float64."""
        return self.times[:: self.every]

    def batch(self, step: int, items: Iterable[int]) -> dict[str, Tensor]:
        """See `Batches`; y_t and y_s, (N, d), t and s, (N,), and of neighbours beside_t and beside_s, (N, d)."""
        points, levels = self._points(step // self.refresh), self.levels.float()
        chosen = torch.from_numpy(np.fromiter(items, np.int64))
        generator = np.random.default_rng(mix(self.seed, 1, step))
        row = torch.from_numpy(generator.integers(self.rows, size=self.batch_size))[chosen]
        draws = torch.from_numpy(generator.random((3, self.batch_size)))[:, chosen]
        last = len(levels) - 1
        halvings = torch.where(draws[0] < self.direct, 0, 1 + (draws[1] * (last.bit_length() - 1)).long())
        length = (last >> halvings).clamp_min(1)
        start = (draws[2] * (last // length)).long() * length
        end = start + length
        pair = {"y_t": points[start, row], "t": levels[start], "y_s": points[end, row], "s": levels[end]}
        if self.apart:
            other = row + self.rows
            pair |= {"beside_t": points[start, other], "beside_s": points[end, other]}
        return pair

    def _points(self, index: int) -> Tensor:
        """Return a shard, (levels + 1, rows, d), twice the rows where there are neighbours; the last one is kept."""
        if not self._shard or self._shard[0][0] != index:
            self._shard[:] = [(index, self._compute(index))]
        return self._shard[0][1]

    def _compute(self, index: int) -> Tensor:
        z = Streams(mix(self.seed, 0, index), range(self.rows)).randn(*_event(self.denoiser))
        if self.apart:
            way = torch.nn.functional.one_hot(torch.arange(self.rows) % z.shape[1], z.shape[1])
            z = torch.cat([z, z + self.apart * way])
        parts = [flow_points(self.denoiser, part, self.times, self.order)[:: self.every] for part in z.split(4096)]
        return torch.cat(parts, 1)


def _event(denoiser: Denoiser) -> tuple[int, ...]:
    return tuple(int(n or 0) for n in denoiser.event_shape)


@dataclass(frozen=True, eq=False)
class Incomplete:
    """Neighbouring levels of fresh trajectories that end there, as published: one level for the whole batch.

    Attributes:
        denoiser: the teacher, in whitened coordinates.
        steps: of Euler's method from t = 1 to 0.
        levels: consistency times among them, both ends included.
        batch_size: items per step.
        seed: of all of it.
    """

    denoiser: Denoiser
    steps: int = 128
    levels: int = 18
    batch_size: int = 512
    seed: int = 0

    def count(self, step: int) -> int:
        """See `Batches`."""
        return self.batch_size

    def batch(self, step: int, items: Iterable[int]) -> dict[str, Tensor]:
        """See `Batches`; as `Trajectories` gives them."""
        places = torch.linspace(0, self.steps, self.levels).round().long().tolist()
        n = mix(self.seed, 0, step) % (self.levels - 1)
        times = torch.linspace(1, 0, self.steps + 1, dtype=torch.float64)[: places[n + 1] + 1]
        z = Streams(mix(self.seed, 1, step), range(self.batch_size)).randn(*_event(self.denoiser))[list(items)]
        points, t = euler_in_time(self.denoiser, z, times), times.float()
        pair = {"y_t": points[places[n]], "y_s": points[-1]}
        return {**pair, "t": t[places[n]].expand(len(z)), "s": t[-1].expand(len(z))}
