"""Particles whose energy does not change when all move together.

Such an energy has no normaliser on R^(n k). Coordinates here are those of the (n - 1) k dimensional space of centred positions, in
an orthonormal basis, so that lengths and volumes are kept: rho is a proper density with a log Z that means something. Papers sample
n k numbers with the mean removed; `positions` gives those.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from fewstep.core.density import TargetDensity, floating


class Particles(TargetDensity):
    """log rho = -sum over pairs of E(r_ij), in centred coordinates.

    Attributes:
        particles: n.
        space: k, the dimension of space.
    """

    particles: int
    space: int

    @property
    def dim(self) -> int:  # type: ignore[override]
        """See `TargetDensity`: (n - 1) k."""
        return (self.particles - 1) * self.space

    @abstractmethod
    def energy(self, squared: Tensor) -> Tensor:
        """Return E of pairs at squared distance r^2, of the same shape."""

    def log_prob(self, x: Tensor) -> Tensor:
        """See `TargetDensity`."""
        positions = self.positions(x)
        first, second = torch.triu_indices(self.particles, self.particles, 1, device=x.device)
        return -self.energy((positions[:, first] - positions[:, second]).square().sum(2)).sum(1)

    def positions(self, x: Tensor) -> Tensor:
        """Return the centred positions, (N, d) -> (N, n, k)."""
        x = floating(x)
        return torch.einsum("pn,bpk->bnk", self._basis.to(x), x.reshape(len(x), -1, self.space))

    def coordinates(self, positions: Tensor) -> Tensor:
        """Return the coordinates of positions, whose mean is dropped, (N, n, k) -> (N, d)."""
        return torch.einsum("pn,bnk->bpk", self._basis.to(positions), positions).flatten(1)

    def expectations(self) -> dict[str, Tensor]:
        """See `TargetDensity`: zero mean by symmetry."""
        return {"mean": torch.zeros(self.dim, dtype=torch.float64)}

    @cached_property
    def _basis(self) -> Tensor:
        """Helmert's orthonormal rows, (n - 1, n), each orthogonal to (1, ..., 1)."""
        n = self.particles
        rows = torch.tril(torch.ones(n - 1, n, dtype=torch.float64))
        k = torch.arange(1, n, dtype=torch.float64)
        rows[torch.arange(n - 1), torch.arange(1, n)] = -k
        return rows / (k * (k + 1)).sqrt()[:, None]
