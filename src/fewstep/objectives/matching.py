r"""Distribution matching: the draws of a sampler, noised, against the law of a frozen prior, noised alike.

For draws x_i and x_s = alpha_s x_i + sigma_s z at random levels r = sigma_s / alpha_s

    d/dx_i  E KL(q_s || p_s) = alpha_s (score_fake - score_prior)(x_s) = (D_fake - D_prior)(x_s) / r^2 ,

q_s being the law of x_s, p_s that of noised prior samples, and D_fake the denoiser of q_s: a *fake score* that is trained beside
the sampler on its detached draws (Luo et al. 2023, arXiv:2305.18455; Yin et al. 2024, arXiv:2405.14867). Here the difference is
divided by the standard deviation of x_0 given x_s for data of spread sigma_data. That is what DMD's normaliser |x_i - D_prior(x_s)|
is on average; as a function of the level alone it leaves the whole the gradient of a weighted sum of KL divergences, which is 0
only where q = p.

The draws of a conditional sampler are those of many y and x_t together: what is matched is their law averaged over both, which is
the prior's for every exact sampler of p(x_0 | y, x_t), but not for those alone.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.core.batch import item_dot, like
from fewstep.core.denoiser import Denoiser
from fewstep.core.noise import Noise
from fewstep.objectives.denoising import DenoisingScoreMatching
from fewstep.unfolded.lora import LoRAConfig, add_lora


@dataclass(frozen=True)
class DistributionMatching:
    """The loss of the sampler and that of the fake score.

    Attributes:
        levels: at which noise levels the laws are compared, and how the fake score is trained.
    """

    levels: DenoisingScoreMatching = field(default_factory=DenoisingScoreMatching)

    def loss(self, prior: Denoiser, fake: Denoiser, draws: Tensor, noise: Noise) -> Tensor:
        """Return a loss, (N,), whose gradient in the draws, (N, *event), is `direction` over their size."""
        step = draws.detach() - self.direction(prior, fake, draws, noise)
        return 0.5 * item_dot(draws - step, draws - step) / draws[0].numel()

    @torch.no_grad()
    def direction(self, prior: Denoiser, fake: Denoiser, draws: Tensor, noise: Noise) -> Tensor:
        """Return sqrt(weight(r)) (D_fake - D_prior)(x_s) for one random level per draw, (N, *event); minus it leads to the prior."""
        ratio = self.levels.ratios(noise).to(draws)
        s = prior.schedule.time(ratio)
        alpha, sigma = (like(c, draws) for c in prior.schedule(s))
        x_s = alpha * draws + sigma * noise.randn_like(draws)
        return like(self.levels.weight(ratio).sqrt(), draws) * (fake(x_s, s) - prior(x_s, s)).to(draws)

    def fake_loss(self, fake: Denoiser, draws: Tensor, noise: Noise) -> Tensor:
        """Return what the fake score minimises on draws, (): denoising score matching; the draws receive no gradient."""
        return self.levels.loss("model", fake, draws.detach(), noise)[0]


def fake_score(prior: Denoiser, lora: LoRAConfig) -> Denoiser:
    """Return a copy of the prior with trainable low-rank additions, which begins as the prior and is otherwise frozen.

    Raises:
        ValueError: nothing of it could be trained, or peft is not installed.
    """
    twin = copy.deepcopy(prior)
    add_lora(twin, lora)
    if not any(p.requires_grad for p in twin.parameters()):
        raise ValueError(
            f"nothing of a {type(prior).__name__} can be trained by LoRA of rank {lora.rank}: no fake score"
        )
    return twin
