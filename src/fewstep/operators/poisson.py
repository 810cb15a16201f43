r"""Photon noise: y = gain * Poisson((A u + background) / gain) + n with u the image and n ~ N(0, sigma^2).

The rate in photons is an affine map of the prior's x. Photon and read-out noise together follow the shifted Poisson model
(Snyder et al. 1995): y / gain + s is taken as Poisson with rate + s, s = (sigma / gain)^2, which has the right mean and
variance. Without read-out noise s = 0 and the model is exact.

-log p = r - n log r is convex but defined for positive rates r only. Below a floor of at most a hundredth of a photon it is
continued by its second-order expansion: every method may ask at every x. To this max(f - r, 0)^2 / (2 f) is added, f a hundredth,
which has its least sum with r at r = 0: pixels without photons are dark, not as far below black as a prox would let them go.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep.core.batch import item_dot, item_norm, like, tile
from fewstep.core.counts import Counts
from fewstep.core.likelihood import GaussianLikelihood, Likelihood
from fewstep.core.linalg import Unconverged, cg
from fewstep.core.noise import Noise
from fewstep.core.physics import check_measurement, fitting_adjoint, repeat_physics
from fewstep.core.spectral import DiagonalSpectrum, spectrum_of
from fewstep.operators.image import check_filter

_FLOOR = 1e-2  # photons


class PoissonLikelihood(Likelihood):
    r"""Poisson or Poisson-Gaussian noise behind a linear operator, in the prior's coordinates.

    The prox is computed pixel by pixel for identity and masks, by Newton's method kept inside a bracket; for other
    operators by Newton's method with a line search, each step solved by conjugate gradients. "draw" is not provided: the
    product with a Gaussian is not a known law. `sigma` of the likelihood, (B,), is the root mean square of all noise in units of
    x, which a learned sampler is told; it enters no formula here.

    Args:
        y: measurements, (B, *measurement), in the units of the image: gain times a count of photons.
        physics: a deepinv `LinearPhysics`, or any object with `A` and `A_adjoint`, that keeps nonnegative images nonnegative.
        gain: units of y per photon: 1 / (photons of a pixel of intensity 1); a number or one per measurement.
        sigma: standard deviation of the read-out noise in the units of y.
        background: added to A u, in the units of y, e.g. a dark current.
        unit: x in [-1, 1] stands for the image u = (x + 1) / 2; otherwise u = x.
        max_iter: the most Newton steps of the prox where it is not pixel by pixel; it stops near rounding.

    Raises:
        ValueError: y that is not finite, is negative without read-out noise, or does not fit the operator; gain not
            positive; sigma or background negative.
    """

    def __init__(
        self,
        y: Tensor,
        physics: Any,
        gain: Tensor | float,
        *,
        sigma: Tensor | float = 0.0,
        background: float = 0.0,
        unit: bool = True,
        max_iter: int = 100,
    ) -> None:
        check_measurement(y)
        gain, read_out = (torch.as_tensor(a, dtype=y.dtype, device=y.device) for a in (gain, sigma))
        _check(y, gain, read_out, background)
        self.y, self.physics, self.background = y, physics, background
        self.gain, read_out = gain.expand(y.shape[0]), read_out.expand(y.shape[0])
        self.scale = 0.5 if unit else 1.0
        brightness = y.clamp_min(0).flatten(1).mean(1) + self.gain  # a photon more than was seen: none is no certainty
        self.sigma = (self.gain * brightness + read_out**2).sqrt() / self.scale
        self.tol = torch.finfo(y.dtype).eps ** 0.7
        self.max_iter, self.batch, self.counts = max_iter, y.shape[0], Counts()
        back = fitting_adjoint(physics, y)
        check_filter(physics, back)
        self.event_shape, self.dtype, self.device = back.shape[1:], back.dtype, back.device
        self.provides = frozenset({"gradient", "prox"})
        shift = like((read_out / self.gain) ** 2, y)
        self.photons = (y / like(self.gain, y) + shift).clamp_min(0)
        constant = self.scale * physics.A(torch.ones_like(back)) * float(unit) + background
        self.offset = constant / like(self.gain, y) + shift
        spectrum = spectrum_of(physics, back)
        self.diagonal = spectrum.values if isinstance(spectrum, DiagonalSpectrum) and back.shape == y.shape else None

    def rate(self, x: Tensor) -> Tensor:
        """Return the expected photons (with the shift of read-out noise), (N, *event) -> (N, *measurement)."""
        self.counts.operator += 1
        return self.physics.A(x) * like(self.scale / self.gain, self.y) + self.offset

    def log_prob(self, x: Tensor) -> Tensor:
        """See `Likelihood`; the normalising constant is included where y is whole photons."""
        cost = _cost(self.rate(x), self.photons)
        return -(cost + torch.lgamma(self.photons + 1)).flatten(1).sum(1)

    def score(self, x: Tensor) -> Tensor:
        """See `Likelihood`."""
        return self._back(-_slope(self.rate(x), self.photons))

    def prox(self, z: Tensor, rho: Tensor | float) -> Tensor:
        """See `Likelihood`."""
        rho = like(rho, z)
        if self.diagonal is not None:
            return self._prox_pixels(z, rho)
        return self._prox_newton(z, rho)

    def draw(self, z: Tensor, rho: Tensor | float, noise: Noise) -> Tensor:
        """Not provided.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "no exact draw is known for Poisson noise; use a method that needs prox or gradient only"
        )

    def start(self) -> Tensor:
        """See `Likelihood`; the least-squares solution."""
        counts = (self.photons - self.offset) * like(self.gain / self.scale, self.y)
        return GaussianLikelihood(counts, self.physics, 1.0).start()

    def expand(self, k: int) -> PoissonLikelihood:
        """See `Likelihood`."""
        twin = copy.copy(self)
        twin.physics, twin.batch = repeat_physics(self.physics, self.y, k), self.batch * k
        twin.gain, twin.sigma = self.gain.repeat(k), self.sigma.repeat(k)
        for name in ("y", "photons", "offset"):
            setattr(twin, name, tile(getattr(self, name), k))
        if self.diagonal is not None and self.diagonal.shape[0] > 1:
            twin.diagonal = tile(self.diagonal, k)
        return twin

    def _back(self, r: Tensor) -> Tensor:
        """Return the transpose of the linear part of `rate`."""
        self.counts.operator += 1
        return self.physics.A_adjoint(r * like(self.scale / self.gain, r))

    def _prox_pixels(self, z: Tensor, rho: Tensor) -> Tensor:
        """Solve c g'(c x + d) + (x - z) / rho^2 = 0 in every pixel; the left side grows with x."""
        c = self.physics.A(torch.ones_like(z)) * like(self.scale / self.gain, z)  # the sign of the diagonal, not |a|
        variance = rho**2

        def slope(x: Tensor) -> tuple[Tensor, Tensor]:
            r = c * x + self.offset
            first = c * _slope(r, self.photons) + (x - z) / variance
            return first, c**2 * _curvature(r, self.photons) + 1 / variance

        return bracketed_newton(slope, z, z - variance * c * _slope(c * z + self.offset, self.photons))

    def _prox_newton(self, z: Tensor, rho: Tensor) -> Tensor:
        """Minimise by Newton's method; an item is done when its gradient is `tol` times that of one unit of either term."""
        variance, x = rho**2, z
        goal = self.tol * z[0].numel() ** 0.5 * (1 / rho.flatten() + self.scale / self.gain)
        for _ in range(self.max_iter):
            gradient = (x - z) / variance - self.score(x)
            active = item_norm(gradient) > goal
            if not bool(active.any()):
                return x
            weight = _curvature(self.rate(x), self.photons)
            hessian = self._hessian(weight, variance)
            step = cg(hessian, gradient, tol=1e-3 * self.tol**0.25, max_iter=500).x  # inexact: the next step repairs it
            length = self._line_search(x, step, z, variance, item_dot(gradient, step))
            x = x - like(torch.where(active, length, 0.0), x) * step
        worst = float((item_norm((x - z) / variance - self.score(x)) / goal).max())
        if worst > 1:
            warnings.warn(
                f"Newton's method stopped after {self.max_iter} steps at {worst:.1e} times its tolerance",
                Unconverged,
                stacklevel=3,
            )
        return x

    def _hessian(self, weight: Tensor, variance: Tensor) -> Callable[[Tensor], Tensor]:
        def product(v: Tensor) -> Tensor:
            seen = self.rate(v) - self.offset
            return self._back(weight * seen) + v / variance

        return product

    def _line_search(self, x: Tensor, step: Tensor, z: Tensor, variance: Tensor, decrease: Tensor) -> Tensor:
        """Return for each item the first of 1, 1/2, 1/4, ... that lowers the objective enough (Armijo), (N,)."""

        def value(at: Tensor) -> Tensor:
            return _cost(self.rate(at), self.photons).flatten(1).sum(1) + item_dot(at - z, (at - z) / variance) / 2

        now, length = value(x), torch.ones_like(decrease)
        slack = 8 * torch.finfo(x.dtype).eps * now.abs()  # near the minimum a decrease is lost in rounding
        for _ in range(40):
            poor = value(x - like(length, x) * step) > now - 1e-4 * length * decrease + slack
            if not bool(poor.any()):
                break
            length = torch.where(poor, length / 2, length)
        return length


