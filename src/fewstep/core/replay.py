r"""A sample as noise: with it a sampler with fresh noise walks a given path again, or the like of it under another prior.

CycleDiffusion (Wu and De la Torre 2023, arXiv:2210.05559): draw a noisy path of a given x_0, x_s ~ q(x_s | x_t, x_0) step by step,
and keep for each step the z with which the sampler would have gone the same way. Under the prior that it was encoded with it
decodes to the path again, to rounding and however wrong the denoiser is; under another prior it decodes to a translation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.batch import like
from fewstep.core.kernel import epsilon_of, renoise
from fewstep.core.multistep import MultistepSolver
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.sampler import State


class Recorded(Noise):
    """Noise whose draws are given, (N, *event) each, and come in their order; zeros after the last."""

    def __init__(self, draws: Sequence[Tensor], items: int) -> None:
        super().__init__(range(items))
        self._draws = list(draws)

    def randn_like(self, x: Tensor) -> Tensor:
        """Return the next draw."""
        return self._draws.pop(0) if self._draws else torch.zeros_like(x)


class Latent(NamedTuple):
    """A sample as noise: the point at t = 1, the draws of all steps but the last, and the last noisy point of the path."""

    start: Tensor
    draws: tuple[Tensor, ...]
    end: Tensor


@torch.no_grad()
def encode(solver: MultistepSolver, problem: Posterior, x0: Tensor, noise: Noise) -> Latent:
    """Return the noise that leads `solver` along a random noisy path of `x0`, (N, *event).

    Args:
        solver: one call per step and fresh noise in each, such as ancestral DDIM, on a grid that ends at t = 0.
        problem: the prior, with a `FlatLikelihood` of N items.
        x0: what to encode, in the coordinates of the prior, (N, *event).
        noise: N streams for the path.

    Raises:
        ValueError: the solver is deterministic, so that there is no noise to lead it.
    """
    schedule, times = problem.schedule, solver.times(problem)
    plan = solver.plan(schedule, times)
    if any(len(step) > 1 or step[0].row.noise == 0 for step in plan.steps[:-1]):
        raise ValueError(f"{solver!r} does not draw fresh noise once in every step")
    alpha, sigma = schedule(times[0])
    state = State(like(alpha, x0) * x0 + like(sigma, x0) * noise.randn_like(x0))
    start, draws, silent = state.x, [], Recorded((), len(x0))
    for k, (step, t, s) in enumerate(zip(plan.steps[:-1], times[:-2], times[1:-1], strict=True)):
        std = torch.as_tensor(step[0].row.noise, dtype=torch.float64)
        x_s = renoise(schedule, s, x0, epsilon_of(schedule, t, state.x, x0), std, noise)
        mean = solver.step(problem, state, k, silent)
        draws.append((x_s - mean.x) / like(std, x_s))
        state = mean._replace(x=x_s)
    return Latent(start, tuple(draws), state.x)


@torch.no_grad()
def decode(solver: MultistepSolver, problem: Posterior, latent: Latent) -> Iterator[Tensor]:
    """Give the points after each step of `solver` on the noise of `latent`, (N, *event); the last is the sample."""
    state, noise = State(latent.start), Recorded(latent.draws, len(latent.start))
    for k in range(solver.steps):
        state = solver.step(problem, state, k, noise)
        yield state.x
