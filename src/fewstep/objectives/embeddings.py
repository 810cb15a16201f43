"""Spaces in which draws are compared: each embedding maps x to parts (N, C, P) whose P places are scored one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.core.batch import like
from fewstep.core.likelihood import GaussianLikelihood, Likelihood
from fewstep.objectives.perceptual import lpips_features

Embedding = Callable[[Tensor, Likelihood], list[Tensor]]


def measured(x: Tensor, likelihood: Likelihood) -> list[Tensor]:
    """Return (A x / sigma, x) as one vector: the metric A'A / sigma^2 + I of the likelihood.

    Well observed directions weigh as much as their precision; in the Euclidean norm they weigh nothing. The batch of x is a
    multiple of the likelihood's.

    Raises:
        TypeError: the likelihood is not linear-Gaussian.
    """
    if not isinstance(likelihood, GaussianLikelihood):
        raise TypeError(f"the metric of a {type(likelihood).__name__} is not known: it is not linear-Gaussian")
    repeated = likelihood.expand(len(x) // likelihood.batch)
    observed = repeated.A(x)
    return [torch.cat([(observed / like(repeated.sigma, observed)).flatten(1), x.flatten(1)], 1)[..., None]]


@dataclass(frozen=True)
class Patches:
    """All patches of an image at several scales, divided by the square root of their size.

    Attributes:
        size: side of a patch, pixels of its scale.
        stride: pixels from one patch to the next.
        scales: factors by which the image is averaged.
    """

    size: int = 8
    stride: int = 4
    scales: tuple[int, ...] = (1, 2, 4)

    def __call__(self, x: Tensor, likelihood: Likelihood) -> list[Tensor]:
        """See `Embedding`; x is (N, C, H, W)."""
        parts = [F.unfold(F.avg_pool2d(x, s) if s > 1 else x, self.size, stride=self.stride) for s in self.scales]
        return [part / part.shape[1] ** 0.5 for part in parts]


@dataclass(frozen=True)
class Features:
    """The features of LPIPS in every place.

    Attributes:
        network: of `metrics.lpips_net`.
    """

    network: nn.Module

    def __call__(self, x: Tensor, likelihood: Likelihood) -> list[Tensor]:
        """See `Embedding`; x is (N, 3, H, W) in [-1, 1]."""
        return lpips_features(self.network, x)
