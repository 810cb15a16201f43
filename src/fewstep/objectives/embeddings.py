"""Spaces in which draws are compared: each embedding maps x to parts (N, C, P) whose P places are scored one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.core.batch import like
from fewstep.core.checks import check_count, check_counts, check_positive
from fewstep.core.likelihood import GaussianLikelihood, Likelihood
from fewstep.core.together import Together
from fewstep.objectives.perceptual import drawn_features

Embedding = Callable[[Tensor, Likelihood], list[Tensor]]


def exactly(x: Tensor) -> torch.autocast:
    """Return the context of what must not be done in half precision where `x` lies: operators and linear solves."""
    return torch.autocast(x.device.type, enabled=False)


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
    with exactly(x):
        observed = repeated.A(x)
    return [torch.cat([(observed / like(repeated.sigma, observed)).flatten(1), x.flatten(1)], 1)[..., None]]


def marginals(x: Tensor, likelihood: Likelihood) -> list[Tensor]:
    """Return each of the P coordinates of `measured` as a place of its own, times sqrt(P): one-dimensional scores.

    Lengths of long vectors hardly vary, so that the score of the whole vector hardly sees how far draws are spread: by
    |x - x'|^2 the spread cancels. The score of one coordinate sees its variance. It knows nothing of dependence, so the two go
    together.

    Raises:
        TypeError: the likelihood is not linear-Gaussian.
    """
    (vector,) = measured(x, likelihood)
    return [vector.mT * vector.shape[1] ** 0.5]


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

    def __post_init__(self) -> None:
        check_counts(self, "size", "stride")
        if not isinstance(self.scales, list | tuple) or not self.scales:
            raise ValueError(f"scales must be a list of whole numbers, got {self.scales!r}")
        for scale in self.scales:
            check_count("a scale", scale)

    def __call__(self, x: Tensor, likelihood: Likelihood) -> list[Tensor]:
        """See `Embedding`; x is (N, C, H, W)."""
        parts = [F.unfold(F.avg_pool2d(x, s) if s > 1 else x, self.size, stride=self.stride) for s in self.scales]
        return [part / part.shape[1] ** 0.5 for part in parts]


@dataclass(frozen=True)
class MeasuredPatches:
    """Patches of sqrt(A'A) x / sigma: what was observed weighs by its precision, up to a limit, what was not counts nothing.

    With `Patches` beside it the two are the metric of the likelihood. Likelihoods whose singular values are not known give x itself.

    Attributes:
        patches: where.
        limit: largest weight.
    """

    patches: Patches = field(default_factory=Patches)
    limit: float = 10.0

    def __post_init__(self) -> None:
        if isinstance(self.patches, Mapping):
            object.__setattr__(self, "patches", Patches(**self.patches))
        check_positive(self, "limit")

    def __call__(self, x: Tensor, likelihood: Likelihood) -> list[Tensor]:
        """See `Embedding`; x is (N, C, H, W)."""
        return self.patches(self.seen(x, likelihood.expand(len(x) // likelihood.batch)), likelihood)

    def seen(self, x: Tensor, likelihood: Likelihood) -> Tensor:
        """Return min(sqrt(A'A) / sigma, limit) x, (N, C, H, W)."""
        if isinstance(likelihood, Together):
            pieces = zip(likelihood.parts, x.split(likelihood.sizes), strict=True)
            return torch.cat([self.seen(piece, part) for part, piece in pieces])
        if not isinstance(likelihood, GaussianLikelihood) or likelihood.spectrum is None:
            return x
        sigma = like(likelihood.sigma, x)
        with exactly(x):
            return likelihood.spectral(lambda s: (s / sigma).clamp_max(self.limit), x)


@dataclass(frozen=True)
class Features:
    """The features of LPIPS in every place.

    Attributes:
        network: of `metrics.lpips_net`.
    """

    network: nn.Module

    def __call__(self, x: Tensor, likelihood: Likelihood) -> list[Tensor]:
        """See `Embedding`; x is (N, 3, H, W) in [-1, 1], and clipped far beyond, where the draws of a network may be."""
        return drawn_features(self.network, x)
