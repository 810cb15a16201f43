r"""Hamiltonian Monte Carlo, and MALA as its case of one leap: x' = x + e^2 / 2 grad log pi(x) + e z, accepted by Metropolis.

With z ~ N(0, I) and steps e, per coordinate and independent of x: z <- z + e/2 grad, then `leaps` times x <- x + e z,
z <- z + e grad, the last by half; accepted with probability min(1, pi(x') N(z') / (pi(x) N(z))).

References:
    Duane, Kennedy, Pendleton and Roweth 1987, Phys. Lett. B 195; Neal 2011, Handbook of MCMC, chapter 5.
    Roberts and Tweedie 1996, Bernoulli 2 (MALA).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core.noise import Noise
from fewstep.densities.mcmc.bridge import Bridge, State


@dataclass(frozen=True)
class Hamiltonian:
    """A Markov step that leaves pi_beta invariant, for a batch of points at once.

    Args:
        leaps: leapfrog steps; 1 is MALA.
        accept: the mean acceptance that `adapted` steers to.
        reach: the factor up to which steps are also taken smaller, all sizes between alike: for targets whose width differs from
            place to place, as a funnel's.
    """

    leaps: int = 8
    accept: float = 0.7
    reach: float = 1.0

    gradients: ClassVar[bool] = True

    def step(self, bridge: Bridge, state: State, beta: Tensor, size: Tensor, noise: Noise) -> tuple[State, Tensor]:
        """Return the next points and the probabilities with which they were accepted, (N,).

        Args:
            bridge: the densities; `leaps` calls per point.
            state: N points.
            beta: inverse temperature, () or (N,).
            size: step sizes, (d,) or (N, d); shaken by up to a fifth, so that no orbit is a period, and divided by up to `reach`.
            noise: one stream per point.
        """
        z, u = noise.randn(*state.x.shape[1:]), noise.rand(2 + (self.reach > 1))
        size = size * (0.8 + 0.4 * u[:, :1])
        if self.reach > 1:
            size = size * self.reach ** -u[:, 2:]
        new, momentum = state, z + size / 2 * state.tempered_score(beta)
        for k in range(self.leaps):
            new = bridge.at(new.x + size * momentum)
            momentum = momentum + (size if k + 1 < self.leaps else size / 2) * new.tempered_score(beta)
        kinetic = (z.double().square() - momentum.double().square()).sum(1) / 2
        log_accept = new.log_prob(beta) - state.log_prob(beta) + kinetic
        accept = log_accept.clamp_max(0).exp().nan_to_num(0.0)
        return new.where(u[:, 1] < accept, state), accept

    def adapted(self, size: Tensor, accept: Tensor, count: int) -> Tensor:
        """Return the step sizes after adaptation number `count`, from 0, to a mean acceptance (Robbins and Monro)."""
        return size * torch.exp(2 * (accept - self.accept) / (count + 1) ** 0.6).to(size)


def mala(accept: float = 0.57) -> Hamiltonian:
    """Return the Metropolis-adjusted Langevin step, steered to its optimal acceptance (Roberts and Rosenthal 1998)."""
    return Hamiltonian(1, accept)
