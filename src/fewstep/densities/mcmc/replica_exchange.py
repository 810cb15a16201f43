r"""Replica exchange (parallel tempering): chains at every inverse temperature of a ladder, which swap their points.

Neighbours at beta < beta' swap with probability min(1, exp((beta' - beta)(U - U'))), U = log rho - log base, in even and odd
pairs by turns; points at beta = 0 are drawn afresh each time. In the warm-up the ladder is moved so that all pairs
refuse equally often.

References:
    Swendsen and Wang 1986, Phys. Rev. Lett. 57; Geyer 1991.
    Syed, Bouchard-Cote, Deligiannidis and Doucet 2022, J. R. Statist. Soc. B 84 (arXiv:1905.02939): turns, and the ladder.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fewstep.core.checks import check_counts, check_not_negative
from fewstep.core.noise import Noise, Streams
from fewstep.densities.mcmc.base import Found, Kernel, MonteCarlo, groups_of
from fewstep.densities.mcmc.bridge import Bridge, State
from fewstep.densities.mcmc.hamiltonian import Hamiltonian


@dataclass
class _Ladder:
    """What is adapted: inverse temperatures, (L,), step sizes, (L, d), and refusals of each pair of neighbours, (L - 1,)."""

    betas: Tensor
    sizes: Tensor
    refused: Tensor
    tried: Tensor

    @classmethod
    def cubic(cls, levels: int, like: Tensor) -> _Ladder:
        betas = torch.linspace(0, 1, levels, dtype=torch.float64) ** 3
        sizes = torch.full((levels, like.shape[1]), 0.5 / like.shape[1] ** 0.25, dtype=like.dtype)
        return cls(betas, sizes, torch.zeros(levels - 1), torch.zeros(levels - 1))

    def move(self) -> None:
        """Place the temperatures so that the refusals seen would be shared equally."""
        rates = (self.refused / self.tried.clamp_min(1)).double() + 1e-3
        barrier = np.concatenate([[0.0], rates.cumsum(0).numpy()])
        even = np.linspace(0, barrier[-1], len(barrier))
        betas = torch.from_numpy(np.interp(even, barrier, self.betas.numpy()))
        betas[0], betas[-1] = 0.0, 1.0
        self.betas, self.refused, self.tried = betas, torch.zeros_like(self.refused), torch.zeros_like(self.tried)


@dataclass(frozen=True)
class ReplicaExchange(MonteCarlo):
    """Several ladders side by side; the draws are their points at beta = 1, and hang together within a ladder.

    Args:
        kernel: the Markov step of every level.
        levels: inverse temperatures, 0 and 1 included.
        chains: ladders.
        warmup: steps that are thrown away, in which ladder and step sizes are adapted, then kept.
        thin: steps per draw.

    Raises:
        ValueError: fewer than two levels, or a number of chains or of steps that is none.
    """

    kernel: Kernel = field(default_factory=lambda: Hamiltonian(4))
    levels: int = 12
    chains: int = 32
    warmup: int = 600
    thin: int = 1

    def __post_init__(self) -> None:
        check_counts(self, "levels", "chains", "thin")
        check_not_negative(self, "warmup")
        if self.levels < 2:
            raise ValueError(f"levels must be at least 2, the base and the target, got {self.levels}")

    def run(self, bridge: Bridge, n: int, seed: int, dtype: torch.dtype) -> Found:
        """See `MonteCarlo`."""
        length = groups_of(n, self.chains, "chains")
        noise = Streams(seed, range(self.levels * self.chains), dtype)
        state = bridge.start(noise)
        ladder = _Ladder.cubic(self.levels, state.x)
        rounds = max(self.warmup // 6, 1)
        for k in range(self.warmup):
            state, accept = self._step(bridge, state, ladder, k, noise)
            factor = accept.reshape(self.levels, -1).mean(1)[:, None]
            ladder.sizes = self.kernel.adapted(ladder.sizes, factor, k % rounds)
            if (k + 1) % rounds == 0 and k + 1 < self.warmup:
                ladder.move()
                self._rescale(ladder, state)
        kept = []
        for k in range(length * self.thin):
            state, _ = self._step(bridge, state, ladder, k, noise)
            if (k + 1) % self.thin == 0:
                kept.append(state.x[-self.chains :])
        return Found(torch.stack(kept, 1).flatten(0, 1), None, None, length)

    def _step(self, bridge: Bridge, state: State, ladder: _Ladder, k: int, noise: Noise) -> tuple[State, Tensor]:
        """Move every level, draw the first afresh, swap one half of the pairs."""
        betas = ladder.betas.repeat_interleave(self.chains)
        state, accept = self.kernel.step(bridge, state, betas, ladder.sizes.repeat_interleave(self.chains, 0), noise)
        state = bridge.start(noise).where(betas == 0, state)
        return self._swap(state, ladder, k % 2, noise.rand(1)[:, 0]), accept

    def _swap(self, state: State, ladder: _Ladder, parity: int, u: Tensor) -> State:
        rows = torch.arange(self.levels * self.chains).reshape(self.levels, self.chains)
        low = torch.arange(parity, self.levels - 1, 2)
        ratio = state.log_ratio.reshape(self.levels, -1)
        gap = (ladder.betas[low + 1] - ladder.betas[low])[:, None]
        accept = (gap * (ratio[low] - ratio[low + 1])).clamp_max(0).exp().nan_to_num(0.0)
        ladder.refused[low] += (1 - accept).mean(1).to(ladder.refused)
        ladder.tried[low] += 1
        swap = u.reshape(self.levels, -1)[low] < accept
        new = rows.clone()
        new[low] = torch.where(swap, rows[low + 1], rows[low])
        new[low + 1] = torch.where(swap, rows[low], rows[low + 1])
        return state.rows(new.flatten())

    def _rescale(self, ladder: _Ladder, state: State) -> None:
        """Give each level the steps of the spread of its points, at the same geometric mean."""
        if self.chains < 8:
            return
        spread = state.x.reshape(self.levels, self.chains, -1).std(1).clamp_min(1e-6)
        ladder.sizes = spread * (ladder.sizes.log().mean(1) - spread.log().mean(1)).exp()[:, None]