def bracketed_newton(slope: Callable[[Tensor], tuple[Tensor, Tensor]], a: Tensor, b: Tensor) -> Tensor:
    """Return the root of an increasing function in every element, to rounding.

    Newton's step is taken where it stays inside the bracket, bisection otherwise. Each element stops by itself. For the concave
    slopes of this module Newton's method cannot stall: every step lands below the root, and from there it climbs.

    Args:
        slope: x -> (value, derivative), elementwise.
        a, b: two points with the root between them, in either order.
    """
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    x, done = a, torch.zeros_like(a, dtype=torch.bool)
    small = 4 * torch.finfo(a.dtype).eps
    for _ in range(100):
        value, derivative = slope(x)
        low, high = torch.where(value <= 0, x, low), torch.where(value >= 0, x, high)
        newton = x - value / derivative
        new = torch.where((newton >= low) & (newton <= high), newton, (low + high) / 2)
        step = (new - x).abs()
        x = torch.where(done, x, new)
        done = done | (step <= small * (1 + new.abs()))
        if bool(done.all()):
            break
    return x


def _floor(photons: Tensor) -> Tensor:
    return _FLOOR * photons.clamp(1e-6, 1)


def _cost(rate: Tensor, photons: Tensor) -> Tensor:
    """Return r - n log r, continued to second order below the floor, and what keeps rates from being negative."""
    floor = _floor(photons)
    below = (rate - floor).clamp_max(0) / floor
    dark = (_FLOOR - rate).clamp_min(0) ** 2 / (2 * _FLOOR)
    return rate - photons * (rate.clamp_min(floor).log() + below - below**2 / 2) + dark


