r"""The preconditioned Crank-Nicolson step: x' = sqrt(1 - b^2) x + b z, for laws that are N(0, I) but for a factor.

The proposal leaves the base N(0, I) invariant, so that it is accepted with probability min(1, (w(x') / w(x))^beta), w = rho / base:
no gradient is needed, and where w is constant every step is accepted whatever the dimension.

References:
    Neal 1998, Bayesian Statistics 6; Cotter, Roberts, Stuart and White 2013, Statist. Sci. 28 (arXiv:1202.0709).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core.noise import Noise
from fewstep.densities.mcmc.bridge import Bridge, StandardNormal, State


@dataclass(frozen=True)
class CrankNicolson:
    """A Markov step that leaves pi_beta invariant where the base is N(0, I), and only there.

    Args:
        accept: the mean acceptance that `adapted` steers to.
    """

    accept: float = 0.4

    gradients: ClassVar[bool] = False

    def step(self, bridge: Bridge, state: State, beta: Tensor, size: Tensor, noise: Noise) -> tuple[State, Tensor]:
        """See `Kernel`; `size` is b, (d,) or (N, d), at most 1, at which the proposal is a fresh draw of the base.

        Raises:
            ValueError: another base than N(0, I).
        """
        if not isinstance(bridge.base, StandardNormal):
            raise ValueError("this step leaves N(0, I) invariant and no other base")
        z, u, b = noise.randn(*state.x.shape[1:]), noise.rand(1)[:, 0], size.clamp_max(1.0)
        new = bridge.at((1 - b.square()).sqrt() * state.x + b * z)
        gain = new.log_ratio - state.log_ratio
        # a point of weight zero is left for any other
        accept = torch.where(beta > 0, beta * gain, 0.0).clamp_max(0).exp().nan_to_num(1.0)
        return new.where(u < accept, state), accept

    def adapted(self, size: Tensor, accept: Tensor, count: int) -> Tensor:
        """See `Kernel` (Robbins and Monro)."""
        return (size * torch.exp(2 * (accept - self.accept) / (count + 1) ** 0.6).to(size)).clamp_max(1.0)
