r"""The energy score: proper, rewards spread, and needs nothing but draws.

    ES = mean_i |x_i - x_0| - 1/2 mean_{i != j} |x_i - x_j|

for draws x_1, ..., x_M of the model given the same y and x_t (Gneiting and Raftery 2007, eq. 22). Its expectation is smallest
where the model's law is that of x_0, in any space whose norm is Euclidean; what the space is decides what weighs. The mean of the
scores of several parts (patches, scales, features) is proper for the laws of the parts.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-12  # under the root, so that equal draws have a gradient


def energy_score(draws: list[Tensor], truth: list[Tensor], count: int, spread: float = 1.0) -> Tensor:
    """Return the score of each measurement, (B,), the sum over parts of the mean over places.

    Args:
        draws: parts of M draws, (M B, C, P) each, draw i of measurement b at i B + b.
        truth: the same parts of the truth, (B, C, P) each.
        count: M, at least 2.
        spread: factor on the second term; less than 1 is not proper and gives draws that are too close.

    Raises:
        ValueError: fewer than two draws.
    """
    if count < 2:
        raise ValueError(f"an energy score needs at least two draws, got {count}")
    pairs = torch.triu_indices(count, count, 1)
    total: Tensor | float = 0.0
    for x, x0 in zip(draws, truth, strict=True):
        each = x.unflatten(0, (count, -1))
        error, distance = _norm(each - x0).mean(0), _norm(each[pairs[0]] - each[pairs[1]]).mean(0)
        total = total + (error - 0.5 * spread * distance).mean(1)
    assert isinstance(total, Tensor)
    return total


def _norm(v: Tensor) -> Tensor:
    """Return lengths, (M, B, C, P) -> (M, B, P)."""
    return (v.square().sum(2) + _TINY).sqrt()
