r"""Likelihoods p(y | x) for B measurements with K samples each: item n = k B + b holds sample k of measurement b.

Samplers ask four things of a likelihood: its log-density, the gradient of it, its prox and an exact draw from the product
with an isotropic Gaussian. What a likelihood cannot give it does not list in `provides`, and samplers that need it refuse.
A likelihood works in the coordinates of the prior ([-1, 1] for images); `fewstep.image_likelihood` is the door from [0, 1].
"""

from __future__ import annotations

import copy
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from fewstep.core.batch import item_dot, like, real_rows, tile
from fewstep.core.checks import check_gradients
from fewstep.core.counts import Counts
from fewstep.core.linalg import Unconverged, cg
from fewstep.core.noise import Noise
from fewstep.core.physics import check_measurement, fitting_adjoint, repeat_physics
from fewstep.core.spectral import Function, circulant_of, inverse_square, significant, spectrum_of

Linear = Callable[[Tensor], Tensor]
_RCOND = 1e-3  # of pseudo-inverses


class Likelihood(ABC):
    """p(y | x); every method acts on each item alone.

    Attributes:
        provides: what it offers, of {"gradient", "prox", "draw", "svd", "gaussian"}.
        batch: the number of measurements B (times K after `expand`).
        event_shape, dtype, device: of one item x.
    """

    provides: frozenset[str]
    batch: int
    event_shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    counts: Counts

    def __repr__(self) -> str:
        return f"{type(self).__name__}(batch={self.batch}, event={tuple(self.event_shape)})"

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Return log p(y | x) up to a constant that does not depend on x, (N, *event) -> (N,)."""

    def score(self, x: Tensor) -> Tensor:
        """Return grad_x log p(y | x), (N, *event) -> (N, *event)."""
        check_gradients()
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(self.log_prob(leaf).sum(), leaf)[0]

    @abstractmethod
    def prox(self, z: Tensor, rho: Tensor | float) -> Tensor:
        """Return argmin_x -log p(y | x) + |x - z|^2 / (2 rho^2), (N, *event); `rho` is () or (N,)."""

    @abstractmethod
    def draw(self, z: Tensor, rho: Tensor | float, noise: Noise) -> Tensor:
        """Return a draw of p(y | x) N(x; z, rho^2 I), (N, *event); `rho` is () or (N,)."""

    @abstractmethod
    def start(self) -> Tensor:
        """Return a first guess of x from y alone, (N, *event), e.g. the pseudo-inverse."""

    @abstractmethod
    def expand(self, k: int) -> Self:
        """Return the likelihood of k samples of each measurement, with y and per-item parameters repeated."""

    def counted(self, counts: Counts) -> Self:
        """Return a copy that writes its operator calls into `counts`."""
        twin = copy.copy(self)
        twin.counts = counts
        return twin


class GaussianLikelihood(Likelihood):
    r"""y = A x + n with n ~ N(0, sigma^2 I) and any linear operator that has `A` and `A_adjoint`.

    Circular blurs, masks, anti-aliased down-sampling, orthogonal and decomposable operators are solved in closed form;
    the rest by conjugate gradients, each item to its own tolerance.

    Args:
        y: measurements in the coordinates of the operator's output, (B, *measurement).
        physics: a deepinv `LinearPhysics`, or any object with `A` and `A_adjoint`; its parameters may be per item.
        sigma: noise standard deviation in the units of y, a number or one per measurement, (B,); positive.
        tol: relative residual of conjugate gradients where there is no closed form.
        max_iter: the most iterations of it.

    Raises:
        TypeError: y is no tensor, sigma no number, or physics no operator.
        ValueError: y of whole numbers, empty or not finite, non-positive sigma, or a y that does not fit the operator.
    """

    def __init__(
        self, y: Tensor, physics: Any, sigma: Tensor | float, *, tol: float = 1e-6, max_iter: int = 300
    ) -> None:
        self.y, self.physics, self.tol, self.max_iter = y, physics, tol, max_iter
        check_measurement(y)
        self.sigma = noise_levels(sigma, y)
        self.batch, self.counts = y.shape[0], Counts()
        back = fitting_adjoint(physics, y)
        self.spectrum = spectrum_of(physics, back)
        self.event_shape, self.dtype, self.device = back.shape[1:], back.dtype, back.device
        self.circulant = circulant_of(physics, y) if self.spectrum is None else None
        closed = {"svd"} if self.spectrum is not None else set()
        self.provides = frozenset({"gradient", "prox", "draw", "gaussian"} | closed)

    def __repr__(self) -> str:
        low, high = (float(f"{float(end):.4g}") for end in self.sigma.aminmax())
        sigma = f"{low}" if low == high else f"{low} to {high}"
        return f"{type(self).__name__}(y={tuple(self.y.shape)}, physics={type(self.physics).__name__}, sigma={sigma})"

    def A(self, x: Tensor) -> Tensor:
        """Apply the operator, (N, *event) -> (N, *measurement)."""
        self.counts.operator += 1
        return self.physics.A(x)

    def A_adjoint(self, y: Tensor) -> Tensor:
        """Apply the adjoint, (N, *measurement) -> (N, *event)."""
        self.counts.operator += 1
        return self.physics.A_adjoint(y)

    def residual(self, x: Tensor) -> Tensor:
        """Return y - A x, (N, *measurement)."""
        return self.y - self.A(x)

    def log_prob(self, x: Tensor) -> Tensor:
        """See `Likelihood`; the normalising constant is included."""
        r = real_rows(self.residual(x))
        size = r[0].numel()
        return -0.5 * item_dot(r, r) / self.sigma**2 - size * (self.sigma.log() + 0.5 * math.log(2 * math.pi))

    def score(self, x: Tensor) -> Tensor:
        """See `Likelihood`; A'(y - A x) / sigma^2."""
        return self.A_adjoint(self.residual(x)) / like(self.sigma**2, x)

    def solve(self, v: Tensor, rho: Tensor | float) -> Tensor:
        """Return (A'A / sigma^2 + I / rho^2)^-1 v, (N, *event) -> (N, *event).

        Raises:
            FloatingPointError: the system holds NaN or infinite values, and there is no closed form to pass them on.
        """
        data = like(self.sigma**-2, v.real)
        prior = like(torch.as_tensor(rho, dtype=self.sigma.dtype, device=self.sigma.device) ** -2, v.real)
        if self.spectrum is not None:
            return self.spectral(lambda s: 1 / (s.square() * data + prior), v)
        return self._iterate(lambda x: data * self.normal(x) + prior * x, v)

    def back_project(self, r: Tensor, rho: Tensor | float) -> Tensor:
        """Return A' (rho^2 A A' + sigma^2 I)^-1 r, (N, *measurement) -> (N, *event).

        Through the closed form, see `Spectrum.pull_back`, or by conjugate gradients among measurements: what they leave is as an
        error of y, which small singular values do not magnify, as they would what is left of (rho^2 A'A + sigma^2 I) u = A' r.

        Raises:
            FloatingPointError: see `solve`.
        """
        prior = torch.as_tensor(rho, dtype=self.sigma.dtype, device=self.sigma.device) ** 2
        if self.spectrum is not None:
            noise, prior = (self._shaped(a) for a in (self.sigma**2, prior))
            self.counts.operator += 1
            return self.spectrum.pull_back(lambda s: 1 / (s.square() * prior + noise), r, self.A_adjoint)
        ridge = like((self.sigma**2 / prior).expand(len(r)), r.real)
        within = self._iterate(lambda v: self.A(self.A_adjoint(v)) + ridge * v, r, self._nearly(ridge))
        return self.A_adjoint(within) / self._shaped(prior)

    def spectral(self, f: Function, v: Tensor) -> Tensor:
        """Return f(sqrt(A'A)) v through the closed form; needs "svd"."""
        if self.spectrum is None:
            raise ValueError(f"{type(self.physics).__name__} has no known singular value decomposition")
        self.counts.operator += 1
        return self.spectrum.apply(f, v)

    def normal(self, x: Tensor) -> Tensor:
        """Return A'A x, (N, *event)."""
        return self.A_adjoint(self.A(x))

    def pinv(self, y: Tensor) -> Tensor:
        """Return the pseudo-inverse A^+ y, singular values below a thousandth of the largest counting as null."""
        back = self.A_adjoint(y)
        if self.spectrum is not None:
            return self.spectral(lambda s: inverse_square(s, significant(s, _RCOND)), back)
        return cg(self.normal, back, tol=max(_RCOND, self.tol), max_iter=self.max_iter).x

    def prox(self, z: Tensor, rho: Tensor | float) -> Tensor:
        """See `Likelihood`; exact."""
        return self._prox(self.y, z, rho)

    def draw(self, z: Tensor, rho: Tensor | float, noise: Noise) -> Tensor:
        """See `Likelihood`; exact by perturbing y and z with their own noise and solving (perturb and optimise)."""
        rho = torch.as_tensor(rho, dtype=self.sigma.dtype, device=self.sigma.device)
        sigma = like(self.sigma, self.y.real)
        y = self.y + sigma * noise.randn_like(self.y)
        return self._prox(y, z + like(rho, z.real) * noise.randn_like(z), rho)

    def start(self) -> Tensor:
        """See `Likelihood`; the pseudo-inverse of y."""
        return self.pinv(self.y)

    def expand(self, k: int) -> GaussianLikelihood:
        """See `Likelihood`."""
        if k == 1:
            return self
        twin = copy.copy(self)
        twin.y = tile(self.y, k)
        twin.sigma, twin.batch = self.sigma.repeat(k), self.batch * k
        twin.physics = repeat_physics(self.physics, self.y, k)
        twin.spectrum = self.spectrum.repeat(k) if self.spectrum is not None else None
        twin.circulant = self.circulant.repeat(k) if self.circulant is not None else None
        return twin

    def _prox(self, y: Tensor, z: Tensor, rho: Tensor | float) -> Tensor:
        # in the form z + correction: the correction is small where z already fits, and so is its rounding
        square = torch.as_tensor(rho, dtype=self.sigma.dtype, device=self.sigma.device) ** 2
        return z + self._shaped(square) * self.back_project(y - self.A(z), rho)

    def _nearly(self, ridge: Tensor) -> Linear | None:
        """Return what is nearly (AA' + ridge I)^-1, if anything is known."""
        near = self.circulant
        return None if near is None else lambda v: near.apply(lambda s: 1 / (s.square() + ridge), v)

    def _iterate(self, system: Linear, right: Tensor, near: Linear | None = None) -> Tensor:
        """Return the solution of a positive definite system, `near` its approximate inverse; see `solve` for what is raised."""
        result = cg(system, right, preconditioner=near, tol=self.tol, max_iter=self.max_iter)
        worst = float(result.residual.detach().max())
        if not math.isfinite(worst):
            raise FloatingPointError(
                f"{type(self.physics).__name__}, or what it was applied to, gives NaN or infinite values: "
                "check the operator, use more steps, weaker guidance or a larger sigma"
            )
        if worst > self.tol:
            warnings.warn(
                f"conjugate gradients stopped after {self.max_iter} iterations at a relative residual of {worst:.1e}"
                f" (asked: {self.tol:.1e}); raise max_iter or tol",
                Unconverged,
                stacklevel=3,
            )
        return result.x

    def _shaped(self, a: Tensor) -> Tensor:
        """Return constants, () or (N,), as they go with items, (N, 1, ..., 1)."""
        return a.reshape(-1, *[1] * len(self.event_shape)) if a.ndim else a


