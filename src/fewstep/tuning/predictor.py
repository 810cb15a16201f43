"""A small network that ranks solvers it has not seen by those that were tried."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.core.noise import seeded


def ranking_loss(predicted: Tensor, scores: Tensor) -> Tensor:
    """Return -log sigmoid of the predicted difference of all pairs, the worse one first, (E,) twice -> ()."""
    margins = predicted[:, None] - predicted[None]
    worse = scores[:, None] > scores[None]
    return F.softplus(-margins)[worse].mean() if bool(worse.any()) else 0 * predicted.sum()


def fit(features: Tensor, scores: Tensor, seed: int, width: int = 64, steps: int = 60) -> nn.Module:
    """Return a network features -> score, right about the order only, trained on what was tried.

    Few steps and strong decay: with a few hundred examples it would learn them by heart.

    Args:
        features: (E, G) float32.
        scores: (E,), lower is better.
        seed: of its weights.
        width: of the hidden layer.
        steps: of Adam on all pairs.
    """
    net = seeded(lambda: _perceptron(features.shape[1], width), seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        ranking_loss(net(features), scores).backward()
        optimizer.step()
    return net.requires_grad_(False)


def _perceptron(size: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, 1), nn.Flatten(0))
