r"""Noise level, prox step, data weight and temperature of every inner iteration.

A base, in closed form, times the exponential of a small network of (log ratio_t, log sigma_y) that starts at zero: all four are
positive, continuous in t and in the noise of the operator, and every parameter receives a gradient. Levels are noise ratios in
units of x_0; r_t = sigma_t / alpha_t.

* *annealed*: tau_k = min(r_t, tau_max) decay^k, so that the inner chain can still move in poorly observed directions;
* *pinned*: tau_k = r_0 with 1 / r_0^2 = 1 / (scale sigma_y)^2 + 1 / r_t^2, the published choice (Kemajou Mbakam et al. 2025,
  arXiv:2507.02686): at the noise floor, where the chain moves by sigma_y per iteration.

The prox step is tau_k / sqrt(pairing): with pairing 2 noise and prox make a Langevin step, the published one is 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from fewstep.core.checks import check_counts, check_positive, one_of


@dataclass(frozen=True)
class LevelConfig:
    """What the levels start from.

    Attributes:
        iterations: K.
        base: "annealed" or "pinned".
        tau_max: first noise level of the annealed base, in units of x_0.
        decay: factor from one iteration to the next in the annealed base.
        scale: of the operator's noise in the pinned base (the paper: 13 for inpainting, else 1).
        pairing: noise variance over squared prox step.
        width: of the small network.
    """

    iterations: int = 3
    base: str = "annealed"
    tau_max: float = 1.5
    decay: float = 0.35
    scale: float = 1.0
    pairing: float = 2.0
    width: int = 16

    def __post_init__(self) -> None:
        one_of("base", self.base, BASES)
        check_counts(self, "iterations", "width")
        check_positive(self, "tau_max", "decay", "scale", "pairing")


class Level(NamedTuple):
    """One inner iteration, (N,) each: noise tau, prox step rho, power of the likelihood, factor on the drawn noise."""

    tau: Tensor
    rho: Tensor
    weight: Tensor
    temperature: Tensor


Base = Callable[[LevelConfig, Tensor, Tensor], Tensor]  # (config, ratio_t, sigma_y), (N,) -> tau, (K, N)


def annealed(config: LevelConfig, ratio: Tensor, sigma: Tensor) -> Tensor:
    """Return min(r_t, tau_max) decay^k."""
    powers = config.decay ** torch.arange(config.iterations, dtype=ratio.dtype, device=ratio.device)
    return powers[:, None] * ratio.clamp_max(config.tau_max)


def pinned(config: LevelConfig, ratio: Tensor, sigma: Tensor) -> Tensor:
    """Return the noise floor of (y, x_t), the same for every iteration."""
    floor = config.scale * sigma
    return (floor * ratio / (floor.square() + ratio.square()).sqrt()).expand(config.iterations, -1)


BASES: dict[str, Base] = {"annealed": annealed, "pinned": pinned}


class Levels(nn.Module):
    """The levels of all iterations; `forward` is differentiable in its parameters."""

    def __init__(self, config: LevelConfig) -> None:
        super().__init__()
        self.config = config
        first = skip_init(nn.Linear, 2, config.width)
        last = skip_init(nn.Linear, config.width, len(Level._fields) * config.iterations)
        with (
            torch.no_grad()
        ):  # always the same features, so that an untrained network takes nothing from a random generator
            first.weight.normal_(std=0.7, generator=torch.Generator().manual_seed(0))
            for zero in (first.bias, last.weight, last.bias):
                zero.zero_()
        self.net = nn.Sequential(first, nn.SiLU(), last)

    def forward(self, ratio: Tensor, sigma: Tensor) -> list[Level]:
        """Return one level per iteration from r_t and the operator's noise in units of x, (N,) each."""
        features = torch.stack([ratio.log(), sigma.log()], 1) / 3  # of order one over the ratios that occur
        own = next(self.net.parameters())
        factors = self.net(features.to(own)).to(ratio).exp()
        tau, rho, weight, temperature = factors.T.reshape(len(Level._fields), self.config.iterations, -1)
        base = BASES[self.config.base](self.config, ratio, sigma)
        return [
            Level(*row)
            for row in zip(base * tau, base / self.config.pairing**0.5 * rho, weight, temperature, strict=True)
        ]
