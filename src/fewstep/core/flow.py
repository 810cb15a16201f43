r"""From a noisy point back to data: the probability-flow map G and a draw of p(x_0 | x_t).

In z = x_t / alpha_t and r = sigma_t / alpha_t the probability flow reads dz/dr = (z - D) / r. Ratios are spaced as in Karras et
al. (2022, arXiv:2206.00364, eq. 5). With one step both maps are the MMSE denoiser D.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.core.batch import like
from fewstep.core.kernel import ddim_std, epsilon_of, renoise
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior

FLOOR = 0.02  # the last positive ratio of a ladder relative to its first: Heun's final Euler step starts there


def ladder(ratio: Tensor, steps: int, rho: float = 7.0) -> Tensor:
    """Return `steps` falling ratios from `ratio`, (), to FLOOR times it (just `ratio` for one step)."""
    ends = ratio.double() ** (1 / rho)
    share = torch.linspace(0, 1, steps, dtype=torch.float64) * (1 - FLOOR ** (1 / rho)) if steps > 1 else torch.zeros(1)
    return (ends * (1 - share.double())) ** rho


def flow_calls(steps: int) -> int:
    """Return the network calls of `probability_flow`."""
    return 2 * steps - 1


def probability_flow(problem: Posterior, x_t: Tensor, t: Tensor, steps: int) -> Tensor:
    """Return G(x_t), (N, *event), by Heun's method in `steps` steps, 2 steps - 1 network calls; `t` is ()."""
    schedule = problem.schedule
    ratios = ladder(schedule.ratio(t), steps)
    times = schedule.time(ratios).clamp(0, 1)
    z = x_t / problem.coefficients(t, x_t)[0]
    for k in range(steps - 1):
        slope = (z - _denoise(problem, z, times[k])) / ratios[k]
        guess = z + (ratios[k + 1] - ratios[k]) * slope
        other = (guess - _denoise(problem, guess, times[k + 1])) / ratios[k + 1]
        z = z + (ratios[k + 1] - ratios[k]) * (slope + other) / 2
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
    return problem.denoise(like(problem.schedule(t)[0], z) * z, t)
