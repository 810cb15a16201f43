r"""Is a sampler calibrated? Checks on B problems whose truths were drawn from the prior and measured, K samples for each.

If the samples are draws of p(x | y), truth and samples are exchangeable given y, so for any statistic f(x, y) without ties the rank
of f(truth) among f(samples) is uniform on 0..K; of discrete x it is not. What a check can see depends on f:

* coordinates (simulation-based calibration, Talts et al. 2018, arXiv:1804.06788) see wrong means and spreads, but not a sampler that
  ignores y and draws from the prior: its ranks are uniform too;
* log p(y | x) (Modrak et al. 2023, arXiv:2211.02383) sees that one: pass `likelihood.log_prob` of samples and truth to `sbc_ranks`;
* the distance to a reference point (TARP, Lemos et al. 2023, arXiv:2302.03026): the share of ranks below j is the coverage of balls
  around it that hold j / (K + 1) of the samples. It sees that one only if the point depends on y, as `tarp_references` does.

The B truths must be independent, the K samples of one problem independent of each other, hence not antithetic; a uniform rank
proves no more than that f is calibrated on average over the prior.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.likelihood import Likelihood
from fewstep.core.noise import Noise


class ExpectedCoverage(NamedTuple):
    """Credible levels, the share of truths inside, and the standard error of that share if it is right; (K,) each."""

    level: Tensor
    coverage: Tensor
    error: Tensor


def sbc_ranks(samples: Tensor, truth: Tensor) -> Tensor:
    """Return how many samples lie below the truth, (K, B, *event) and (B, *event) -> (B, *event), integers 0..K.

    Raises:
        ValueError: shapes that do not fit, or numbers that are not finite and so have no rank.
    """
    if samples.shape[1:] != truth.shape:
        raise ValueError(f"samples {tuple(samples.shape)} do not fit truths {tuple(truth.shape)}")
    if not bool(torch.isfinite(samples).all() and torch.isfinite(truth).all()):
        raise ValueError("samples or truths hold NaN or infinite values")
    return (samples < truth).sum(0)


def tarp_ranks(samples: Tensor, truth: Tensor, references: Tensor) -> Tensor:
    """Return how many samples lie nearer to the reference than the truth, (K, B, *event), (B, *event) twice -> (B,)."""
    if samples.shape[1:] != truth.shape or references.shape != truth.shape:
        raise ValueError(f"{tuple(samples.shape)}, {tuple(truth.shape)} and {tuple(references.shape)} do not fit")
    # in double precision: the squares of what diverged overflow before it does
    far = torch.linalg.vector_norm((samples - references).flatten(2), dim=2, dtype=torch.float64)
    return sbc_ranks(far, torch.linalg.vector_norm((truth - references).flatten(1), dim=1, dtype=torch.float64))


def tarp_references(likelihood: Likelihood, seed: int = 0, rho: float = 3.0) -> Tensor:
    """Return a reference for each measurement, (B, *event): argmin_x -log p(y | x) + |x - z|^2 / (2 rho^2) of one z for all.

    The prox makes it depend on y. One z, drawn from N(0, rho^2 I), puts all of them to one side where y says little: over
    references in all directions a bias averages out. Other seeds look from other sides.

    Args:
        likelihood: of B measurements, with a prox.
        seed: of z.
        rho: how far out to look from, some three prior standard deviations.
    """
    noise = Noise([seed] * likelihood.batch, likelihood.dtype, likelihood.device)
    return likelihood.prox(rho * noise.randn(*likelihood.event_shape), rho)


def uniformity(ranks: Tensor, num_samples: int, bins: int = 10) -> Tensor:
    """Return the p-value of a chi-square test that ranks, (B, *event), are uniform on 0..num_samples; (*event).

    Coordinates depend on each other: over D of them compare the smallest with the threshold divided by D.

    Raises:
        ValueError: ranks out of range, more bins than ranks, or fewer than five problems to a bin.
    """
    from scipy.stats import chisquare

    if not bool(((ranks >= 0) & (ranks <= num_samples)).all()):
        raise ValueError(f"ranks must lie in 0..{num_samples}")
    bin_of = torch.arange(num_samples + 1) * bins // (num_samples + 1)
    expected = len(ranks) * torch.bincount(bin_of, minlength=bins).double() / (num_samples + 1)
    if float(expected.min()) < 5:
        raise ValueError(f"{len(ranks)} problems with {num_samples} samples are too few for {bins} bins")
    rows = torch.nn.functional.one_hot(bin_of[ranks.cpu().reshape(len(ranks), -1)], bins).sum(0)  # (D, bins)
    p = chisquare(rows.numpy(), expected.numpy(), axis=1).pvalue
    return torch.from_numpy(p).reshape(ranks.shape[1:])


def expected_coverage(ranks: Tensor, num_samples: int) -> ExpectedCoverage:
    """Return the expected coverage of `tarp_ranks`, (B,), at the levels j / (K + 1), where it is exact for K samples."""
    counts = torch.arange(1, num_samples + 1)
    level = counts.double() / (num_samples + 1)
    coverage = (ranks.cpu()[:, None] < counts).double().mean(0)
    return ExpectedCoverage(level, coverage, (level * (1 - level) / len(ranks)).sqrt())
