"""Gaussian mixtures fitted to samples."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = 1e-4  # smallest variance, as a share of the mean variance of the samples


class Fitted(NamedTuple):
    """A mixture of Gaussians with diagonal covariances: weights, (K,), means, (K, d), variances, (K, d)."""

    weights: Tensor
    means: Tensor
    variances: Tensor


def fit_mixture(x: Tensor, components: int, means: Tensor | None = None, seed: int = 0, tries: int = 3) -> Fitted:
    """Return the likeliest mixture that expectation maximisation finds (Dempster, Laird and Rubin 1977, J. R. Statist. Soc. B 39).

    Args:
        x: samples, (N, d).
        components: K.
        means: where the means start, (K, d); spread over the samples by k-means++ where absent.
        seed: of that spreading.
        tries: how often it is done.

    Raises:
        ValueError: fewer samples than components.
    """
    if len(x) < components:
        raise ValueError(f"{len(x)} samples cannot carry {components} components")
    x = x.double()
    starts = [spread_out(x, components, seed + k) for k in range(tries)] if means is None else [means.double()]
    found = max((_maximised(x, start) for start in starts), key=lambda pair: pair[0])[1]
    return Fitted(*(value.float() for value in found))


def _maximised(x: Tensor, means: Tensor) -> tuple[float, Fitted]:
    """Return the mean log-likelihood and the mixture where a step gains less than 1e-6 per sample, or after 200 steps."""
    floor, last = FLOOR * x.var(0).mean().clamp_min(1e-12), -math.inf
    shares = torch.nn.functional.one_hot(torch.cdist(x, means).argmin(1), len(means)).double()
    for _ in range(200):
        count = shares.sum(0).clamp_min(1e-9)
        weights, means = count / count.sum(), shares.T @ x / count[:, None]
        variances = (shares.T @ x.square() / count[:, None] - means.square()).clamp_min(floor)
        log = (
            (x.square() @ (1 / variances).T) - 2 * x @ (means / variances).T + (means.square() / variances).sum(1)
        ) / -2
        log = log - variances.log().sum(1) / 2 + weights.log()
        total = float(log.logsumexp(1).mean())
        if total - last < 1e-6:
            break
        last, shares = total, log.softmax(1)
    return total, Fitted(weights, means, variances)


def spread_out(x: Tensor, count: int, seed: int) -> Tensor:
    """Return `count` of the samples, each drawn in proportion to its squared distance from those before (k-means++)."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [x[int(torch.randint(len(x), (1,), generator=generator))]]
    distance = torch.full((len(x),), math.inf, dtype=x.dtype)
    for _ in range(count - 1):
        distance = torch.minimum(distance, (x - chosen[-1]).square().sum(1))
        chosen.append(x[int(torch.multinomial(distance + 1e-12, 1, generator=generator))])
    return torch.stack(chosen)
