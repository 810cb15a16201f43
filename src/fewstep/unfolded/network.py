r"""The unfolded network: K iterations of prox, noise and decoder, a sampler of p(x_0 | y, x_t).

One iteration at level (tau, rho, weight, temperature), from x:

    z = argmin_u  -weight log p(y | u) + |x_t - alpha u|^2 / (2 sigma^2) + |u - x|^2 / (2 rho^2)
    x = decoder(z + tau temperature n, tau),   n ~ N(0, I)

(Kemajou Mbakam, Spence, Pereyra 2025, arXiv:2507.02686, with every level learned). Training and inference call `forward`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewstep.core.batch import like
from fewstep.core.checks import check_not_negative, one_of
from fewstep.core.likelihood import JointLikelihood
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.together import noise_level
from fewstep.unfolded.decoders import Decoder, Inputs
from fewstep.unfolded.levels import Level, LevelConfig, Levels
from fewstep.unfolded.starts import STARTS, Given, Start


@dataclass(frozen=True)
class UnfoldedConfig:
    """The shape of an unfolded network.

    Attributes:
        levels: of the inner iterations.
        start: name of the initialiser, one of `STARTS`.
        end: 0 gives the last x as it is; otherwise it is drawn anew from p(y | x) N(x, rho^2 I), with a learned rho that starts
            from `end` times the operator's noise: well observed directions become exact, the others move by rho.
    """

    levels: LevelConfig = field(default_factory=LevelConfig)
    start: str = "gaussian"
    end: float = 0.0

    def __post_init__(self) -> None:
        one_of("start", self.start, STARTS)
        check_not_negative(self, "end")


class UnfoldedNetwork(nn.Module):
    """(problem, x_t, t, noise) -> x_0, for any likelihood with a prox and any schedule.

    Args:
        config: number of iterations, levels, initialiser.
        decoder: the network inside; `PriorDecoder()` for the untrained sampler.
    """

    def __init__(self, config: UnfoldedConfig, decoder: Decoder) -> None:
        super().__init__()
        self.config, self.decoder, self.levels = config, decoder, Levels(config.levels)
        self.log_end = nn.Parameter(torch.tensor(config.end).log()) if config.end else None
        self.checkpointing = False  # recompute iterations in the backward pass: memory does not grow with K

    @property
    def start(self) -> Start:
        """The initialiser."""
        return STARTS[self.config.start]

    @property
    def remembers(self) -> bool:
        """Whether the start wants the previous outer estimate."""
        return self.start.remembers

    @property
    def calls(self) -> int:
        """The network calls of one run: K, and those of the start."""
        return self.config.levels.iterations + self.start.calls

    def forward(
        self, problem: Posterior, x_t: Tensor, t: Tensor, noise: Noise, previous: Tensor | None = None
    ) -> Tensor:
        """Return a draw of p(x_0 | y, x_t), (N, *event).

        Args:
            problem: prior and likelihood of the N items (expanded).
            x_t: noisy items, (N, *event).
            t: their times, () or (N,).
            noise: one stream per item.
            previous: the last outer estimate, where there is one.
        """
        half = torch.is_autocast_enabled(x_t.device.type)
        with torch.autocast(x_t.device.type, enabled=False):
            return self._unfold(problem, x_t, torch.as_tensor(t), noise, previous, half)

    def _unfold(
        self, problem: Posterior, x_t: Tensor, t: Tensor, noise: Noise, previous: Tensor | None, half: bool
    ) -> Tensor:
        """Do what `forward` says; a prox is a linear solve, so half precision, if asked for, is for the decoder alone."""
        alpha, sigma = (c.to(x_t).expand(len(x_t)) for c in problem.schedule(t))
        likelihood, level_y = problem.likelihood, noise_level(problem.likelihood).to(x_t)
        x = self.start.begin(Given(likelihood, x_t, alpha, sigma, previous))
        problem.counts.network += self.start.calls
        back = likelihood.prox(torch.zeros_like(x_t), torch.ones_like(alpha))
        facts = Facts(problem, x_t, alpha, sigma, back, half)
        for level in self.levels(sigma / alpha, level_y):
            n = noise.randn_like(x)
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(self._iterate, facts, x, level, n, use_reentrant=False)
            else:
                x = self._iterate(facts, x, level, n)
        return x if self.log_end is None else likelihood.draw(x, self.log_end.exp().to(x) * level_y, noise)

    def _iterate(self, facts: Facts, x: Tensor, level: Level, n: Tensor) -> Tensor:
        """Return x after one iteration with the standard normal noise n."""
        point = facts.prox(x, level)
        noisy = point + like(level.tau * level.temperature, x) * n
        outer = like(facts.alpha, x) * facts.x_t
        with torch.autocast(x.device.type, torch.bfloat16, enabled=facts.half):
            inputs = Inputs(noisy, level.tau, point, n, facts.back, outer, facts.sigma / facts.alpha)
            return self.decoder(facts.problem, inputs).to(x)


class Facts(NamedTuple):
    """What all iterations share: the problem, (x_t, alpha_t, sigma_t), what y alone says, and the decoder's precision."""

    problem: Posterior
    x_t: Tensor
    alpha: Tensor
    sigma: Tensor
    back: Tensor
    half: bool

    def prox(self, x: Tensor, level: Level) -> Tensor:
        """Return argmin_u -weight log p(y | u) + |x_t - alpha u|^2 / (2 sigma^2) + |u - x|^2 / (2 rho^2).

        Dividing by the weight leaves the likelihood as it is and widens both Gaussians.
        """
        wide = level.weight.sqrt()
        joint = JointLikelihood(self.problem.likelihood, self.x_t, self.alpha, self.sigma * wide)
        return joint.prox(x, level.rho * wide)
