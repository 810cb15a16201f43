r"""From a noisy point back to data: the probability-flow map G and a draw of p(x_0 | x_t).

In z = x_t / alpha_t and r = sigma_t / alpha_t the probability flow reads dz/dr = (z - D) / r. Ratios are spaced as in Karras et
al. (2022, arXiv:2206.00364, eq. 5). With one step both maps are the MMSE denoiser D.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.batch import like
from fewstep.core.grid import spaced
from fewstep.core.kernel import ddim_std, epsilon_of, renoise
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior

FLOOR = 0.02  # the last positive ratio of a ladder relative to its first: the final Euler step, to 0, starts there


def ladder(ratio: Tensor, steps: int) -> Tensor:
    """Return `steps` falling ratios from `ratio`, (), to FLOOR times it (just `ratio` for one step), float64."""
    return spaced(ratio, FLOOR * ratio, steps)


def flow_calls(steps: int, order: int = 2) -> int:
    """Return the network calls of `probability_flow`."""
    return order * (steps - 1) + 1


def probability_flow(problem: Posterior, z: Tensor, ratios: Tensor, order: int = 2) -> Tensor:
    """Return G(alpha z), (N, *event), by as many steps as there are ratios, the last of them an Euler step to 0.

    Args:
        problem: the prior and its schedule.
        z: x_t / alpha_t at the first ratio, (N, *event).
        ratios: falling, (steps,).
        order: 1 is Euler's method, 2 Heun's, with a second network call in every step but the last.
    """
    times = problem.schedule.time(ratios).clamp(0, 1)

    def slope(z: Tensor, k: int) -> Tensor:
        return (z - _denoise(problem, z, times[k])) / ratios[k]

    for k in range(len(ratios) - 1):
        change, first = ratios[k + 1] - ratios[k], slope(z, k)
        z = z + change * (first if order == 1 else (first + slope(z + change * first, k + 1)) / 2)
    return _denoise(problem, z, times[-1])


def reverse_draw(problem: Posterior, x_t: Tensor, t: Tensor, steps: int, noise: Noise) -> Tensor:
    """Return a draw of p(x_0 | x_t), (N, *event), by `steps` ancestral steps; exact as steps grow; `t` is ()."""
    schedule = problem.schedule
    times = torch.cat(
        [torch.as_tensor(t).double()[None], schedule.time(ladder(schedule.ratio(t), steps)[1:]).clamp(0, 1)]
    )
    x = x_t
    for k in range(steps - 1):
        x0 = problem.denoise(x, times[k])
        std = ddim_std(schedule, times[k], times[k + 1], 1.0)
        x = renoise(schedule, times[k + 1], x0, epsilon_of(schedule, times[k], x, x0), std, noise)
    return problem.denoise(x, times[-1])


def _denoise(problem: Posterior, z: Tensor, t: Tensor) -> Tensor:
    """Return D(alpha_t z, t)."""
    return problem.denoise(like(problem.schedule(t)[0], z) * z, t)
