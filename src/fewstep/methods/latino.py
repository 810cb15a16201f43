r"""LATINO: Langevin sampling by noising, decoding and a prox, in pixel space.

One iteration at noise ratio r (in units of x_0) is

    x <- prox_delta( G( x + r z ) )

a split-step Langevin kernel for p(x | y): "noise and decode" leaves the prior invariant if G is the probability-flow map, and the
prox, argmin -log p(y | x) + |x - v|^2 / (2 delta^2), is an implicit Euler half-step. It is Langevin when the *noise variance is
twice the prox step*, r^2 = 2 delta^2 (`pairing` = 2); the published pairing, 1, has half the temperature. With the MMSE denoiser
in place of G (`decoder_steps` = 1) the prior is counted twice.

The ratios fall along a ladder and stay at its end for the last `stay` iterations. The bias is of the order of the last r^2 over
the posterior variance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core.batch import like
from fewstep.core.flow import flow_calls, probability_flow
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.reference import Reference
from fewstep.core.sampler import Sampler, State


@dataclass(frozen=True)
class LATINO(Sampler):
    """Latent consistency inverse solver, with the identity as its latent space.

    Args:
        steps: iterations of the kernel.
        pairing: noise variance over prox step, r^2 / delta^2; 2 is Langevin.
        decoder_steps: 1 decodes with the MMSE denoiser, more with that many Heun steps of the probability flow.
        ratio_min: noise ratio at the end of the ladder, in units of x_0.
        power: how the ladder is spaced: evenly in ratio^(1 / power).
        stay: iterations at the end of the ladder.
    """

    steps: int = 8
    pairing: float = 1.0
    decoder_steps: int = 1
    ratio_min: float = 0.15
    power: float = 7.0
    stay: int = 0

    needs: ClassVar = frozenset({"prox"})
    exact: ClassVar = "posterior"
    limit: ClassVar = "the posterior with pairing 2 and decoder_steps > 1, as ratio_min -> 0; the default is too narrow"
    presets: ClassVar = {
        "paper": {},
        "consistent": {"pairing": 2.0, "decoder_steps": 4, "steps": 600, "ratio_min": 0.025},
        "photo": {"steps": 20, "ratio_min": 0.05},  # chosen on validation photographs with the shipped prior
        "consistent-short": {"pairing": 2.0, "decoder_steps": 3, "steps": 20, "ratio_min": 0.05},
    }
    reference: ClassVar = Reference(
        "LATINO-PRO: LAtent consisTency INverse sOlver with PRompt Optimization",
        "Spagnoletti, Alessio and Prost, Jean and Almansa, Andrés and Papadakis, Nicolas and Pereyra, Marcelo",
        2025,
        "International Conference on Computer Vision",
        "2503.12615",
    )

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
        t = problem.schedule.time(ratio).clamp(0, 1)
        noisy = state.x + ratio.to(state.x) * noise.randn_like(state.x)
        decoded = probability_flow(problem, like(problem.schedule(t)[0], noisy) * noisy, t, self.decoder_steps)
        return State(problem.likelihood.prox(decoded, ratio / self.pairing**0.5))

    def ratios(self, problem: Posterior) -> Tensor:
        """Return the noise ratio of every iteration, (steps,), float64."""
        high = problem.schedule.ratio(torch.ones((), dtype=torch.float64))
        count = max(1, self.steps - self.stay)
        ends = high ** (1 / self.power), self.ratio_min ** (1 / self.power)
        share = torch.linspace(0, 1, count, dtype=torch.float64)
        falling = (ends[0] + share * (ends[1] - ends[0])) ** self.power
        return torch.cat([falling, falling[-1:].expand(self.steps - count)])
