r"""Sequential Monte Carlo along the geometric path, and annealed importance sampling as the case that never resamples.

Particles start from the base; from beta_k-1 to beta_k their log-weights grow by (beta_k - beta_k-1) (log rho - log base), they are
resampled within their run where the effective size has fallen, and moved by a Markov step that leaves pi_beta_k
invariant. The mean weight of a run is an unbiased estimate of Z. A pilot run of its own chooses temperatures and step sizes, which
then stay fixed: adapted on the particles themselves they would leave no exact statement.

References:
    Neal 2001, Statist. Comput. 11 (annealed importance sampling).
    Del Moral, Doucet and Jasra 2006, J. R. Statist. Soc. B 68.
    Zhou, Johansen and Aston 2016, J. Comput. Graph. Statist. 25 (arXiv:1303.3123): conditional effective size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.checks import check_counts
from fewstep.core.noise import Noise, Streams, mix
from fewstep.densities.estimators.weights import comb
from fewstep.densities.mcmc.base import Found, Kernel, MonteCarlo, groups_of
from fewstep.densities.mcmc.bridge import Bridge, State
from fewstep.densities.mcmc.hamiltonian import Hamiltonian

_MOST_STAGES = 2000


class Stage(NamedTuple):
    """One temperature: beta, (), and the step sizes of its moves, (d,)."""

    beta: Tensor
    size: Tensor


@dataclass(frozen=True)
class SequentialMonteCarlo(MonteCarlo):
    """Independent runs of particles; `Draws.log_z` and its interval are over the runs.

    The interval knows what some run has seen: where the moves do not reach a part of the target, as the neck of a funnel,
    all runs fall short together. Without resampling a k-hat above its limit shows that.

    Args:
        kernel: the Markov step.
        particles: of one run; the pilot has as many.
        moves: Markov steps per temperature.
        keep: the share of the effective size that a change of temperature leaves.
        resample_below: the effective share below which a run is resampled; 0 is annealed importance sampling, whose
            particles are independent of each other.
    """

    kernel: Kernel = field(default_factory=Hamiltonian)
    particles: int = 1024
    moves: int = 3
    keep: float = 0.9
    resample_below: float = 0.5

    def __post_init__(self) -> None:
        check_counts(self, "particles")

    def run(self, bridge: Bridge, n: int, seed: int, dtype: torch.dtype) -> Found:
        """See `MonteCarlo`."""
        runs = groups_of(n, self.particles, "particles of a run")
        stages = self._pilot(bridge, Streams(mix(seed, 1), range(self.particles), dtype))
        noise = Streams(mix(seed, 2), range(n), dtype)
        state, beta = bridge.start(noise), torch.zeros((), dtype=torch.float64)
        log_w = torch.zeros(runs, self.particles, dtype=torch.float64)
        for stage in stages:
            log_w = log_w + ((stage.beta - beta) * state.log_ratio).reshape(runs, -1)
            beta = stage.beta
            if self.resample_below > 0:
                state, log_w = self._resampled(state, log_w, noise.rand(1)[:, 0])
            for _ in range(self.moves):
                state, _ = self.kernel.step(bridge, state, beta, stage.size, noise)
        return Found(state.x, log_w.flatten(), "unbiased", self.particles if self.resample_below > 0 else 1)

    def _pilot(self, bridge: Bridge, noise: Noise) -> list[Stage]:
        """Return temperatures and step sizes from one run, resampled at every temperature."""
        state, beta = bridge.start(noise), torch.zeros((), dtype=torch.float64)
        size = torch.full_like(state.x[0], 0.5 / state.x.shape[1] ** 0.25)
        stages: list[Stage] = []
        while beta < 1:
            if len(stages) == _MOST_STAGES:
                raise RuntimeError(
                    f"{_MOST_STAGES} temperatures reach beta = {float(beta):.2g} only: whiten the target"
                )
            step = self._reach(state.log_ratio, 1 - float(beta))
            log_w = step * state.log_ratio
            beta = (beta + step).clamp_max(1)
            state = state.rows(comb(log_w[None], noise.rand(1)[:1, 0])[0])
            spread = state.x.std(0).clamp_min(1e-6)
            size = spread * (size.log().mean() - spread.log().mean()).exp()
            for k in range(2 * self.moves):
                state, accept = self.kernel.step(bridge, state, beta, size, noise)
                size = self.kernel.adapted(size, accept.mean(), k)
            stages.append(Stage(beta, size))
        return stages

    def _reach(self, log_ratio: Tensor, room: float) -> float:
        """Return the largest change of beta that keeps the share `keep` of the effective size, by bisection."""
        u = log_ratio[log_ratio > -torch.inf]
        if not len(u):
            raise ValueError("the target is zero, NaN or infinite at every point of the base: give a shift and a scale")

        def share(step: float) -> float:
            w = (step * (u - u.max())).exp()
            return float(w.mean().square() / w.square().mean())

        if share(room) >= self.keep:
            return room
        low, high = 0.0, room
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if share(middle) >= self.keep else (low, middle)
        return max(low, 1e-16)

    def _resampled(self, state: State, log_w: Tensor, u: Tensor) -> tuple[State, Tensor]:
        """Resample the runs, (R, P), whose effective size has fallen; their particles then share the mean weight."""
        runs, size = log_w.shape
        mean = log_w.logsumexp(1, keepdim=True) - math.log(size)
        effective = (2 * (log_w - mean)).exp().mean(1).reciprocal()
        poor = ((effective < self.resample_below) & mean[:, 0].isfinite())[:, None]
        own = torch.arange(size).expand(runs, -1)
        rows = torch.where(poor, comb(log_w, u.reshape(runs, -1)[:, 0]), own)
        flat = (rows + size * torch.arange(runs)[:, None]).flatten()
        return state.rows(flat), torch.where(poor, mean, log_w)
