"""Germination of seeds: a logistic regression with a random effect per plate."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.core.density import TargetDensity

# Crowder 1978, Appl. Statist. 27, table 3: germinated, of how many, seed (O. aegyptiaca 75 or 73), extract (bean or cucumber)
_PLATES = (
    (10, 39, 0, 0), (23, 62, 0, 0), (23, 81, 0, 0), (26, 51, 0, 0), (17, 39, 0, 0), (5, 6, 0, 1), (53, 74, 0, 1),
    (55, 72, 0, 1), (32, 51, 0, 1), (46, 79, 0, 1), (10, 13, 0, 1), (8, 16, 1, 0), (10, 30, 1, 0), (8, 28, 1, 0),
    (23, 45, 1, 0), (0, 4, 1, 0), (3, 12, 1, 1), (22, 41, 1, 1), (15, 30, 1, 1), (32, 51, 1, 1), (3, 7, 1, 1),
)  # fmt: skip


@dataclass(frozen=True)
class Seeds(TargetDensity):
    r"""x = (a_0, a_1, a_2, a_12, b_1, ..., b_21, log tau): r_j of n_j seeds of plate j germinate with log-odds a'z_j + b_j.

    a ~ N(0, 10^2), b_j | tau ~ N(0, 1 / tau), tau ~ Gamma(0.01, rate 0.01); the density is that of log tau, and the binomial
    coefficients are included, as in Blessing et al. 2024, arXiv:2406.07423, after Crowder 1978.
    """

    dim = 26
    log_z = -73.4065  # random effects by Gauss-Hermite, the rest by eight scrambled Sobol nets: standard error 2e-4

    def log_prob(self, x: Tensor) -> Tensor:
        """See `TargetDensity`."""
        r, n, design = _plates(x)
        a, b, log_tau = x[:, :4], x[:, 4:25], x[:, 25]
        odds = a @ design + b
        binomial = r * odds - n * torch.nn.functional.softplus(odds)
        coefficients = (torch.lgamma(n + 1) - torch.lgamma(r + 1) - torch.lgamma(n - r + 1)).sum()
        prior = -a.square().sum(1) / 200 - 4 * math.log(10) - 12.5 * math.log(2 * math.pi)
        effects = 10.5 * log_tau - log_tau.exp() * b.square().sum(1) / 2
        gamma = 0.01 * log_tau - 0.01 * log_tau.exp() + 0.01 * math.log(0.01) - math.lgamma(0.01)
        return binomial.sum(1) + coefficients + prior + effects + gamma

    def score(self, x: Tensor) -> Tensor:
        """See `TargetDensity`."""
        r, n, design = _plates(x)
        a, b, tau = x[:, :4], x[:, 4:25], x[:, 25:].exp()
        residual = r - n * torch.sigmoid(a @ design + b)
        last = 10.51 - tau * (b.square().sum(1, keepdim=True) / 2 + 0.01)
        return torch.cat([residual @ design.T - a / 100, residual - tau * b, last], 1)


def _plates(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return r and n, (21,), and z, (4, 21), like `x`."""
    r, n, seed, extract = torch.tensor(_PLATES, dtype=x.dtype, device=x.device).T
    return r, n, torch.stack([torch.ones_like(seed), seed, extract, seed * extract])
