"""Parallel chains of Hamiltonian Monte Carlo or MALA."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.core.checks import check_counts, check_not_negative
from fewstep.core.noise import Noise, Streams
from fewstep.densities.mcmc.base import Found, Kernel, MonteCarlo, groups_of
from fewstep.densities.mcmc.bridge import Bridge, State
from fewstep.densities.mcmc.hamiltonian import Hamiltonian


@dataclass(frozen=True)
class Chains(MonteCarlo):
    """Chains that start from the base and never meet: right where one mode is, or where all are well connected.

    The draws have no weights, and hang together within a chain. Whether the chains have forgotten where they started is
    for `estimators.convergence.rhat` to say.

    Args:
        kernel: the Markov step.
        chains: how many.
        warmup: steps that are thrown away; one step size per coordinate is adapted in them, from all chains, then kept.
        thin: steps per draw.

    Raises:
        ValueError: a number of chains or of steps that is none.
    """

    kernel: Kernel = field(default_factory=Hamiltonian)
    chains: int = 64
    warmup: int = 500
    thin: int = 1

    def __post_init__(self) -> None:
        check_counts(self, "chains", "thin")
        check_not_negative(self, "warmup")

    def run(self, bridge: Bridge, n: int, seed: int, dtype: torch.dtype) -> Found:
        """See `MonteCarlo`."""
        length = groups_of(n, self.chains, "chains")
        noise = Streams(seed, range(self.chains), dtype)
        state = bridge.start(noise)
        one = torch.ones((), dtype=torch.float64)
        state, size = self._warm_up(bridge, state, one, noise)
        kept = []
        for k in range(length * self.thin):
            state, _ = self.kernel.step(bridge, state, one, size, noise)
            if (k + 1) % self.thin == 0:
                kept.append(state.x)
        return Found(torch.stack(kept, 1).flatten(0, 1), None, None, length)

    def _warm_up(self, bridge: Bridge, state: State, one: Tensor, noise: Noise) -> tuple[State, Tensor]:
        """Return the state after the warm-up and the step sizes, (d,): in its second half in proportion to the spread."""
        size = torch.full_like(state.x[0], 0.5 / state.x.shape[1] ** 0.25)
        half = self.warmup // 2
        for k in range(self.warmup):
            if k == half and self.chains > 1:
                spread = state.x.std(0).clamp_min(1e-6)
                size = spread * (size.log().mean() - spread.log().mean()).exp()
            state, accept = self.kernel.step(bridge, state, one, size, noise)
            size = self.kernel.adapted(size, accept.mean(), k % half if half else k)
        return state, size
