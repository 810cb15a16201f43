r"""LATINO: Langevin sampling by noising, decoding and a prox, in pixel space.

One iteration at noise ratio r (in units of x_0) is

    x <- prox_delta( G( x + r z ) )

a split-step Langevin kernel for p(x | y): "noise and decode" leaves the prior invariant if G is the probability-flow map, and the
prox, argmin -log p(y | x) + |x - v|^2 / (2 delta^2), is an implicit Euler half-step. It is Langevin when the *noise variance is
twice the prox step*, r^2 = 2 delta^2 (`pairing` = 2), at small r; a pairing of 1 has half the temperature. With the MMSE
denoiser in place of G (`decoder_steps` = 1) the prior is counted twice.

Published are the times 999, 874, ..., 124 of 1000, here t = 1, 7/8, ..., 1/8, and delta^2 = c sigma_t^2, where the public code tunes
c to each task: a constant times |y - A x|, smaller at low noise, and 1, then 1/2, for inpainting. Those constants belong to its
prior; c = 1 / `pairing` throughout here, the generator is the prior's denoiser, and the latent space is the identity.

On the other ladder the ratios fall to `ratio_min`. The bias is of the order of the last r^2 over the posterior variance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core.checks import check_counts, check_not_negative, check_positive, one_of
from fewstep.core.flow import flow_calls, ladder, probability_flow
from fewstep.core.grid import spaced, uniform
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.reference import Reference
from fewstep.core.sampler import Sampler, State
from fewstep.core.schedule import Schedule


@dataclass(frozen=True)
class LATINO(Sampler):
    """Latent consistency inverse solver, with the identity as its latent space.

    Args:
        steps: iterations of the kernel.
        ladder: "times" are evenly spaced in t, 1, ..., 1 / steps, "ratios" in ratio^(1 / power) from the largest to `ratio_min`.
        pairing: noise variance over prox step, r^2 / delta^2, at small r; 2 is Langevin.
        bound: delta^2 is at most 1 / (pairing * bound): r^2 / (1 + bound r^2) stands for r^2, so 1 is the published sigma_t^2.
        decoder_steps: 1 decodes with the MMSE denoiser, more with that many Heun steps of the probability flow.
        ratio_min: noise ratio at the end of the ladder "ratios", in units of x_0.
        power: spacing of the ladder "ratios".
        stay: iterations at the end of the ladder.
    """

    steps: int = 8
    ladder: str = "times"
    pairing: float = 1.0
    bound: float = 1.0
    decoder_steps: int = 1
    ratio_min: float = 0.15
    power: float = 7.0
    stay: int = 0

    needs: ClassVar = frozenset({"prox"})
    exact: ClassVar = "posterior"
    limit: ClassVar = "the posterior with pairing 2 and decoder_steps > 1, as the last ratio -> 0; else too narrow"
    presets: ClassVar = {
        "paper": {},  # its times, without the tuning of the prox step to each task
        "consistent": {
            "ladder": "ratios",
            "bound": 0.0,
            "pairing": 2.0,
            "decoder_steps": 4,
            "steps": 600,
            "ratio_min": 0.025,
        },
        "photo": {"ladder": "ratios", "bound": 0.0, "steps": 20, "ratio_min": 0.05},  # chosen on validation photographs
        "consistent-short": {
            "ladder": "ratios",
            "bound": 0.0,
            "pairing": 2.0,
            "decoder_steps": 3,
            "steps": 20,
            "ratio_min": 0.05,
        },
    }
    reference: ClassVar = Reference(
        "LATINO-PRO: LAtent consisTency INverse sOlver with PRompt Optimization",
        "Spagnoletti, Alessio and Prost, Jean and Almansa, Andrés and Papadakis, Nicolas and Pereyra, Marcelo",
        2025,
        "International Conference on Computer Vision",
        "2503.12615",
    )

    def __post_init__(self) -> None:
        one_of("ladder", self.ladder, LADDERS)
        check_positive(self, "pairing", "ratio_min", "power")
        check_not_negative(self, "bound")
        check_counts(self, "decoder_steps")
        if not 0 <= self.stay < max(1, self.steps):
            raise ValueError(f"stay must be at least 0 and less than the {self.steps} steps, got {self.stay}")

    @property
    def nfe(self) -> int:
        """See `Sampler`."""
        return self.steps * flow_calls(self.decoder_steps)

    def init(self, problem: Posterior, noise: Noise) -> State:
        """See `Sampler`; the pseudo-inverse, which the first, almost pure, noise level hides."""
        return State(problem.likelihood.start())

    def step(self, problem: Posterior, state: State, k: int, noise: Noise) -> State:
        """See `Sampler`."""
        ratio = self.ratios(problem)[k]
        noisy = state.x + ratio.to(state.x) * noise.randn_like(state.x)
        decoded = probability_flow(problem, noisy, ladder(ratio, self.decoder_steps))
        return State(problem.likelihood.prox(decoded, self.prox_step(ratio)))

    def prox_step(self, ratio: Tensor) -> Tensor:
        """Return delta, shape of `ratio`."""
        return ratio / (self.pairing * (1 + self.bound * ratio.square())).sqrt()

    def ratios(self, problem: Posterior) -> Tensor:
        """Return the noise ratio of every iteration, (steps,), float64."""
        count = max(1, self.steps - self.stay)
        falling = LADDERS[self.ladder](self, problem.schedule, count)
        return torch.cat([falling, falling[-1:].expand(self.steps - count)])


def _times(method: LATINO, schedule: Schedule, count: int) -> Tensor:
    """Return the ratios at the first `count` times of the uniform grid."""
    return schedule.ratio(uniform(schedule, count)[:-1])


def _ratios(method: LATINO, schedule: Schedule, count: int) -> Tensor:
    """Return evenly spaced powers of ratios down to `ratio_min`."""
    high = schedule.ratio(torch.ones((), dtype=torch.float64))
    return spaced(high, torch.tensor(method.ratio_min, dtype=torch.float64), count, method.power)


LADDERS: dict[str, Callable[[LATINO, Schedule, int], Tensor]] = {"times": _times, "ratios": _ratios}
