r"""Heavy tails made those of a normal law, coordinate by coordinate: h(y) = sinh(b y) / b, and y itself where b = 0.

The sinh of Jones and Pewsey (2009, Biometrika 96, 761). In y = asinh(b u) / b tails that fall like a lognormal law's fall like
a normal one's, and what is narrow around 0 becomes wide by as much.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_QUARTILE, _TAIL = 0.6744897501960817, 2.3263478740408408  # of N(0, 1), at 0.75 and 0.99
_HEAVY = 5.0  # ratio of tail to quartile beyond which a law is bent: 3.4 of a normal law, 5.6 of Laplace's
_MOST = 5.0  # bend


def bent(y: Tensor, b: Tensor) -> Tensor:
    """Return h(y), (N, d) -> (N, d); `b` is (d,)."""
    return torch.where(b > 0, torch.sinh(b * y) / _divisor(b), y)


def straight(u: Tensor, b: Tensor) -> Tensor:
    """Return the inverse of `bent`, (N, d) -> (N, d)."""
    return torch.where(b > 0, torch.asinh(b * u) / _divisor(b), u)


def bend_slopes(y: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return log dh/dy and its derivative in y, (N, d) each."""
    return torch.logaddexp(b * y, -b * y) - math.log(2), b * torch.tanh(b * y)


def bend_of(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return shift, scale and bend, (d,) each, of draws x, (N, d), of which coordinates have heavy tails and bend > 0.

    They have their median and quartiles at 0 and those of N(0, 1) then, and their outer percentiles at those of N(0, 1); others keep
    mean 0 and standard deviation 1. A small mode far out counts as a tail too; that makes coordinates odd, but loses no mass.
    """
    x = x.double()
    ranks = x.sort(0)[0]
    low, left, middle, right, high = (ranks[round(p * (len(x) - 1))] for p in (0.01, 0.25, 0.5, 0.75, 0.99))
    ratio = (high - low) / (right - left).clamp_min(1e-12)
    least, most = torch.zeros_like(ratio), torch.full_like(ratio, _MOST)
    for _ in range(50):  # the ratio of sinh grows with b
        b = (least + most) / 2
        more = torch.sinh(_TAIL * b) < ratio * torch.sinh(_QUARTILE * b)
        least, most = torch.where(more, b, least), torch.where(more, most, b)
    heavy = ratio > _HEAVY
    b = torch.where(heavy, (least + most) / 2, 0.0)
    quartile = (right - left) / 2 / bent(torch.full_like(b, _QUARTILE), b)
    scale = torch.where(heavy, quartile, x.std(0)).clamp_min(1e-6)
    return torch.where(heavy, middle, x.mean(0)), scale, b


def _divisor(b: Tensor) -> Tensor:
    return torch.where(b > 0, b, torch.ones_like(b))
