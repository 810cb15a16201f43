"""The log-Gaussian Cox process of the Finnish pines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fewstep.core.density import Bounds, TargetDensity, floating

_VARIANCE, _LENGTH = 1.91, 1 / 33  # Moller, Syversveen and Waagepetersen 1998, Scand. J. Statist. 25


@dataclass(frozen=True)
class Cox(TargetDensity):
    """Log intensities f on a grid x grid lattice: log N(f; mu, K) + sum_i (f_i n_i - e^{f_i} / grid^2), n_i points in cell i.

    K_ij = 1.91 exp(-33 |i - j| / grid), mu = log N - 1.91 / 2 with N points: Heng et al. 2020, arXiv:1708.08396, "LGCP", not
    whitened. The factorials of n_i are left out, as published. The log Z of 512.6 that is handed on for these data is not
    reproduced: it exceeds every estimate made here by 11 nats.

    Args:
        data: a CSV file with a header, whose columns `data_x` and `data_y` are points in the unit square.
        grid: cells per side; 40 is published, d = 1600.

    Raises:
        ValueError: a file that is no such table.
    """

    data: str | Path
    grid: int = 40

    @property
    def dim(self) -> int:  # type: ignore[override]
        """See `TargetDensity`: cells."""
        return self.grid**2

    @property
    def log_z_bounds(self) -> Bounds | None:  # type: ignore[override]
        """See `TargetDensity`; known for the Finnish pines on the published lattice."""
        if self.grid != 40 or int(self.counts.sum()) != 126:
            return None
        return Bounds(
            501.2,
            502.2,
            "thermodynamic integration from the Laplace fit 501.45 (0.15) and from the prior 501.89 (0.14)",
        )

    @cached_property
    def counts(self) -> Tensor:
        """Points per cell, (d,), float64; points on the upper or right edge belong to the last cell."""
        try:
            table = np.genfromtxt(self.data, delimiter=",", names=True)
            points = np.stack([np.atleast_1d(table[name]) for name in ("data_x", "data_y")], 1)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.data} cannot be read as points data_x, data_y ({error})") from None
        if not (np.isfinite(points).all() and points.min() >= 0 and points.max() <= 1):
            raise ValueError(f"{self.data}: the points must lie in the unit square")
        cells = np.minimum((points * self.grid).astype(int), self.grid - 1)
        return torch.from_numpy(np.bincount(cells @ [self.grid, 1], minlength=self.dim).astype(float))

    @property
    def mean(self) -> float:
        """The prior mean mu of every log intensity."""
        return math.log(float(self.counts.sum())) - _VARIANCE / 2

    @cached_property
    def prior(self) -> tuple[Tensor, Tensor]:
        """The Cholesky factor of K and its inverse, K^-1, (d, d), float64."""
        side = torch.arange(self.grid, dtype=torch.float64)
        places = torch.cartesian_prod(side, side)
        cov = _VARIANCE * torch.exp(-torch.cdist(places, places) / (self.grid * _LENGTH))
        factor = torch.linalg.cholesky(cov)
        return factor, torch.cholesky_inverse(factor)

    def log_prob(self, x: Tensor) -> Tensor:
        """See `TargetDensity`."""
        x, (factor, precision) = floating(x), self.prior
        centred = x - self.mean
        fit = x @ self.counts.to(x) - x.exp().sum(1) / self.dim
        constant = float(factor.diagonal().log().sum()) + self.dim / 2 * math.log(2 * math.pi)
        return fit - (centred @ precision.to(x) * centred).sum(1) / 2 - constant

    def score(self, x: Tensor) -> Tensor:
        """See `TargetDensity`."""
        x = floating(x)
        return self.counts.to(x) - x.exp() / self.dim - (x - self.mean) @ self.prior[1].to(x)
