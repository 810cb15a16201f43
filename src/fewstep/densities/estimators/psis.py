r"""Pareto-smoothed importance sampling: how heavy the tail of the weights is, and weights with that tail smoothed.

The largest M = min(S / 5, 3 sqrt(S)) of S weights are fitted by a generalised Pareto law of shape k. Weights have 1 / k finite
moments: beyond k = 0.5 the variance of a weighted mean is infinite, beyond 0.7 no useful number of draws makes up for it.

References:
    Vehtari, Simpson, Gelman, Yao and Gabry 2024, J. Mach. Learn. Res. 25 (arXiv:1507.02646): M, the prior on k, the limits.
    Zhang and Stephens 2009, Technometrics 51: the fit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_PRIOR_DRAWS, _PRIOR_SHAPE = 10, 0.5  # k is drawn towards 0.5 as if by ten draws (Vehtari et al., appendix G)


def limit(count: int) -> float:
    """Return the largest k at which `count` draws give a usable estimate, min(1 - 1 / log10 S, 0.7)."""
    return min(1 - 1 / math.log10(count), 0.7) if count > 1 else -math.inf


def pareto_k(log_weights: Tensor) -> float:
    """Return k-hat of log-weights, (S,).

    -inf where (almost) all large weights are equal, +inf where a few tower over equal ones or all are zero, NaN for fewer
    than 25 draws.
    """
    return smooth(log_weights)[1]


def smooth(log_weights: Tensor) -> tuple[Tensor, float]:
    """Return the log-weights with their tail replaced by the quantiles of its fit, (S,) float64, and k-hat.

    Biased, and less variable where k is large: for expectations, not for log Z.

    Raises:
        ValueError: a NaN or an infinite weight; weights of zero (-inf) are fine.
    """
    log_w = log_weights.detach().double()
    if bool((log_w.isnan() | (log_w == math.inf)).any()):
        raise ValueError("the weights hold NaN or +inf")
    count = len(log_w)
    size = math.ceil(min(count / 5, 3 * math.sqrt(count)))
    if count < 25:
        return log_w, math.nan
    values, order = log_w.sort()
    top, edge = values[-1], values[-size - 1]
    if not bool(top > -math.inf):
        return log_w, math.inf
    cutoff = (edge - top).exp()
    # what equals the edge up to rounding is no tail, as with repeated particles
    tail = values[-size:][values[-size:] - edge > 1e-10]
    size = len(tail)
    if size < 5:
        return log_w, -math.inf if cutoff > 0.5 else math.inf
    excess = ((tail - top).exp() - cutoff).clamp_min(torch.finfo(torch.float64).tiny)
    shape, scale = fit_pareto(excess)
    ranks = (torch.arange(size, dtype=torch.float64, device=log_w.device) + 0.5) / size
    grown = -torch.log1p(-ranks) if shape == 0 else torch.expm1(-shape * torch.log1p(-ranks)) / shape
    smoothed = log_w.clone()
    smoothed[order[-size:]] = (cutoff + scale * grown).log().clamp_max(0) + top
    return smoothed, shape


def fit_pareto(excess: Tensor) -> tuple[float, float]:
    """Return shape k and scale of a generalised Pareto law fitted to sorted positive draws, (M,).

    The posterior mean of theta = -k / scale under the weakly informative prior of Zhang and Stephens, on a grid, with the
    profile likelihood l(theta) = M (log(-theta / k) - k - 1), k(theta) = mean log(1 - theta x).
    """
    count = len(excess)
    grid = 30 + math.isqrt(count)
    quartile = excess[max(int(count / 4 + 0.5) - 1, 0)]
    j = torch.arange(1, grid + 1, dtype=excess.dtype, device=excess.device)
    theta = 1 / excess[-1] + (1 - torch.sqrt(grid / (j - 0.5))) / (3 * quartile)
    k = torch.log1p(-theta[:, None] * excess).mean(1)
    profile = count * ((-theta / k).log() - k - 1)
    mean = (profile.softmax(0) * theta).sum()
    shape = float(torch.log1p(-mean * excess).mean())
    scale = -shape / float(mean)
    return (count * shape + _PRIOR_DRAWS * _PRIOR_SHAPE) / (count + _PRIOR_DRAWS), scale