def noise_levels(sigma: Tensor | float, y: Tensor) -> Tensor:
    """Return one noise level per measurement, (B,), from a number or (B,).

    Raises:
        TypeError: it is no number.
        ValueError: it is not positive and finite, or of another shape.
    """
    try:
        levels = torch.as_tensor(sigma, dtype=y.real.dtype, device=y.device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"sigma must be a number or one per measurement, got {sigma!r}") from None
    if levels.shape not in ((), (1,), (y.shape[0],)):
        raise ValueError(f"sigma must be a number or one per measurement ({y.shape[0]}), got {tuple(levels.shape)}")
    if not bool((levels > 0).all()) or not bool(torch.isfinite(levels).all()):
        raise ValueError(f"sigma must be positive and finite, got {sigma}")
    return levels.expand(y.shape[0])


class JointLikelihood(Likelihood):
    r"""p(y, x_t | x) = p(y | x) N(x_t; alpha x, sigma^2 I): the extra Gaussian only moves z and rho of prox and draw.

    Args:
        likelihood: p(y | x).
        x_t: noisy items, (N, *event).
        alpha, sigma: () or (N,), with x_t = alpha x + sigma z.
    """

    def __init__(self, likelihood: Likelihood, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> None:
        self.likelihood, self.x_t = likelihood, x_t
        self.alpha, self.sigma = like(alpha, x_t), like(sigma, x_t)
        self.provides = likelihood.provides - {"svd", "gaussian"}
        self.batch, self.counts = likelihood.batch, likelihood.counts
        self.event_shape, self.dtype, self.device = likelihood.event_shape, likelihood.dtype, likelihood.device

    def log_prob(self, x: Tensor) -> Tensor:
        """See `Likelihood`."""
        r = self.x_t - self.alpha * x
        size = r[0].numel()
        sigma = self.sigma.flatten()
        gaussian = -0.5 * item_dot(r, r) / sigma**2 - size * (sigma.log() + 0.5 * math.log(2 * math.pi))
        return self.likelihood.log_prob(x) + gaussian

    def prox(self, z: Tensor, rho: Tensor | float) -> Tensor:
        """See `Likelihood`."""
        return self.likelihood.prox(*self._merge(z, rho))

    def draw(self, z: Tensor, rho: Tensor | float, noise: Noise) -> Tensor:
        """See `Likelihood`."""
        return self.likelihood.draw(*self._merge(z, rho), noise)

    def start(self) -> Tensor:
        """See `Likelihood`; the likelihood's own start drawn towards x_t / alpha by their precisions at unit scale."""
        ratio = self.sigma / self.alpha
        return (self.likelihood.start() * ratio**2 + self.x_t / self.alpha) / (1 + ratio**2)

    def expand(self, k: int) -> JointLikelihood:
        """See `Likelihood`."""
        alpha, sigma = (a if a.ndim == 0 or a.shape[0] == 1 else tile(a, k) for a in (self.alpha, self.sigma))
        return JointLikelihood(self.likelihood.expand(k), tile(self.x_t, k), alpha, sigma)

    def counted(self, counts: Counts) -> JointLikelihood:
        """See `Likelihood`."""
        return JointLikelihood(self.likelihood.counted(counts), self.x_t, self.alpha, self.sigma)

    def _merge(self, z: Tensor, rho: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, (N, *event) and (N,), of N(x; z, rho^2) N(x_t; alpha x, sigma^2)."""
        prior, data = like(rho, z) ** -2, (self.alpha / self.sigma) ** 2
        precision = (prior + data).expand(z.shape[0], *[1] * (z.ndim - 1))
        mean = (prior * z + self.alpha / self.sigma**2 * self.x_t) / precision
        return mean, precision.flatten() ** -0.5


class FlatLikelihood(Likelihood):
    """p(y | x) = 1: the problem without a measurement, whose posterior is the prior.

    Args:
        event_shape: shape of one item.
        batch: number of items.
        dtype, device: of one item.
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.event_shape, self.batch, self.counts = torch.Size(event_shape), batch, Counts()
        self.dtype, self.device = dtype, torch.device(device)
        self.provides = frozenset({"gradient", "prox", "draw"})

    def log_prob(self, x: Tensor) -> Tensor:
        """See `Likelihood`."""
        return 0 * x.flatten(1).sum(1)

    def prox(self, z: Tensor, rho: Tensor | float) -> Tensor:
        """See `Likelihood`."""
        return z

    def draw(self, z: Tensor, rho: Tensor | float, noise: Noise) -> Tensor:
        """See `Likelihood`."""
        return z + like(rho, z) * noise.randn_like(z)

    def start(self) -> Tensor:
        """See `Likelihood`; zero."""
        return torch.zeros(self.batch, *self.event_shape, dtype=self.dtype, device=self.device)

    def expand(self, k: int) -> FlatLikelihood:
        """See `Likelihood`."""
        return FlatLikelihood(self.event_shape, self.batch * k, self.dtype, self.device)