def _slope(rate: Tensor, photons: Tensor) -> Tensor:
    floor = _floor(photons)
    below = (rate - floor).clamp_max(0) / floor
    dark = (_FLOOR - rate).clamp_min(0) / _FLOOR
    return 1 - photons * torch.where(rate > floor, 1 / rate.clamp_min(floor), (1 - below) / floor) - dark


def _curvature(rate: Tensor, photons: Tensor) -> Tensor:
    return photons / rate.clamp_min(_floor(photons)) ** 2 + (rate < _FLOOR) / _FLOOR


def _check(y: Tensor, gain: Tensor, sigma: Tensor, background: float) -> None:
    for name, value in (("gain", gain), ("sigma", sigma)):
        if value.shape not in ((), (1,), (y.shape[0],)):
            raise ValueError(f"{name} must be a number or one per measurement ({y.shape[0]}), got {tuple(value.shape)}")
    if not bool(((gain > 0) & torch.isfinite(gain)).all()):
        raise ValueError(f"gain must be positive and finite, got {gain.tolist()}")
    if not bool(((sigma >= 0) & torch.isfinite(sigma)).all()) or not background >= 0:
        raise ValueError(f"sigma and background must not be negative, got {sigma.tolist()} and {background}")
    if bool(((y < 0) & (like(sigma, y) == 0)).any()):
        raise ValueError(
            "counts of photons cannot be negative; state the read-out noise sigma, or subtract no background"
        )
