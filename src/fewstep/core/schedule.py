r"""Noise schedules: x_t = alpha_t x_0 + sigma_t z with z ~ N(0, I).

Time runs from t = 1 (noise) to t = 0 (data). Only the ratio sigma_t / alpha_t matters for what a denoiser can see; it grows
strictly with t, so every schedule gives its exact inverse `time(ratio)`, differentiable for ratio > 0. Schedules are frozen
and hold no tensors that move: `t` decides dtype and device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fewstep.core.checks import check_not_negative, check_positive, check_rising


class Schedule(ABC):
    """The pair (alpha_t, sigma_t) as a function of t in [0, 1]."""

    @abstractmethod
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (alpha_t, sigma_t), each of the shape of `t`."""

    @abstractmethod
    def ratio(self, t: Tensor) -> Tensor:
        """Return sigma_t / alpha_t, the noise level relative to the signal."""

    @abstractmethod
    def time(self, ratio: Tensor) -> Tensor:
        """Return the t at which sigma_t / alpha_t = `ratio`; the exact inverse of `ratio`."""

    def log_snr(self, t: Tensor) -> Tensor:
        """Return log(alpha_t / sigma_t), which falls as t grows."""
        return -self.ratio(t).log()


def _preserving(ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Variance-preserving (alpha, sigma) with sigma / alpha = ratio and alpha^2 + sigma^2 = 1."""
    alpha = torch.rsqrt(1 + ratio.square())
    return alpha, ratio * alpha


@dataclass(frozen=True)
class VariancePreserving(Schedule):
    """Linear beta(t) between `beta_min` and `beta_max`, integrated exactly (Song et al. 2021, arXiv:2011.13456, eq. 33)."""

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        check_not_negative(self, "beta_min")
        check_positive(self, "beta_max")

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """See `Schedule`; alpha^2 + sigma^2 = 1."""
        b = self._integral(t)
        return torch.exp(-b / 2), torch.sqrt(-torch.expm1(-b))

    def ratio(self, t: Tensor) -> Tensor:
        """See `Schedule`."""
        return torch.sqrt(torch.expm1(self._integral(t)))

    def time(self, ratio: Tensor) -> Tensor:
        """See `Schedule`."""
        b, d = torch.log1p(ratio.square()), self.beta_max - self.beta_min
        # the root of d t^2 / 2 + beta_min t = b in the form that does not cancel for small b
        return 2 * b / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * d * b))

    def _integral(self, t: Tensor) -> Tensor:
        return self.beta_min * t + (self.beta_max - self.beta_min) / 2 * t.square()


@dataclass(frozen=True)
class Cosine(Schedule):
    """alpha = cos(theta), sigma = sin(theta) with theta linear in t (Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 17).

    theta ends at arctan(`ratio_max`) instead of pi/2, so that alpha_1 > 0 and the inverse stays exact.
    """

    ratio_max: float = 200.0

    def __post_init__(self) -> None:
        check_positive(self, "ratio_max")

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """See `Schedule`; alpha^2 + sigma^2 = 1."""
        theta = t * math.atan(self.ratio_max)
        return torch.cos(theta), torch.sin(theta)

    def ratio(self, t: Tensor) -> Tensor:
        """See `Schedule`."""
        return torch.tan(t * math.atan(self.ratio_max))

    def time(self, ratio: Tensor) -> Tensor:
        """See `Schedule`."""
        return torch.atan(ratio) / math.atan(self.ratio_max)


@dataclass(frozen=True)
class Brownian(Schedule):
    """alpha^2 = 1 - t: a Brownian motion that starts at 0 and is pinned to x_0, over its standard deviation at each time.

    With r = 1 - t the motion itself has alpha = r, sigma = sqrt(r (1 - r)), whose variance for x_0 ~ N(0, I) is r.
    """

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """See `Schedule`; alpha^2 + sigma^2 = 1, and alpha_1 = 0."""
        return (1 - t).sqrt(), t.sqrt()

    def ratio(self, t: Tensor) -> Tensor:
        """See `Schedule`; infinite at t = 1."""
        return (t / (1 - t)).sqrt()

    def time(self, ratio: Tensor) -> Tensor:
        """See `Schedule`."""
        return 1 / (1 + ratio.square().reciprocal())


@dataclass(frozen=True)
class VarianceExploding(Schedule):
    """alpha = 1, sigma geometric between `sigma_min` and `sigma_max` (Song et al. 2021, arXiv:2011.13456, eq. 31)."""

    sigma_min: float = 0.01
    sigma_max: float = 100.0

    def __post_init__(self) -> None:
        check_rising(self, "sigma_min", "sigma_max")
        check_positive(self, "sigma_max")

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """See `Schedule`."""
        return torch.ones_like(t), self.ratio(t)

    def ratio(self, t: Tensor) -> Tensor:
        """See `Schedule`."""
        return self.sigma_min * torch.exp(t * math.log(self.sigma_max / self.sigma_min))

    def time(self, ratio: Tensor) -> Tensor:
        """See `Schedule`."""
        return torch.log(ratio / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class EDM(Schedule):
    """alpha = 1, sigma^(1/rho) linear in t (Karras et al. 2022, arXiv:2206.00364, eq. 5, with time reversed)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        check_rising(self, "sigma_min", "sigma_max")
        check_positive(self, "sigma_max", "rho")

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """See `Schedule`."""
        return torch.ones_like(t), self.ratio(t)

    def ratio(self, t: Tensor) -> Tensor:
        """See `Schedule`."""
        low, high = self._ends()
        return (low + t * (high - low)) ** self.rho

    def time(self, ratio: Tensor) -> Tensor:
        """See `Schedule`."""
        low, high = self._ends()
        return (ratio ** (1 / self.rho) - low) / (high - low)

    def _ends(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)


@dataclass(frozen=True)
class Flow(Schedule):
    """alpha = 1 - u, sigma = u with u = `u_max` t (Lipman et al. 2023, arXiv:2210.02747, optimal-transport path).

    `u_max` < 1 keeps alpha_1 > 0, so that sigma / alpha is finite at t = 1.
    """

    u_max: float = 0.999

    def __post_init__(self) -> None:
        if not 0 < self.u_max < 1:
            raise ValueError(f"u_max must lie inside (0, 1), got {self.u_max}")

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """See `Schedule`."""
        u = self.u_max * t
        return 1 - u, u

    def ratio(self, t: Tensor) -> Tensor:
        """See `Schedule`."""
        u = self.u_max * t
        return u / (1 - u)

    def time(self, ratio: Tensor) -> Tensor:
        """See `Schedule`."""
        return ratio / (1 + ratio) / self.u_max


@dataclass(frozen=True)
class Tabulated(Schedule):
    """A discrete DDPM table abar_1 > ... > abar_T made continuous (Ho et al. 2020, arXiv:2006.11239).

    Step i (from 0, as networks count them) sits at t = (i + 1) / T; log(sigma/alpha) is linear in t in between, and
    sigma/alpha itself is linear from 0 at t = 0 to the first entry.
    """

    alphas_cumprod: tuple[float, ...] = field(repr=False)

    def __post_init__(self) -> None:
        a = torch.tensor(self.alphas_cumprod, dtype=torch.float64)
        if a.numel() < 2 or not bool(((a > 0) & (a < 1)).all()) or not bool((a[1:] < a[:-1]).all()):
            raise ValueError("alphas_cumprod must fall strictly and lie inside (0, 1)")

    @classmethod
    def linear(cls, beta_start: float = 1e-4, beta_end: float = 2e-2, steps: int = 1000) -> Tabulated:
        """Return DDPM's linear betas."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, steps, dtype=torch.float64))

    @classmethod
    def from_betas(cls, betas: Tensor) -> Tabulated:
        """Return the schedule of one-step variances `betas`, shape (T,)."""
        return cls(tuple(torch.cumprod(1 - betas.double(), 0).tolist()))

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """See `Schedule`; alpha^2 + sigma^2 = 1."""
        return _preserving(self.ratio(t))

    def ratio(self, t: Tensor) -> Tensor:
        """See `Schedule`."""
        table = self._log_ratios(t)
        u = t * len(table) - 1  # position in the table; below 0 lies the linear start
        i = u.detach().floor().clamp(0, len(table) - 2).long()
        inner = torch.exp(table[i] + (u.clamp_min(0) - i) * (table[i + 1] - table[i]))
        return torch.where(u < 0, t * len(table) * table[0].exp(), inner)

    def time(self, ratio: Tensor) -> Tensor:
        """See `Schedule`."""
        table = self._log_ratios(ratio)
        first = table[0].exp()
        log = ratio.clamp_min(first).log()
        i = (torch.searchsorted(table, log.detach().contiguous(), right=True) - 1).clamp(0, len(table) - 2)
        inner = i + 1 + (log - table[i]) / (table[i + 1] - table[i])
        return torch.where(ratio < first, ratio / first, inner) / len(table)

    def _log_ratios(self, like: Tensor) -> Tensor:
        a = torch.tensor(self.alphas_cumprod, dtype=torch.float64)
        return ((1 - a) / a).log().div(2).to(like)
