r"""The inverse of a map by Newton's method, for the upper bound of log Z that exact samples of the target give.

With x from the target and z = f^-1(x), log w(z) averages to the EUBO (`weights.bound`), log Z plus the forward divergence:
the bound that sees a mode which the map has left out, as samples without a preimage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.densities.estimators.jacobian import Map, jacobians


@torch.no_grad()
def invert(
    function: Map, y: Tensor, start: Tensor, iterations: int = 50, tolerance: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Return z with f(z) = y, (N, d), and where it was found, (N,): elsewhere y may have no preimage.

    Args:
        function: f, see `jacobian.determinant`.
        y: what to invert, (N, d).
        start: first guesses, (N, d); `nearest` gives good ones.
        iterations: Newton steps, each shortened until the residual falls.
        tolerance: of |f(z) - y| relative to 1 + |y|.
    """
    z, accuracy = start.clone(), tolerance * (1 + y.norm(dim=1))
    for _ in range(iterations):
        rows = torch.nonzero((function(z) - y).norm(dim=1) > accuracy)[:, 0]
        if not len(rows):
            break
        value, jacobian = jacobians(function, z[rows])
        residual = value - y[rows]
        direction = torch.linalg.lstsq(jacobian, residual[..., None]).solution[..., 0].nan_to_num(0.0)
        z[rows] = _shortened(function, z[rows], direction, y[rows], residual.norm(dim=1))
    return z, (function(z) - y).norm(dim=1) <= accuracy


def nearest(z: Tensor, values: Tensor, y: Tensor) -> Tensor:
    """Return the z, (M, d), whose value f(z), (M, d), is nearest to each y, (N, d): (N, d)."""
    return z[torch.cdist(y, values).argmin(1)]


def _shortened(function: Map, z: Tensor, direction: Tensor, y: Tensor, residual: Tensor) -> Tensor:
    """Return z - c direction with the largest c of 1, 1/2, ..., 1/128 that lowers the residual, or z, per row."""
    best = z
    for k in range(7, -1, -1):
        tried = z - direction / 2**k
        better = (function(tried) - y).norm(dim=1) < residual
        best = torch.where(better[:, None], tried, best)
    return best
