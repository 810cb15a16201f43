"""Chains with Gaussian links: log Z, moments and exact samples by passing messages on a grid."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fewstep.core.density import TargetDensity
from fewstep.core.noise import Noise
from fewstep.densities.targets._line import Line

_CUT = 1e-9  # of the mass of a coordinate at an end of the grid


class Messages(NamedTuple):
    """Logarithms on the grid: of the mass of all that follows, given x_i, and of all that precedes it, (d, G) each; log Z."""

    after: Tensor
    before: Tensor
    log_z: float


class GaussianChain(TargetDensity):
    r"""log rho = sum_i u_i(x_i) - sum_{i < d} (x_{i+1} - g(x_i))^2 / (2 width^2).

    M_i(x) = \int N(y; g(x), width^2) exp(u_{i+1}(y)) M_{i+1}(y) dy turns the integral into d - 1 products with one matrix, and
    x_{i+1} given x_i has density N(y; g(x_i), width^2) exp(u_{i+1}(y)) M_{i+1}(y): all of it one-dimensional.

    Attributes:
        low, high, nodes: the grid, which has to hold every x_i but the last where that is free.
        free_end: u_d = 0, so that x_d is N(g(x_{d-1}), width^2) and needs no grid.
    """

    low: float
    high: float
    nodes: int
    free_end: bool

    @property
    @abstractmethod
    def width(self) -> float:
        """The standard deviation of the links."""

    @abstractmethod
    def link(self, x: Tensor) -> Tensor:
        """Return g(x), of the same shape."""

    @abstractmethod
    def unary(self, i: int, x: Tensor) -> Tensor:
        """Return u_i(x), i = 0, ..., d - 1, of the shape of `x`."""

    def log_prob(self, x: Tensor) -> Tensor:
        """See `TargetDensity`."""
        links = (x[:, 1:] - self.link(x[:, :-1])).square().sum(1) / (2 * self.width**2)
        return sum(self.unary(i, x[:, i]) for i in range(self.dim)) - links

    @cached_property
    def log_z(self) -> float:  # type: ignore[override]
        """See `TargetDensity`."""
        return self.messages.log_z

    @cached_property
    def grid(self) -> Tensor:
        """(G,), float64."""
        return torch.linspace(self.low, self.high, self.nodes, dtype=torch.float64)

    @cached_property
    def messages(self) -> Messages:
        """See `Messages`; logarithms, because the mass of a long chain over- or underflows."""
        x, step = self.grid, float(self.grid[1] - self.grid[0])
        kernel = torch.exp(-(x - self.link(x)[:, None]).square() / (2 * self.width**2)) * step  # (from, to)
        after, before = torch.zeros(self.dim, len(x), dtype=torch.float64), torch.zeros(self.dim, len(x), dtype=x.dtype)
        constant = 0.5 * np.log(2 * np.pi) + np.log(self.width)
        for i in reversed(range(self.dim - 1)):
            last = self.free_end and i == self.dim - 2
            after[i] = constant if last else _log_matvec(kernel, self.unary(i + 1, x) + after[i + 1])
        for i in range(1, self.dim):
            before[i] = _log_matvec(kernel.T, self.unary(i - 1, x) + before[i - 1])
        held = torch.stack([self.unary(i, x) for i in range(self.dim - self.free_end)])
        law = (held + after[: len(held)] + before[: len(held)]).softmax(1)
        if float(law[:, [0, -1]].max()) > _CUT:
            raise ValueError(
                f"{self} reaches beyond the grid that its log Z is taken on, {self.low:.3g} to {self.high:.3g}"
            )
        return Messages(after, before, float(torch.logsumexp(self.unary(0, x) + after[0], 0) + np.log(step)))

    def sample(self, noise: Noise) -> Tensor:
        """See `TargetDensity`: x_1 by its marginal, then each x_{i+1} given x_i, by quantiles."""
        u = noise.rand(self.dim).double().cpu()
        first = Line(lambda x: self._following(0, x), self.low, self.high)
        x = [first.quantile(u[:, 0])]
        offsets = self.width * torch.linspace(-7, 7, 121, dtype=torch.float64)
        for i in range(1, self.dim):
            y = self.link(x[-1])[:, None] + offsets
            log = -offsets.square() / (2 * self.width**2)
            if not (self.free_end and i == self.dim - 1):
                log = log + self._following(i, y)
            x.append(_quantiles(y, log.expand_as(y), u[:, i]))
        return torch.stack(x, 1).to(noise.device, noise.dtype)

    def expectations(self) -> dict[str, Tensor]:
        """See `TargetDensity`: moments of the marginals."""
        logs = torch.stack([self.unary(i, self.grid) for i in range(self.dim)])
        law = (logs + self.messages.after + self.messages.before).softmax(1)
        mean, second = law @ self.grid, law @ self.grid.square()
        if self.free_end:
            ahead = self.link(self.grid)
            mean[-1], second[-1] = law[-2] @ ahead, law[-2] @ ahead.square() + self.width**2
        return {"mean": mean, "variance": second - mean.square()}

    def _following(self, i: int, x: Tensor) -> Tensor:
        """Return u_i(x) + log M_i(x), interpolated, -inf off the grid."""
        place = ((x - self.low) / (self.high - self.low) * (self.nodes - 1)).clamp(0, self.nodes - 1)
        k = place.long().clamp_max(self.nodes - 2)
        after = self.messages.after[i]
        log = after[k] + (place - k) * (after[k + 1] - after[k])
        return torch.where((x >= self.low) & (x <= self.high), self.unary(i, x) + log, -torch.inf)


def _log_matvec(kernel: Tensor, log: Tensor) -> Tensor:
    top = log.max()
    return (kernel @ torch.exp(log - top)).log().clamp_min(-1e3) + top  # -inf cannot be interpolated


def _quantiles(y: Tensor, log: Tensor, u: Tensor) -> Tensor:
    """Return the quantiles u, (N,), of densities that are linear between nodes: exp(log) on equally spaced y, (N, G) each."""
    density = torch.exp(log - log.amax(1, keepdim=True))
    below = torch.nn.functional.pad(torch.cumulative_trapezoid(density, dim=1), (1, 0))
    density, below = density / below[:, -1:], below / below[:, -1:]
    k = torch.searchsorted(below, u[:, None].contiguous()).clamp(1, y.shape[1] - 1)
    p, q = (torch.gather(density, 1, at)[:, 0] for at in (k - 1, k))
    step, start = y[:, 1] - y[:, 0], torch.gather(y, 1, k - 1)[:, 0]
    mass = u - torch.gather(below, 1, k - 1)[:, 0]
    # p s + (q - p) s^2 / 2 = mass, in the form that does not cancel
    share = 2 * mass / (p + (p.square() + 2 * (q - p) * mass).clamp_min(0).sqrt()).clamp_min(1e-300)
    return start + step * share.clamp(0, 1)
