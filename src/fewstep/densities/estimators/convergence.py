"""Whether chains have forgotten where they started."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rhat(x: Tensor, group: int) -> Tensor:
    """Return the split R-hat of every coordinate, (N, d) -> (d,): near 1 where chains agree, above 1.01 where they do not.

    Each chain is cut in halves; with W the mean variance within halves and B that of their means, the root of
    1 - 1/n + B / W (Gelman et al. 2013, Bayesian Data Analysis, section 11.4). Chains that all sit in one mode agree too.

    Args:
        x: draws, `group` consecutive rows to a chain, as in `Draws`.
        group: draws of a chain, at least 4.

    Raises:
        ValueError: rows that do not fill chains, or chains of fewer than 4.
    """
    if group < 4 or len(x) % group:
        raise ValueError(f"needs chains of at least 4 draws, {len(x)} rows in chains of {group} given")
    half = group // 2
    chains = x.double().reshape(-1, group, x.shape[1])
    halves = torch.cat([chains[:, :half], chains[:, -half:]])
    within, between = halves.var(1).mean(0), halves.mean(1).var(0)
    return (1 - 1 / half + between / within.clamp_min(math.ulp(0.0))).sqrt()
