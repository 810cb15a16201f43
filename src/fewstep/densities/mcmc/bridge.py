r"""The geometric path pi_beta = base^(1 - beta) rho^beta from a law that can be drawn from to the target, and what it has cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.density import TargetDensity
from fewstep.core.noise import Noise
from fewstep.densities.estimators.gaussian import log_normal


class State(NamedTuple):
    """N points and what is known there: x, (N, d); log-densities, (N,) float64; scores, (N, d)."""

    x: Tensor
    log_base: Tensor
    log_rho: Tensor
    base_score: Tensor
    score: Tensor

    def where(self, take: Tensor, other: State) -> State:
        """Return these points where `take`, (N,), is true, and `other`'s elsewhere."""
        return State(
            *(torch.where(take.reshape(-1, *[1] * (a.ndim - 1)), a, b) for a, b in zip(self, other, strict=True))
        )

    def rows(self, index: Tensor) -> State:
        """Return the points at `index`, (M,)."""
        return State(*(a[index] for a in self))

    @property
    def log_ratio(self) -> Tensor:
        """log rho - log base, (N,)."""
        return self.log_rho - self.log_base

    def log_prob(self, beta: Tensor) -> Tensor:
        """Return log pi_beta up to a constant, (N,); `beta` is () or (N,)."""
        # 0 * -inf: at beta = 0 the target has no say
        return (1 - beta) * self.log_base + torch.where(beta > 0, beta * self.log_rho, 0.0)

    def tempered_score(self, beta: Tensor) -> Tensor:
        """Return grad log pi_beta, (N, d)."""
        beta = beta.to(self.x).reshape(-1, 1)
        return (1 - beta) * self.base_score + beta * self.score


class StandardNormal(TargetDensity):
    """N(0, I) in d dimensions."""

    log_z = 0.0

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def log_prob(self, x: Tensor) -> Tensor:
        """See `TargetDensity`."""
        return log_normal(x)

    def score(self, x: Tensor) -> Tensor:
        """See `TargetDensity`."""
        return -x

    def sample(self, noise: Noise) -> Tensor:
        """See `TargetDensity`."""
        return noise.randn(self.dim)


@dataclass
class Bridge:
    """A base and a target in the same coordinates, with counts of the calls of the target, one per point.

    Attributes:
        base: normalised (log Z = 0), with an exact sampler.
        target: rho.
        target_calls: evaluations of log rho so far.
        gradient_calls: evaluations of its gradient so far.
        scores: whether gradients are taken at all; without, they read zero, for kernels that do not look at them.
    """

    base: TargetDensity
    target: TargetDensity
    scores: bool = True
    target_calls: int = 0
    gradient_calls: int = 0

    def at(self, x: Tensor) -> State:
        """Evaluate both densities, (N, d); a NaN of the target counts as density zero, and its score as zero."""
        self.target_calls += len(x)
        log_rho = self.target.log_prob(x).detach().double()
        log_rho = log_rho.masked_fill(~(log_rho < torch.inf), -torch.inf)
        if not self.scores:
            return State(x, self.base.log_prob(x).detach().double(), log_rho, torch.zeros_like(x), torch.zeros_like(x))
        self.gradient_calls += len(x)
        score = self.target.score(x).detach().nan_to_num(0.0, 0.0, 0.0)
        return State(x, self.base.log_prob(x).detach().double(), log_rho, self.base.score(x).detach(), score)

    def start(self, noise: Noise) -> State:
        """Draw from the base and evaluate."""
        return self.at(self.base.sample(noise))
