"""A conditional critic of (x_0, what y says, t), and the losses of both sides.

Logits and soft-plus losses (non-saturating, Goodfellow et al. 2014), the fakes detached in the critic's turn, and a penalty on its
gradient at real samples (R1, Mescheder et al. 2018, arXiv:1801.04406).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.core.batch import item_dot
from fewstep.core.checks import check_counts


@dataclass(frozen=True)
class CriticConfig:
    """The shape of the critic.

    Attributes:
        channels: of an image.
        width: features at full size; they double at each of the first halvings, up to four times.
        stages: halvings of the size.
    """

    channels: int = 3
    width: int = 32
    stages: int = 4

    def __post_init__(self) -> None:
        check_counts(self, "channels", "width", "stages")


class Critic(nn.Module):
    """(x_0, back-projection, log ratio of x_t) -> logits, one per place of the coarsest grid: large means real."""

    def __init__(self, config: CriticConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or CriticConfig()
        widths = [config.width * min(2**i, 4) for i in range(config.stages + 1)]
        self.first = nn.Conv2d(2 * config.channels, widths[0], 3, padding=1)
        self.stages = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.level = nn.Linear(1, widths[0])
        self.last = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, x0: Tensor, back: Tensor, ratio: Tensor) -> Tensor:
        """Return logits, (N, P), from images (N, C, H, W) in [-1, 1] and the ratio sigma_t / alpha_t, (N,)."""
        h = self.first(torch.cat([x0, back], 1)) + like_plane(self.level(ratio.log()[:, None] / 3))
        for stage in self.stages:
            h = F.avg_pool2d(stage(F.leaky_relu(h, 0.2)), 2)
        return self.last(F.leaky_relu(h, 0.2)).flatten(1)


def like_plane(v: Tensor) -> Tensor:
    """Return (N, C) as (N, C, 1, 1)."""
    return v[..., None, None]


def generator_loss(fake: Tensor) -> Tensor:
    """Return softplus(-logit) of fakes, (N, P) -> (N,)."""
    return F.softplus(-fake).mean(1)


def real_loss(critic: nn.Module, real: Tensor, condition: tuple[Tensor, Tensor], r1: float) -> Tensor:
    """Return softplus(-D(real)) + r1 / 2 |grad D(real)|^2, (N,): the critic's loss of real images, which receive no gradient."""
    with torch.enable_grad():
        leaf = real.detach().requires_grad_()
        logits = critic(leaf, *condition)
        gradient = torch.autograd.grad(logits.sum(), leaf, create_graph=True)[0] / logits.shape[1]
    return F.softplus(-logits).mean(1) + 0.5 * r1 * item_dot(gradient, gradient)


def fake_loss(critic: nn.Module, fake: Tensor, condition: tuple[Tensor, Tensor]) -> Tensor:
    """Return softplus(D(fake)), (N,): the critic's loss of fakes, which receive no gradient."""
    return F.softplus(critic(fake.detach(), *condition)).mean(1)
