r"""The training of an unfolded network as a sampler of p(x_0 | y, x_t).

x_t = alpha_t x_0 + sigma_t z at a random t, y simulated from x_0, and M draws x_i of the network for the same (y, x_t). The model
minimises a weighted sum of terms, each of which can be switched off by weight 0:

* an energy score of the draws in one or more embeddings: proper, so that the spread is learned, not only the mean;
* LPIPS(x_i, x_0);
* |eps_i - z|^2 with eps_i = (x_t - alpha_t x_i) / sigma_t, min(1 / ratio_t^2, cap) times the error of x_0: the published term,
  whose weight falls to nothing at high noise;
* the adversarial loss of a conditional critic, a second player;
* distribution matching against the frozen prior, with a fake score as a further player.

Kemajou Mbakam, Spence, Pereyra (2025, arXiv:2507.02686) use LPIPS, noise prediction and critic with M = 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.core.batch import item_dot, like, tile
from fewstep.core.checks import check_counts, check_not_negative
from fewstep.core.denoiser import Denoiser
from fewstep.core.likelihood import Likelihood
from fewstep.core.noise import Noise
from fewstep.core.objective import Objective
from fewstep.core.problem import Posterior
from fewstep.objectives.adversarial import fake_loss, generator_loss, real_loss
from fewstep.objectives.embeddings import Embedding, exactly
from fewstep.objectives.energy import energy_score
from fewstep.objectives.matching import DistributionMatching
from fewstep.objectives.perceptual import drawn_features, lpips_distance, lpips_features
from fewstep.unfolded.starts import Given, gaussian


class Contest(nn.Module):
    """An unfolded network, its critic and its fake score, which may be missing: what the trainer holds."""

    def __init__(self, network: nn.Module, critic: nn.Module | None = None, fake: Denoiser | None = None) -> None:
        super().__init__()
        self.network, self.critic, self.fake = network, critic, fake


@dataclass(frozen=True)
class Weights:
    """Weights of the terms; 0 switches one off.

    Attributes:
        energy: of the energy score.
        spread: of its second term; 1 is proper.
        perceptual: of LPIPS.
        noise: of the noise prediction.
        noise_cap: largest weight of an error of x_0 in the noise prediction.
        adversarial: of the critic's verdict.
        r1: of the penalty on the critic's gradient.
        matching: of distribution matching.
    """

    energy: float = 1.0
    spread: float = 1.0
    perceptual: float = 0.0
    noise: float = 0.0
    noise_cap: float = 10.0
    adversarial: float = 0.0
    r1: float = 1.0
    matching: float = 0.0

    def __post_init__(self) -> None:
        check_not_negative(self, *vars(self))


@dataclass(frozen=True)
class UD2M(Objective):
    """The sum of terms above.

    Attributes:
        prior: the frozen prior; its schedule is that of x_t.
        weights: of the terms.
        embeddings: where the energy score is computed.
        lpips: network of LPIPS, frozen.
        draws: M; at least 2 for an energy score.
        times: outer times that are met in sampling.
        share: of items whose t is one of `times`; the others are uniform in t.
        t_min: smallest t.
        matching: how distributions are matched.
        fake_turns: steps of the fake score for one of the network.
    """

    prior: Denoiser
    weights: Weights = field(default_factory=Weights)
    embeddings: tuple[Embedding, ...] = ()
    lpips: nn.Module | None = None
    draws: int = 2
    times: tuple[float, ...] = (1.0, 4 / 9, 1 / 9)
    share: float = 0.7
    t_min: float = 0.002
    matching: DistributionMatching = field(default_factory=DistributionMatching)
    fake_turns: int = 1

    def __post_init__(self) -> None:
        if not any(getattr(self.weights, name) for name in TERMS):
            raise ValueError(f"every term is switched off; at least one of {', '.join(TERMS)} must have a weight")
        if self.weights.energy and (self.draws < 2 or not self.embeddings):
            raise ValueError("an energy score needs at least two draws and an embedding")
        if self.weights.perceptual and self.lpips is None:
            raise ValueError("the perceptual term needs the LPIPS network")
        if not self.times or not all(0 < t <= 1 for t in self.times):
            raise ValueError(f"times must lie in (0, 1], and at least one of them, got {self.times}")
        check_counts(self, "draws", "fake_turns")
        if not 0 <= self.share <= 1 or not 0 < self.t_min < 1:
            raise ValueError("share lies in [0, 1] and t_min in (0, 1)")

    def players(self, model: nn.Module) -> dict[str, Iterable[nn.Parameter]]:
        """See `Objective`; critic and fake score play where their terms are on, the latter `fake_turns` times."""
        contest = _contest(model)
        players: dict[str, Iterable[nn.Parameter]] = {"model": _trainable(contest.network)}
        if self.weights.adversarial:
            if contest.critic is None:
                raise ValueError("the adversarial term needs a critic")
            players["critic"] = _trainable(contest.critic)
        if self.weights.matching:
            if contest.fake is None:
                raise ValueError("distribution matching needs a fake score")
            players |= {f"fake{k or ''}": _trainable(contest.fake) for k in range(self.fake_turns)}
        return players

    def loss(self, player: str, model: nn.Module, batch: Any, noise: Noise) -> tuple[Tensor, dict[str, float]]:
        """See `Objective`; `batch` holds "x0", (B, *event), and "likelihood", of B measurements."""
        contest = _contest(model)
        with torch.set_grad_enabled(player == "model"):
            turn = self.play(contest, batch["x0"], batch["likelihood"], noise)
        if player == "critic":
            assert contest.critic is not None
            real = real_loss(contest.critic, turn.x0, turn.condition(1), self.weights.r1)
            return real.mean() + fake_loss(contest.critic, turn.draws, turn.condition(self.draws)).mean(), {}
        if player != "model":
            assert contest.fake is not None
            return self.matching.fake_loss(contest.fake, turn.draws, turn.noise), {}
        terms = {name: term(self, turn).mean() for name, term in TERMS.items() if getattr(self.weights, name)}
        total = torch.stack([getattr(self.weights, name) * value for name, value in terms.items()]).sum()
        return total, {name: float(value.detach()) for name, value in terms.items()}

    def play(self, contest: Contest, x0: Tensor, likelihood: Likelihood, noise: Noise) -> Turn:
        """Return draws of the network for a random t and everything that the terms need."""
        t = self.sample_times(noise, x0)
        alpha, sigma = self.prior.schedule(t)
        x_t = like(alpha, x0) * x0 + like(sigma, x0) * noise.randn_like(x0)
        problem = Posterior(self.prior, likelihood).expand(self.draws)
        streams = noise.expand(self.draws)
        at, times = tile(x_t, self.draws), t.repeat(self.draws)
        previous = remembered(contest.network, problem, at, times, streams)
        draws = contest.network(problem, at, times, streams, previous)
        return Turn(contest, likelihood, draws, x0, sigma / alpha, streams)

    def sample_times(self, noise: Noise, x0: Tensor) -> Tensor:
        """Return one time per item, (B,)."""
        chosen = torch.tensor(self.times, dtype=x0.dtype, device=x0.device)
        index = (noise.rand() * len(self.times)).long().clamp_max(len(self.times) - 1)
        uniform = self.t_min + (1 - self.t_min) * noise.rand()
        return torch.where(noise.rand() < self.share, chosen[index.to(x0.device)], uniform.to(x0)).to(x0)


class Turn(NamedTuple):
    """One play: the draws, (M B, *event), for B measurements of x0, the ratio of their x_t, (B,), and a stream per draw."""

    contest: Contest
    likelihood: Likelihood
    draws: Tensor
    x0: Tensor
    ratio: Tensor
    noise: Noise

    @property
    def per_item(self) -> int:
        """M."""
        return len(self.draws) // len(self.x0)

    def condition(self, count: int) -> tuple[Tensor, Tensor]:
        """Return what the critic knows of y and t, `count` times: E[x_0 | y] under a standard normal prior, and the ratio of x_t."""
        with torch.no_grad(), exactly(self.x0):
            back = self.likelihood.prox(torch.zeros_like(self.x0), torch.ones_like(self.ratio))
        return tile(back, count), self.ratio.repeat(count)


@torch.no_grad()
def remembered(network: nn.Module, problem: Posterior, x_t: Tensor, t: Tensor, noise: Noise) -> Tensor | None:
    """Return what stands for the previous outer estimate, (N, *event), where the network's start wants one.

    In sampling that estimate led to x_t by the bridge; given x_t it is then one more draw of p(x_0 | y, x_t), if the sampler is
    right. So here it is one. At t = 1, where sampling begins, there is none, and the start does without.
    """
    if not getattr(network, "remembers", False):
        return None
    alpha, sigma = problem.schedule(t)
    with exactly(x_t):
        first = gaussian(Given(problem.likelihood, x_t, alpha, sigma, None))
    again = network(problem, x_t, t, noise)
    torch.clear_autocast_cache()  # where torch (2.4) keeps weights in half precision that have no graph
    return torch.where(like(t, x_t) < 1, again, first)


def _energy(o: UD2M, turn: Turn) -> Tensor:
    scores = []
    for embed in o.embeddings:
        with torch.no_grad():
            truth = embed(turn.x0, turn.likelihood)
        scores.append(energy_score(embed(turn.draws, turn.likelihood), truth, turn.per_item, o.weights.spread))
    return torch.stack(scores).sum(0)


def _perceptual(o: UD2M, turn: Turn) -> Tensor:
    assert o.lpips is not None
    with torch.no_grad():
        truth = [tile(part, turn.per_item) for part in lpips_features(o.lpips, turn.x0)]
    return lpips_distance(drawn_features(o.lpips, turn.draws), truth)


def _noise(o: UD2M, turn: Turn) -> Tensor:
    weight = turn.ratio.square().reciprocal().clamp_max(o.weights.noise_cap).repeat(turn.per_item)
    error = turn.draws - tile(turn.x0, turn.per_item)
    return weight * item_dot(error, error) / turn.x0[0].numel()


def _adversarial(o: UD2M, turn: Turn) -> Tensor:
    assert turn.contest.critic is not None
    return generator_loss(turn.contest.critic(turn.draws, *turn.condition(turn.per_item)))


def _matching(o: UD2M, turn: Turn) -> Tensor:
    assert turn.contest.fake is not None
    return o.matching.loss(o.prior, turn.contest.fake, turn.draws, turn.noise)


# only the last takes from the noise, so that switching one off changes no other
TERMS = {
    "energy": _energy,
    "perceptual": _perceptual,
    "noise": _noise,
    "adversarial": _adversarial,
    "matching": _matching,
}


def _contest(model: nn.Module) -> Contest:
    if not isinstance(model, Contest):
        raise TypeError(
            f"this objective trains a Contest of network, critic and fake score, not a {type(model).__name__}"
        )
    return model


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]
