r"""What the Jacobian of a denoiser says: the dimension of the data around a point, and what of its score is no gradient.

With s(x) = (alpha D - x) / sigma^2 the score, -sigma^2 ds/dx = I - alpha dD/dx. Close to the data its singular values are 1 in
directions that leave the data and 0 in those along it. A score that is learned need not be a gradient: s = grad log p + r samples
p_t exactly if and only if div(p r) = 0, r being a gauge (Horvat and Pfister 2024, arXiv:2402.03845). Such an r leaves every sample's
law as it is and spoils what reads the Jacobian, the dimension and posterior covariances by Tweedie's formula among it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.batch import item_dot
from fewstep.core.denoiser import Denoiser
from fewstep.core.noise import Noise


class Dimension(NamedTuple):
    """The dimension of the data around each point, (N,), and the singular values it was counted from, (N, D), falling."""

    value: Tensor
    spectrum: Tensor


class Defect(NamedTuple):
    """How far the law that a score samples is from the data's, (M,) each: see `sampling_defect`."""

    value: Tensor
    error: Tensor

    @property
    def standard_errors(self) -> Tensor:
        """The defects in units of their standard errors, (M,)."""
        return self.value / self.error


def local_dimension(denoiser: Denoiser, x_t: Tensor, t: Tensor) -> Dimension:
    """Count the directions along the data: singular values of I - alpha dD/dx below one half.

    Reliable where noise is small against the data's extent and curvature, and only if the score is a gradient.

    Args:
        denoiser: the prior; D = prod(event) pullbacks are taken, of all points at once.
        x_t: points close to the data, (N, *event).
        t: a time of small noise, ().
    """
    alpha, _ = denoiser.schedule(torch.as_tensor(t, dtype=x_t.dtype, device=x_t.device))
    spectrum = torch.linalg.svdvals(torch.eye(x_t[0].numel()).to(x_t) - alpha * jacobian(denoiser, x_t, t))
    return Dimension((spectrum < 0.5).sum(1), spectrum)


def asymmetry(denoiser: Denoiser, x_t: Tensor, t: Tensor, noise: Noise, probes: int = 8) -> Tensor:
    """Return |J - J'| / |J| in Frobenius norms for J = dD/dx at each point, (N,): zero for a gradient, at most 2.

    Estimated by random probes, E|Jv - J'v|^2 = |J - J'|^2 for v ~ N(0, I), without forming J.

    Args:
        denoiser: the prior.
        x_t: points, (N, *event).
        t: () or (N,).
        noise: N streams for the probes.
        probes: products with J and with J' per point.
    """
    with torch.enable_grad():
        leaf = x_t.detach().requires_grad_()
        x0 = denoiser(leaf, t)
        dual = torch.zeros_like(x0, requires_grad=True)
        (back,) = torch.autograd.grad(x0, leaf, dual, create_graph=True)
        above, below = torch.zeros(2, len(x_t), dtype=x_t.dtype, device=x_t.device)
        for _ in range(probes):
            v = noise.randn_like(x_t)
            # J' u is linear in u, so its own pullback is the product with J
            (forth,) = torch.autograd.grad(back, dual, v, retain_graph=True)
            (pulled,) = torch.autograd.grad(x0, leaf, v, retain_graph=True)
            above, below = above + item_dot(forth - pulled, forth - pulled), below + item_dot(forth, forth)
    return (above / below).sqrt().detach()


@torch.no_grad()
def sampling_defect(denoiser: Denoiser, x0: Tensor, t: Tensor, noise: Noise, functions: int = 32) -> Defect:
    r"""Test whether a score samples p_t, from data alone and blind to gauges.

    For every f that does not grow too fast E[<grad f, s> + laplace f] = 0 under p_t if s = grad log p_t, by parts; with
    s = grad log p_t + r it is E<grad f, r>, which is zero for all f just if div(p_t r) = 0. Here f is a random cosine of the
    standardised coordinates, and the terms are means over the data.

    Args:
        denoiser: the prior.
        x0: data, (N, *event), independent of what the denoiser was trained on.
        t: (), sigma_t > 0.
        noise: N streams.
        functions: M, how many f; for M of them all right the largest of M |standard errors| is below 4 or so.
    """
    t = torch.as_tensor(t, dtype=x0.dtype, device=x0.device)
    alpha, sigma = denoiser.schedule(t)
    x_t = alpha * x0 + sigma * noise.randn_like(x0)
    score, x = denoiser.score(x_t, t).flatten(1), x_t.flatten(1)
    generator = torch.Generator().manual_seed(0)
    size = x.shape[1]
    w = torch.randn(functions, size, generator=generator, dtype=torch.float64).to(x) / (x.std() * math.sqrt(size))
    phase = (2 * math.pi * torch.rand(functions, generator=generator, dtype=torch.float64)).to(x)
    angle = (x - x.mean(0)) @ w.T + phase
    terms = -angle.sin() * (score @ w.T) - angle.cos() * w.square().sum(1)
    # f depends on the data through its centre and scale: of higher order in 1 / N
    return Defect(terms.mean(0), terms.std(0) / math.sqrt(len(x)))


def jacobian(denoiser: Denoiser, x_t: Tensor, t: Tensor) -> Tensor:
    """Return dD/dx at each point, (N, D, D) with D = prod(event), by D pullbacks."""
    with torch.enable_grad():
        leaf = x_t.detach().requires_grad_()
        x0 = denoiser(leaf, t).flatten(1)
        rows = [torch.autograd.grad(column.sum(), leaf, retain_graph=True)[0].flatten(1) for column in x0.unbind(1)]
    return torch.stack(rows, 1)
