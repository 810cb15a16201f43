r"""Closed forms: functions of A'A for the operators whose singular vectors are known.

Everything a sampler asks of a linear operator (prox, exact draw, pseudo-inverse, DDRM's and DDNM+'s rules) is f(A'A) v for
some scalar function of the singular values, f(0) acting on the null space. A `Spectrum` offers just that,

    apply(f, v) = V f(s) V' v + f(0) (v - V V' v),

so a new operator with known singular vectors needs one small class. `f` takes singular values that broadcast against
(N, *event-like) and must be elementwise; per-item constants in it must be shaped (N, 1, ..., 1).
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.core.batch import tile

Function = Callable[[Tensor], Tensor]
Adjoint = Callable[[Tensor], Tensor]


class Spectrum(ABC):
    """The singular values and right singular vectors of a linear operator, seen through functions of A'A."""

    @abstractmethod
    def apply(self, f: Function, v: Tensor) -> Tensor:
        """Return f(sqrt(A'A)) v, (N, *event) -> (N, *event); the null space is multiplied by f(0)."""

    def pull_back(self, f: Function, r: Tensor, adjoint: Adjoint) -> Tensor:
        """Return A' f(sqrt(AA')) r, (N, *measurement) -> (N, *event), as f(sqrt(A'A)) A'r; `adjoint` is A'.

        It has no part in the null space, where f may be huge: what rounding leaves there is dropped. A spectrum that knows the
        left singular vectors too applies A' last, so that small singular values do not magnify the rounding of A'r either.
        """
        return self.apply(lambda s: torch.where(s > 0, f(s), 0.0), adjoint(r))

    @abstractmethod
    def repeat(self, k: int) -> Spectrum:
        """Return the spectrum for k copies of the batch, item (k, b) being measurement b."""


def significant(s: Tensor, rcond: float | None = None) -> Tensor:
    """Return which singular values, (1 or N, ...), exceed `rcond` times the largest of their own item.

    The default, the square root of the rounding unit, is where A'(y - A x) / s^2 is still meaningful.
    """
    rcond = torch.finfo(s.dtype).eps ** 0.5 if rcond is None else rcond
    return s > rcond * s.amax(tuple(range(1, s.ndim)), keepdim=True)


def inverse_square(s: Tensor, keep: Tensor) -> Tensor:
    """Return 1 / s^2 where `keep` is true and 0 elsewhere: what turns A'r into A^+ r."""
    return torch.where(keep, s.clamp_min(torch.finfo(s.dtype).tiny ** 0.25) ** -2, 0.0)


def _repeat(a: Tensor, k: int) -> Tensor:
    return a if a.shape[0] == 1 else tile(a, k)


@dataclass(frozen=True)
class FourierSpectrum(Spectrum):
    """Circular convolution: `transfer` is the half-plane transfer function, (1 or N, C, H, W // 2 + 1), complex."""

    transfer: Tensor

    def apply(self, f: Function, v: Tensor) -> Tensor:
        """See `Spectrum`."""
        return torch.fft.irfft2(f(self.transfer.abs()) * torch.fft.rfft2(v), s=v.shape[-2:])

    def pull_back(self, f: Function, r: Tensor, adjoint: Adjoint) -> Tensor:
        """See `Spectrum`."""
        moved = self.transfer.conj() * f(self.transfer.abs()) * torch.fft.rfft2(r)
        return torch.fft.irfft2(moved, s=r.shape[-2:])

    def repeat(self, k: int) -> FourierSpectrum:
        """See `Spectrum`."""
        return FourierSpectrum(_repeat(self.transfer, k))


