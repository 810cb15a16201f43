r"""Unrolling particles (Gama, Zilberstein, Baraniuk and Segarra 2022, arXiv:2110.02915): learned proposals for a state space model.

x_t = f(x_{t-1}) + v_t, y_t = C x_t + w_t with Gaussian v and w. Particles are drawn from N(mu_t, Sigma_t), mu_t = x_{t-1} + a
perceptron of its own for every t of [x_{t-1}; y_t], Sigma_t = B K B' + 1e-6 I with K_ij = exp(-(z_i - z_j)^2) and z a perceptron
that all t share. Weights multiply up by p(y_t | x_t) p(x_t | x_{t-1}) / N(x_t; mu_t, Sigma_t): expectations are consistent, and
the mean weight is unbiased for p(y_0, ..., y_T), whatever was learned.

The loss is -E log w, the negative of a bound on the evidence, which has the paper's terms with their normalisers. All parameters
are trained; the published code leaves out those of Sigma.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fewstep.core.noise import Noise


@dataclass(frozen=True, eq=False)
class StateSpace:
    """A model of states and of what is observed of them.

    Attributes:
        transition: f, (N, n) -> (N, n).
        observation: C, (m, n).
        start: mean of the first state, (n,), and its covariance, (n, n).
        noise: covariance of v, (n, n).
        error: covariance of w, (m, m).
    """

    transition: Callable[[Tensor], Tensor]
    observation: Tensor
    start: tuple[Tensor, Tensor]
    noise: Tensor
    error: Tensor

    def log_joint(self, x: Tensor, before: Tensor | None, y: Tensor) -> Tensor:
        """Return log p(y_t | x_t) + log p(x_t | x_{t-1}), (N,); `before` is None for the first state."""
        mean, cov = self.start if before is None else (self.transition(before), self.noise)
        return log_normal(y - x @ self.observation.T, self.error) + log_normal(x - mean, cov)


class Particles(NamedTuple):
    """Weighted states at every time: x, (T, N, n), log-weights up to that time, (T, N), and log p(y_0, ..., y_t), (T,)."""

    x: Tensor
    log_weights: Tensor
    log_evidence: Tensor

    @property
    def means(self) -> Tensor:
        """E[x_t | y_0, ..., y_t], (T, n)."""
        return (self.log_weights.softmax(1)[..., None] * self.x).sum(1)


class Proposal(nn.Module):
    """The learned proposals of one sequence length.

    Args:
        times: T.
        sizes: n and m.
        width: channels of the two hidden layers.
    """

    def __init__(self, times: int, sizes: tuple[int, int], width: int = 64) -> None:
        super().__init__()
        n, m = sizes
        self.means = nn.ModuleList(_perceptron(n + m, width, n) for _ in range(times))
        self.shape = _perceptron(n + m, width, n)
        self.mix = nn.Parameter(0.5 * torch.eye(n))

    def forward(self, t: int, before: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean, (N, n), and the Cholesky factor of the covariance, (N, n, n), at time t."""
        given = torch.cat([before, y.expand(len(before), -1)], 1)
        z = self.shape(given)
        kernel = torch.exp(-(z[:, :, None] - z[:, None]).square())
        eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        return before + self.means[t](given), torch.linalg.cholesky(self.mix @ kernel @ self.mix.T + 1e-6 * eye)


def filtered(
    model: StateSpace, proposal: Proposal | None, y: Tensor, noise: Noise, threshold: float = 1 / 3
) -> Particles:
    """Return particles for observations y, (T, m), one per stream of `noise`.

    Args:
        model: the state space.
        proposal: the learned proposals; None draws from the model's own transition (the bootstrap filter).
        y: the observations.
        noise: the randomness.
        threshold: effective sample size, a share of N, below which particles are drawn again; 0 never does, which a loss needs.
    """
    n, log_n = model.observation.shape[1], math.log(len(noise))
    x, log_w, evidence = model.start[0].expand(len(noise), n), y.new_zeros(len(noise)), y.new_zeros(())
    states, weights, evidences = [], [], []
    for t, seen in enumerate(y):
        before = None if t == 0 else x
        mean, root = _own(model, before, x) if proposal is None else proposal(t, x, seen)
        e = noise.randn(n)
        x = mean + torch.einsum("...ij,...j->...i", root, e)
        log_q = -(e.square().sum(1) + n * math.log(2 * math.pi)) / 2 - torch.diagonal(root, 0, -2, -1).log().sum(-1)
        log_w = log_w + model.log_joint(x, before, seen) - log_q
        states.append(x)
        weights.append(log_w)
        evidences.append(evidence + log_w.logsumexp(0) - log_n)
        share = log_w.softmax(0)
        if threshold and 1 / float(share.square().sum()) < threshold * len(noise):
            rows = torch.searchsorted(share.cumsum(0), (torch.arange(len(x)) + noise.rand(1)[0, 0]) / len(x))
            x, evidence, log_w = x[rows.clamp_max(len(x) - 1)], evidences[-1], torch.zeros_like(log_w)
    return Particles(torch.stack(states), torch.stack(weights), torch.stack(evidences))


def train(
    model: StateSpace, proposal: Proposal, y: Tensor, noise: Noise, steps: int = 200, lr: float = 1e-3
) -> list[float]:
    """Train `proposal` on the observations alone and return the losses, -mean log w per step of the sequence."""
    optimizer, losses = torch.optim.Adam(proposal.parameters(), lr), []
    for _ in range(steps):
        loss = -filtered(model, proposal, y, noise, threshold=0.0).log_weights[-1].mean() / len(y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(proposal.parameters(), 10.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def kalman(matrix: Tensor, model: StateSpace, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return E[x_t | y_0, ..., y_t], (T, n), and log p(y_0, ..., y_T), (), for the transition x -> matrix x."""
    mean, cov = model.start
    means, log_p, c = [], y.new_zeros(()), model.observation
    for t, seen in enumerate(y):
        if t:
            mean, cov = matrix @ mean, matrix @ cov @ matrix.T + model.noise
        spread = c @ cov @ c.T + model.error
        log_p = log_p + log_normal((seen - c @ mean)[None], spread)[0]
        gain = torch.linalg.solve(spread, c @ cov).T
        mean, cov = mean + gain @ (seen - c @ mean), cov - gain @ c @ cov
        means.append(mean)
    return torch.stack(means), log_p


def log_normal(x: Tensor, cov: Tensor) -> Tensor:
    """Return log N(x; 0, cov), (N, k) -> (N,)."""
    root = torch.linalg.cholesky(cov)
    u = torch.linalg.solve_triangular(root, x.T, upper=False)
    return -(u.square().sum(0) + x.shape[1] * math.log(2 * math.pi)) / 2 - root.diagonal().log().sum()


def _own(model: StateSpace, before: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and Cholesky factor of the model's own law of the next state."""
    mean, cov = (x, model.start[1]) if before is None else (model.transition(before), model.noise)
    return mean, torch.linalg.cholesky(cov)


def _perceptron(inputs: int, width: int, outputs: int) -> nn.Sequential:
    layers = [nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, outputs)]
    return nn.Sequential(*layers)
