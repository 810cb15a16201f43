r"""Grey photographs under a colour prior: a grey image is the luma g = w . x of a colour image x.

The posterior of g is then that of x seen through w, and nothing is invented about colour. With e = w / |w|, the part of x
across e is untouched by the likelihood, and the part along it meets the grey likelihood at the scale |w|:

    prox_rho(z) = z + (w / |w|^2) (prox^grey_{rho |w|}(w . z) - w . z).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.core.batch import like
from fewstep.core.counts import Counts
from fewstep.core.likelihood import GaussianLikelihood, Likelihood
from fewstep.core.noise import Noise
from fewstep.core.spectral import Adjoint, FourierSpectrum, Function, Spectrum

WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R BT.601, those of JPEG and of Pillow's "L"


def luma(x: Tensor) -> Tensor:
    """Return the grey image of colour images, (..., 3, H, W) -> (..., 1, H, W)."""
    return (x * _weights(x)).sum(-3, keepdim=True)


def spread(g: Tensor) -> Tensor:
    """Return w g, the adjoint of `luma`, (..., 1, H, W) -> (..., 3, H, W)."""
    return g * _weights(g)


def in_colour(likelihood: Likelihood) -> Likelihood:
    """Return the likelihood of colour images (N, 3, H, W) whose luma has the given likelihood on (N, 1, H, W)."""
    if isinstance(likelihood, GaussianLikelihood):
        physics = LumaOperator(likelihood.physics, likelihood.spectrum, likelihood.circulant)
        y, sigma = likelihood.y, likelihood.sigma
        return GaussianLikelihood(y, physics, sigma, tol=likelihood.tol, max_iter=likelihood.max_iter)
    return GreyLikelihood(likelihood)


class LumaOperator(torch.nn.Module):
    """A grey operator after `luma`, with the closed form of the grey one, or what is near to it, where that is known."""

    def __init__(self, physics: Any, spectrum: Spectrum | None, circulant: FourierSpectrum | None = None) -> None:
        super().__init__()
        self.physics, self._grey, self._near = physics, spectrum, circulant

    def A(self, x: Tensor) -> Tensor:
        """Return A luma(x), (N, 3, H, W) -> (N, *measurement)."""
        return self.physics.A(luma(x))

    def A_adjoint(self, y: Tensor) -> Tensor:
        """Return the adjoint, (N, *measurement) -> (N, 3, H, W)."""
        return spread(self.physics.A_adjoint(y))

    def spectrum(self, x: Tensor) -> Spectrum | None:
        """Return the closed form; `x` is not read."""
        return None if self._grey is None else LumaSpectrum(self._grey)

    def circulant(self, y: Tensor) -> FourierSpectrum | None:
        """Return what is near to AA', which is |w|^2 times the grey one; `y` is not read."""
        return None if self._near is None else FourierSpectrum(_size() * self._near.transfer)


@dataclass(frozen=True)
class LumaSpectrum(Spectrum):
    """The spectrum of a grey operator after `luma`: its singular values times |w|, its vectors times e, and a null space."""

    grey: Spectrum

    def apply(self, f: Function, v: Tensor) -> Tensor:
        """See `Spectrum`."""
        size = _size()
        along = luma(v) / size
        null = f(torch.zeros(1, 1, 1, 1, dtype=v.dtype, device=v.device))
        moved = self.grey.apply(lambda s: f(size * s), along)
        return null * v + spread(moved - null * along) / size

    def pull_back(self, f: Function, r: Tensor, adjoint: Adjoint) -> Tensor:
        """See `Spectrum`."""
        size = _size()
        return spread(self.grey.pull_back(lambda s: f(size * s), r, lambda y: luma(adjoint(y)) / size**2))

    def repeat(self, k: int) -> Spectrum:
        """See `Spectrum`."""
        return LumaSpectrum(self.grey.repeat(k))


class GreyLikelihood(Likelihood):
    """The likelihood of colour images that depends on their luma alone; it offers what the grey one does, linear parts apart.

    Args:
        grey: the likelihood of the luma, on (N, 1, H, W).
    """

    def __init__(self, grey: Likelihood) -> None:
        if grey.event_shape[0] != 1:
            raise ValueError(f"expected a likelihood of one channel, got {tuple(grey.event_shape)}")
        self.grey, self.batch, self.dtype, self.device = grey, grey.batch, grey.dtype, grey.device
        self.event_shape = torch.Size((3, *grey.event_shape[1:]))
        self.provides = grey.provides & {"gradient", "prox", "draw"}
        self.counts = grey.counts

    def log_prob(self, x: Tensor) -> Tensor:
        """See `Likelihood`."""
        return self.grey.log_prob(luma(x))

    def prox(self, z: Tensor, rho: Tensor | float) -> Tensor:
        """See `Likelihood`."""
        g = luma(z)
        return z + spread(self.grey.prox(g, rho * _size()) - g) / _size() ** 2

    def draw(self, z: Tensor, rho: Tensor | float, noise: Noise) -> Tensor:
        """See `Likelihood`."""
        free = z + like(rho, z) * noise.randn_like(z)
        return free + spread(self.grey.draw(luma(z), rho * _size(), noise) - luma(free)) / _size() ** 2

    def start(self) -> Tensor:
        """See `Likelihood`; three equal channels."""
        return self.grey.start().expand(-1, 3, -1, -1).contiguous()

    def expand(self, k: int) -> GreyLikelihood:
        """See `Likelihood`."""
        return GreyLikelihood(self.grey.expand(k))

    def counted(self, counts: Counts) -> GreyLikelihood:
        """See `Likelihood`."""
        return GreyLikelihood(self.grey.counted(counts))


def _weights(x: Tensor) -> Tensor:
    return torch.tensor(WEIGHTS, dtype=x.dtype, device=x.device).reshape(3, 1, 1)


def _size() -> float:
    return sum(w * w for w in WEIGHTS) ** 0.5