@dataclass(frozen=True)
class DecimatedSpectrum(Spectrum):
    """Circular convolution, then every `factor`-th pixel: A'A mixes the factor^2 frequencies that alias onto one.

    Each such block is rank one, h h^* / factor^2, so its singular value is |h| / factor and its vector conj(h) / |h|
    (fast super-resolution, Zhao et al. 2016, arXiv:1510.00143).

    Args:
        transfer: transfer function of the filter, (1 or N, C, H, W), complex.
        factor: decimation in both directions; divides H and W.
    """

    transfer: Tensor
    factor: int

    def apply(self, f: Function, v: Tensor) -> Tensor:
        """See `Spectrum`."""
        h, x = self._blocks(self.transfer), self._blocks(torch.fft.fft2(v))
        size = self._size(h)
        unit = h.conj() / size.clamp_min(torch.finfo(size.dtype).tiny)
        along = (unit.conj() * x).sum((-4, -2), keepdim=True)
        s = self._values(size)
        null = f(torch.zeros_like(s))
        grow = self._grow
        out = grow(null) * x + grow(f(s) - null) * along * unit
        return torch.fft.ifft2(out.reshape(v.shape)).real.to(v.dtype)

    def pull_back(self, f: Function, r: Tensor, adjoint: Adjoint) -> Tensor:
        """See `Spectrum`; zeros between the pixels of r repeat its spectrum."""
        h = self._blocks(self.transfer)
        out = h.conj() * self._grow(f(self._values(self._size(h))) * torch.fft.fft2(r))
        h_w = (self.factor * n for n in r.shape[-2:])
        return torch.fft.ifft2(out.reshape(*out.shape[:2], *h_w)).real.to(r.dtype)

    def repeat(self, k: int) -> Spectrum:
        """See `Spectrum`."""
        return DecimatedSpectrum(_repeat(self.transfer, k), self.factor)

    def _blocks(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.reshape(n, c, self.factor, h // self.factor, self.factor, w // self.factor)

    @staticmethod
    def _size(h: Tensor) -> Tensor:
        """Return the norm of the aliases of each frequency, (., C, 1, H/f, 1, W/f)."""
        return torch.linalg.vector_norm(h, dim=(-4, -2), keepdim=True)

    def _values(self, size: Tensor) -> Tensor:
        """Return the singular values, (., C, H/f, W/f), so that per-item constants of functions, (N, 1, 1, 1), fit."""
        return (size / self.factor).squeeze(-2).squeeze(-3)

    @staticmethod
    def _grow(s: Tensor) -> Tensor:
        return s.unsqueeze(-2).unsqueeze(-4)


@dataclass(frozen=True)
class DiagonalSpectrum(Spectrum):
    """A diagonal operator in pixel space (masks, denoising): `values` are |a_i|, (1 or N, *event)."""

    values: Tensor

    def apply(self, f: Function, v: Tensor) -> Tensor:
        """See `Spectrum`."""
        return f(self.values) * v

    def repeat(self, k: int) -> Spectrum:
        """See `Spectrum`."""
        return DiagonalSpectrum(_repeat(self.values, k))


@dataclass(frozen=True)
class OrthogonalSpectrum(Spectrum):
    """Known right singular vectors: `analyse` is V', `synthesise` is V (V' V = I), `values` the singular values."""

    values: Tensor
    analyse: Callable[[Tensor], Tensor]
    synthesise: Callable[[Tensor], Tensor]

    def apply(self, f: Function, v: Tensor) -> Tensor:
        """See `Spectrum`."""
        coefficients = self.analyse(v)
        # per-item constants in f have the dimensions of v, which those of the coefficients need not have
        s = self.values.reshape(self.values.shape[0], *[1] * (v.ndim - 2), -1)
        null = f(torch.zeros_like(s[:1, ..., :1]))
        gain = f(s) - null
        return null * v + self.synthesise(gain.reshape(gain.shape[0], *coefficients.shape[1:]) * coefficients).to(
            v.dtype
        )

    def repeat(self, k: int) -> Spectrum:
        """See `Spectrum`."""
        return OrthogonalSpectrum(_repeat(self.values, k), self.analyse, self.synthesise)


def spectrum_of(physics: Any, x: Tensor) -> Spectrum | None:
    """Return the closed form of a linear operator acting on tensors like `x`, (N, *event), or None if none is known.

    An operator may say it itself through a method `spectrum(x)`; of deepinv's, circular blurs, anti-aliased
    down-sampling with circular padding, and decomposable ones are recognised. A recognised form is used only if it agrees
    with the operator on a random vector: a subclass, a padding or a version that does something else is left to iteration.
    """
    if hasattr(physics, "spectrum"):
        return physics.spectrum(x)
    deepinv = sys.modules.get("deepinv")
    if deepinv is None:
        return None
    library = deepinv.physics
    for kind, build in (
        (library.Downsampling, _downsampling),
        (library.BlurFFT, _circular),
        (library.Blur, _circular),
        (library.Inpainting, _mask),
        (library.Denoising, _identity),
        (library.DecomposablePhysics, _decomposable),
    ):
        if isinstance(physics, kind):
            spectrum = build(physics, x)
            return spectrum if spectrum is not None and _agrees(spectrum, physics, x) else None
    return None


def circulant_of(physics: Any, y: Tensor) -> FourierSpectrum | None:
    """Return the circulant operator that is nearest to AA' on tensors like y, (N, *measurement), or None if none is known.

    An operator may say it itself through a method `circulant(y)`. Blurs that are not circular, of a scene that goes on beyond its
    frame or is mirrored there, are nearly so: AA' is, away from the border, a convolution, and its mean along each diagonal
    serves to precondition (T. Chan 1988, optimal circulants).
    """
    if hasattr(physics, "circulant"):
        return physics.circulant(y)
    deepinv = sys.modules.get("deepinv")
    if deepinv is None or not isinstance(physics, deepinv.physics.Blur) or y.ndim != 4:
        return None
    h, w = y.shape[-2:]
    centre = _impulse(y, _filters(physics)).roll((h // 2, w // 2), (-2, -1))
    response = physics.A(physics.A_adjoint(centre)).roll((-(h // 2), -(w // 2)), (-2, -1))
    for size, axis in ((h, -2), (w, -1)):
        lag = torch.arange(size, dtype=y.dtype, device=y.device)
        share = 1 - torch.minimum(lag, size - lag) / size  # of the pixels that have a neighbour so far away
        response = response * (share[:, None] if axis == -2 else share)
    return FourierSpectrum(torch.fft.rfft2(response).real.clamp_min(0).sqrt() + 0j)


def _agrees(spectrum: Spectrum, physics: Any, x: Tensor) -> bool:
    """Return whether the closed form gives A'A v and (A'A)^2 v; the second also tests that V' V = I."""
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype, device="cpu").to(x.device)
    once = physics.A_adjoint(physics.A(v))
    twice = physics.A_adjoint(physics.A(once))
    tol = 1e3 * torch.finfo(x.dtype).eps
    pairs = ((once, spectrum.apply(torch.square, v)), (twice, spectrum.apply(lambda s: s**4, v)))
    return all(bool(((a - b).abs().amax() <= tol * a.abs().amax()).item()) for a, b in pairs)


def _impulse(x: Tensor, n: int = 1) -> Tensor:
    out = torch.zeros(n, *x.shape[1:], dtype=x.dtype, device=x.device)
    out[..., 0, 0] = 1
    return out


def _filters(physics: Any) -> int:
    """Return how many items the filter of an operator speaks of, 1 where it is shared."""
    return 1 if getattr(physics, "filter", None) is None else physics.filter.shape[0]


def _circular(physics: Any, x: Tensor) -> Spectrum | None:
    if x.ndim != 4 or getattr(physics, "padding", "circular") != "circular":
        return None
    return FourierSpectrum(torch.fft.rfft2(physics.A(_impulse(x, _filters(physics)))))


def _downsampling(physics: Any, x: Tensor) -> Spectrum | None:
    own = type(physics).A is sys.modules["deepinv"].physics.Downsampling.A  # Upsampling is a subclass
    circular = physics.filter is None or physics.padding == "circular"
    if not own or not circular or x.shape[-1] % physics.factor or x.shape[-2] % physics.factor:
        return None
    low = physics.A(torch.zeros_like(x))
    back = physics.A_adjoint(_impulse(low, _filters(physics)))
    return DecimatedSpectrum(torch.fft.fft2(back).conj(), physics.factor)


def _mask(physics: Any, x: Tensor) -> Spectrum:
    values = physics.mask.abs()
    return DiagonalSpectrum(values.expand(values.shape[0], *x.shape[1:]).to(x.dtype))


def _identity(physics: Any, x: Tensor) -> Spectrum:
    return DiagonalSpectrum(torch.ones_like(x[:1]))


def _decomposable(physics: Any, x: Tensor) -> Spectrum:
    values = torch.as_tensor(physics.mask).abs()
    coefficients = physics.V_adjoint(x)
    items = values.shape[0] if values.ndim == coefficients.ndim else 1
    return OrthogonalSpectrum(values.expand(items, *coefficients.shape[1:]), physics.V_adjoint, physics.V)
