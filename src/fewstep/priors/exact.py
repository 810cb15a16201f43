r"""Exact priors: Gaussian and Gaussian mixture, with everything known in closed form. They are the oracle of every test.

Component i has weight w_i, mean m_i and covariance C_i = Q_i diag(l_i) Q_i'. At time t it is N(alpha m_i, alpha^2 C_i +
sigma^2 I), so with u_i = Q_i'(x_t - alpha m_i) and v_i = alpha^2 l_i + sigma^2

    r_i ∝ w_i N(x_t; alpha m_i, .),  d_i = m_i + Q_i (alpha l_i / v_i) u_i,  D = sum_i r_i d_i.

Covariances may be singular. Events of any shape are flattened inside.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewstep.core.batch import like, real_rows
from fewstep.core.denoiser import Denoiser
from fewstep.core.likelihood import FlatLikelihood, GaussianLikelihood, JointLikelihood, Likelihood
from fewstep.core.noise import Noise, mix
from fewstep.core.schedule import Schedule, VariancePreserving


class MixturePrior(Denoiser):
    """sum_i w_i N(m_i, C_i).

    Args:
        weights: (M,), positive; normalised.
        means: (M, *event).
        covs: (M, D, D), or (M,) for isotropic, or (M, D) for diagonal ones; positive semi-definite.
        schedule: the noise schedule.

    Raises:
        ValueError: shapes that do not fit, weights that are not positive, covariances that are not semi-definite.
    """

    weights: Tensor
    means: Tensor
    covs: Tensor
    values: Tensor
    vectors: Tensor
    event_shape: tuple[int, ...]

    def __init__(self, weights: Tensor, means: Tensor, covs: Tensor, schedule: Schedule | None = None) -> None:
        super().__init__()
        self.schedule, self.event_shape = schedule or VariancePreserving(), tuple(means.shape[1:])
        count, size = means.shape[0], math.prod(self.event_shape)
        if weights.shape != (count,) or not bool((weights > 0).all()):
            raise ValueError(f"need {count} positive weights, got {tuple(weights.shape)}")
        full = _full(covs, count, size)
        values, vectors = torch.linalg.eigh(full)
        floor = -1e-5 * values.abs().amax(-1, keepdim=True)
        if not bool(torch.isfinite(full).all()) or not bool((values >= floor).all()):
            raise ValueError("covariances must be finite and positive semi-definite")
        self.register_buffer("weights", weights / weights.sum())
        self.register_buffer("means", means.flatten(1))
        self.register_buffer("covs", full)
        self.register_buffer("values", values.clamp_min(0))
        self.register_buffer("vectors", vectors)

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """Return E[x_0 | x_t], (N, *event); `t` is () or (N,)."""
        responsibilities, conditional = self._conditionals(x_t, t)
        return (responsibilities[..., None] * conditional).sum(1).reshape(x_t.shape)

    def log_prob(self, x_t: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """Return log p_t(x_t), (N,)."""
        return torch.logsumexp(self._log_joint(x_t, t), 1)

    def covariance_action(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """Return Cov[x_0 | x_t] v, (N, *event)."""
        responsibilities, conditional = self._conditionals(x_t, t)
        alpha, sigma = self._coefficients(x_t, t)
        shrink = self.values * sigma**2 / (alpha**2 * self.values + sigma**2)  # (N, M, D)
        flat = v.flatten(1)
        modes = torch.einsum("mji,nj->nmi", self.vectors, flat)
        inner = torch.einsum("mij,nmj->nmi", self.vectors, shrink * modes)
        centred = conditional - (responsibilities[..., None] * conditional).sum(1, keepdim=True)
        spread = centred * torch.einsum("nmi,ni->nm", centred, flat)[..., None]
        return (responsibilities[..., None] * (inner + spread)).sum(1).reshape(v.shape)

    def flow(self, x_t: Tensor, t: Tensor, s: Tensor, steps: int = 400) -> Tensor:
        """Return the probability-flow map from time t to s < t, (N, *event); `t` and `s` are ().

        In one dimension by the quantile map, otherwise by Runge-Kutta of order 4 in the logarithm of the noise ratio.
        """
        if self.means.shape[1] == 1:
            return self._quantile_map(x_t, t, s)
        return integrate_flow(self, x_t, t, s, steps)

    def sample(self, n: int, noise: Noise | None = None, seed: int = 0) -> Tensor:
        """Return n exact draws, (n, *event)."""
        noise = noise or Noise([mix(seed, i) for i in range(n)], self.means.dtype, self.means.device)
        component = torch.searchsorted(self.weights.cumsum(0), noise.rand(1)[:, 0]).clamp_max(len(self.weights) - 1)
        z = self.values[component].sqrt() * noise.randn(self.means.shape[1])
        x = self.means[component] + torch.einsum("nij,nj->ni", self.vectors[component], z)
        return x.reshape(n, *self.event_shape)

    def posterior(self, likelihood: Likelihood) -> ExactPosterior:
        """Return the exact posterior for a linear-Gaussian likelihood, or for its joint with x_t."""
        precision, shift, constant = gaussian_terms(likelihood)
        eye = torch.eye(self.means.shape[1], dtype=precision.dtype, device=precision.device)
        system = eye + torch.einsum("mij,bjk->bmik", self.covs, precision)
        covs = torch.linalg.solve(system, self.covs.expand_as(system))
        innovation = shift[:, None] - torch.einsum("bij,mj->bmi", precision, self.means)
        step = torch.einsum("bmij,bmj->bmi", covs, innovation)
        at_mean = torch.einsum("bi,mi->bm", shift, self.means) - 0.5 * torch.einsum(
            "mi,bij,mj->bm", self.means, precision, self.means
        )
        log = at_mean + 0.5 * (innovation * step).sum(-1) - 0.5 * torch.linalg.slogdet(system)[1]
        log = log + self.weights.log() + constant[:, None]
        return ExactPosterior(log, self.means + step, (covs + covs.mT) / 2, self.event_shape)

    def _coefficients(self, x_t: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        t = torch.as_tensor(t, dtype=x_t.dtype, device=x_t.device)
        alpha, sigma = self.schedule(t)
        return alpha.reshape(-1, 1, 1), sigma.reshape(-1, 1, 1)

    def _modes(self, x_t: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Return u, (N, M, D), the variances v of the noisy components, and alpha."""
        alpha, sigma = self._coefficients(x_t, t)
        centred = x_t.flatten(1)[:, None] - alpha * self.means
        u = torch.einsum("mji,nmj->nmi", self.vectors, centred)
        v = (alpha**2 * self.values + sigma**2).clamp_min(torch.finfo(x_t.dtype).tiny)
        return u, v, alpha

    def _log_joint(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        u, v, _ = self._modes(x_t, t)
        return self._log_at(u, v)

    def _log_at(self, u: Tensor, v: Tensor) -> Tensor:
        log = -0.5 * (u.square() / v + v.log()).sum(-1) - u.shape[-1] / 2 * math.log(2 * math.pi)
        return log + self.weights.log()

    def _conditionals(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return p(component | x_t), (N, M), and E[x_0 | x_t, component], (N, M, D)."""
        u, v, alpha = self._modes(x_t, t)
        conditional = self.means + torch.einsum("mij,nmj->nmi", self.vectors, alpha * self.values / v * u)
        return self._log_at(u, v).softmax(1), conditional

    def _quantile_map(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        level = self._log_odds(x_t, t)
        alpha, sigma = self._coefficients(x_t, s)
        spread = 12 * (alpha**2 * self.values.max() + sigma**2).sqrt().max()
        low = (alpha * self.means).min() - spread + torch.zeros_like(x_t)
        high = (alpha * self.means).max() + spread + torch.zeros_like(x_t)
        for _ in range(80):
            middle = (low + high) / 2
            below = (self._log_odds(middle, s) < level).reshape(x_t.shape)
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def _log_odds(self, x: Tensor, t: Tensor) -> Tensor:
        """Return log F - log(1 - F) of the one-dimensional marginal at time t: accurate in both tails, (N,)."""
        u, v, _ = self._modes(x, t)
        z = (u / v.sqrt())[..., 0] * self.vectors[:, 0, 0].sign()
        below = torch.logsumexp(torch.special.log_ndtr(z) + self.weights.log(), 1)
        return below - torch.logsumexp(torch.special.log_ndtr(-z) + self.weights.log(), 1)


class GaussianPrior(Denoiser):
    """N(mean, cov).

    Args:
        mean: (*event).
        cov: (D, D), or (D,) for a diagonal, or () for an isotropic one; positive semi-definite.
        schedule: the noise schedule.
    """

    event_shape: tuple[int, ...]

    def __init__(self, mean: Tensor, cov: Tensor, schedule: Schedule | None = None) -> None:
        super().__init__()
        self.mixture = MixturePrior(mean.new_ones(1), mean[None], cov[None], schedule)
        self.schedule, self.event_shape = self.mixture.schedule, self.mixture.event_shape

    @property
    def mean(self) -> Tensor:
        """The mean, (*event)."""
        return self.mixture.means[0].reshape(self.event_shape)

    @property
    def cov(self) -> Tensor:
        """The covariance, (D, D)."""
        return self.mixture.covs[0]

    def forward(self, x_t: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """Return E[x_0 | x_t], (N, *event); `t` is () or (N,)."""
        return self.mixture(x_t, t)

    def log_prob(self, x_t: Tensor, t: Tensor | float = 0.0) -> Tensor:
        """Return log p_t(x_t), (N,)."""
        return self.mixture.log_prob(x_t, t)

    def covariance_action(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """Return Cov[x_0 | x_t] v, (N, *event)."""
        return self.mixture.covariance_action(x_t, t, v)

    def flow(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return the probability-flow map from time t to s in closed form, (N, *event)."""
        u, v, _ = self.mixture._modes(x_t, t)
        alpha, sigma = self.mixture._coefficients(x_t, s)
        scaled = (u * ((alpha**2 * self.mixture.values + sigma**2) / v).sqrt())[:, 0]
        return (alpha[:, 0] * self.mixture.means + scaled @ self.mixture.vectors[0].T).reshape(x_t.shape)

    def sample(self, n: int, noise: Noise | None = None, seed: int = 0) -> Tensor:
        """Return n exact draws, (n, *event)."""
        return self.mixture.sample(n, noise, seed)

    def posterior(self, likelihood: Likelihood) -> ExactPosterior:
        """Return the exact posterior for a linear-Gaussian likelihood, or for its joint with x_t."""
        return self.mixture.posterior(likelihood)


@dataclass(frozen=True)
class ExactPosterior:
    """A Gaussian mixture for each of B measurements.

    Attributes:
        log_joint: log w_i p(y | component i), (B, M).
        means: (B, M, D).
        covs: (B, M, D, D).
        event_shape: shape of one item.
    """

    log_joint: Tensor
    means: Tensor
    covs: Tensor
    event_shape: Sequence[int]

    @property
    def log_evidence(self) -> Tensor:
        """log p(y), (B,)."""
        return torch.logsumexp(self.log_joint, 1)

    @property
    def weights(self) -> Tensor:
        """Posterior weights of the components, (B, M)."""
        return self.log_joint.softmax(1)

    @property
    def mean(self) -> Tensor:
        """E[x | y], (B, *event)."""
        return self._mean().reshape(-1, *self.event_shape)

    @property
    def cov(self) -> Tensor:
        """Cov[x | y], (B, D, D)."""
        centred = self.means - self._mean()[:, None]
        inner = self.covs + centred[..., :, None] * centred[..., None, :]
        return (self.weights[..., None, None] * inner).sum(1)

    def sample(self, k: int, seed: int = 0) -> Tensor:
        """Return k exact draws for each measurement, (k, B, *event)."""
        batch = self.means.shape[0]
        seeds = [mix(seed, b) for b in range(batch)]
        noise = Noise.spawn(seeds, range(k), self.means.dtype, self.means.device)
        return self.draw(noise).reshape(k, batch, *self.event_shape)

    def draw(self, noise: Noise) -> Tensor:
        """Return one exact draw per stream, (N, *event), stream n serving measurement n modulo B."""
        batch, count, size = self.means.shape
        values, vectors = torch.linalg.eigh(self.covs)
        roots = vectors * values.clamp_min(0).sqrt()[..., None, :]
        row = torch.arange(len(noise)) % batch
        component = torch.zeros_like(row)
        if count > 1:
            component = (noise.rand(1) > self.weights.cumsum(1)[row]).sum(1).clamp_max(count - 1)
        x = self.means[row, component] + torch.einsum("nij,nj->ni", roots[row, component], noise.randn(size))
        return x.reshape(-1, *self.event_shape)

    def _mean(self) -> Tensor:
        return (self.weights[..., None] * self.means).sum(1)


def integrate_flow(prior: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, steps: int = 400) -> Tensor:
    """Integrate the probability flow from t to s by Runge-Kutta of order 4, (N, *event); `t` and `s` are ().

    With z = x_t / alpha_t and l = log(sigma_t / alpha_t) it reads dz/dl = z - D. The ratio 0 is approached to 1e-4 and
    then left by one denoising.
    """
    schedule = prior.schedule
    t, s = (torch.as_tensor(c, dtype=torch.float64) for c in (t, s))
    high, low = schedule.ratio(t), schedule.ratio(s)
    logs = torch.linspace(float(high.log()), float(low.clamp_min(1e-4).log()), steps + 1, dtype=torch.float64)

    def slope(z: Tensor, log: Tensor) -> Tensor:
        time = schedule.time(log.exp())
        return z - prior(like(schedule(time)[0], z) * z, time.to(z.dtype))

    z = x_t / like(schedule(t)[0], x_t)
    for a, b in itertools.pairwise(logs):
        h = float(b - a)
        k1 = slope(z, a)
        k2 = slope(z + h / 2 * k1, (a + b) / 2)
        k3 = slope(z + h / 2 * k2, (a + b) / 2)
        k4 = slope(z + h * k3, b)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    if float(low) < 1e-4:
        time = schedule.time(logs[-1].exp())
        return prior(like(schedule(time)[0], z) * z, time.to(z.dtype))
    return like(schedule(s)[0], z) * z


def gaussian_terms(likelihood: Likelihood) -> tuple[Tensor, Tensor, Tensor]:
    """Return (L, h, c) of log p(y | x) = c + h'x - x'Lx / 2: (B, D, D), (B, D), (B,), by probing the operator.

    Raises:
        TypeError: the likelihood is not linear-Gaussian.
    """
    if isinstance(likelihood, JointLikelihood):
        precision, shift, constant = gaussian_terms(likelihood.likelihood)
        weight = (likelihood.alpha / likelihood.sigma**2).reshape(-1, 1)
        x_t, size = likelihood.x_t.flatten(1), precision.shape[-1]
        eye = torch.eye(size, dtype=precision.dtype, device=precision.device)
        sigma = likelihood.sigma.flatten()
        own = -0.5 * (x_t**2).sum(1) / sigma**2 - size * (sigma.log() + 0.5 * math.log(2 * math.pi))
        added = (likelihood.alpha / likelihood.sigma).reshape(-1, 1, 1) ** 2 * eye
        return precision + added, shift + weight * x_t, constant + own
    if isinstance(likelihood, FlatLikelihood):
        size = likelihood.event_shape.numel()
        zeros = torch.zeros(likelihood.batch, size, size, dtype=likelihood.dtype, device=likelihood.device)
        return zeros, zeros[..., 0], zeros[:, 0, 0]
    if not isinstance(likelihood, GaussianLikelihood):
        raise TypeError(f"{type(likelihood).__name__} is not linear-Gaussian")
    matrix = dense_matrix(likelihood)
    y = real_rows(likelihood.y)
    variance = likelihood.sigma**2
    precision = matrix.mT @ matrix / variance[:, None, None]
    shift = torch.einsum("bmd,bm->bd", matrix, y) / variance[:, None]
    size = y.shape[1]
    log_scale = size * (likelihood.sigma.log() + 0.5 * math.log(2 * math.pi))
    return precision, shift, -0.5 * (y**2).sum(1) / variance - log_scale


def dense_matrix(likelihood: GaussianLikelihood) -> Tensor:
    """Return the operator of each measurement as a matrix, (B, M, D), by applying it to the unit vectors."""
    size, batch = likelihood.event_shape.numel(), likelihood.batch
    eye = torch.eye(size, dtype=likelihood.dtype, device=likelihood.device)
    basis = eye.repeat_interleave(batch, 0).reshape(-1, *likelihood.event_shape)
    columns = real_rows(likelihood.expand(size).physics.A(basis))
    return columns.reshape(size, batch, -1).permute(1, 2, 0)


def _full(covs: Tensor, count: int, size: int) -> Tensor:
    if covs.shape == (count, size, size):
        return covs
    eye = torch.eye(size, dtype=covs.dtype, device=covs.device)
    if covs.shape == (count,):
        return covs[:, None, None] * eye
    if covs.shape == (count, size):
        return torch.diag_embed(covs)
    raise ValueError(f"covariances of shape {tuple(covs.shape)} do not fit {count} components of dimension {size}")
