r"""Laplace's approximation as a sampler of one step: x = m + L z, m the mode and L L' the inverse of minus the Hessian there.

It trains nothing, its determinant is that of L, and in posteriors that are nearly Gaussian it is what a trained map has to beat. Its
weights rho(x) / N(x; m, L L') are unbiased in any number of dimensions, where those of a network cost d columns of a Jacobian.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.func import jacfwd

from fewstep.core.density import TargetDensity
from fewstep.core.noise import Noise
from fewstep.densities.base import Cost, Drawn, Transport, Walked
from fewstep.densities.estimators.gaussian import log_normal
from fewstep.densities.whitened import Whitened


@dataclass(frozen=True, eq=False)
class Laplace(Transport):
    """Draws of N(0, I) in coordinates in which the target is nearly that.

    Attributes:
        whitened: the density in these coordinates.
    """

    whitened: Whitened
    steps = 1
    kind = "unbiased"

    @property
    def target(self) -> TargetDensity:  # type: ignore[override]
        """See `DensitySampler`."""
        return self.whitened.target

    def draw(self, noise: Noise, steps: int, weights: bool) -> Drawn:
        """See `DensitySampler`; the number of steps makes no difference."""
        y, log_w, _ = self.walked(noise.randn(self.target.dim), steps, noise, weights)
        return Drawn(y, log_w if weights else None, self.cost(steps, weights))

    def walked(self, z: Tensor, steps: int, noise: Noise, weights: bool) -> Walked:
        """See `Transport`: nothing is left to do in whitened coordinates."""
        ones = z.new_ones(len(z)).double()
        return Walked(z, self._log_weights(z) if weights else torch.zeros_like(ones), ones)

    def cost(self, steps: int, weights: bool = True) -> Cost:
        """See `Transport`."""
        return Cost(0, int(weights))

    def backward_weights(self, y: Tensor, steps: int, noise: Noise) -> Tensor:
        """See `DensitySampler`."""
        return self._log_weights(y)

    def config(self) -> dict[str, Any]:
        """See `DensitySampler`."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """See `DensitySampler`."""
        return {}

    @classmethod
    def restore(cls, whitened: Whitened, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """See `DensitySampler`."""
        return cls(whitened)

    def _log_weights(self, y: Tensor) -> Tensor:
        return self.whitened.log_prob(y).double() - log_normal(y.double())


def laplace(target: TargetDensity, start: Tensor | None = None, iterations: int = 100) -> Laplace:
    """Return the Gaussian that fits `target` at its mode, found by Newton's method with steps that rise.

    Args:
        target: of one mode, with a second derivative by forward mode, unbounded; d columns of it are taken at a time.
        start: where to start, (d,); the origin where absent.
        iterations: at most so many.

    Raises:
        ValueError: no mode was found, the target is bounded, or it or its second derivative is not finite on the way.
    """
    if target.support is not None:
        raise ValueError("the mode of a bounded density may lie on its edge: use `whiten`")
    x = torch.zeros(target.dim, dtype=torch.float64) if start is None else start.double()
    for _ in range(iterations):
        if not bool(target.log_prob(x[None]).isfinite().all()):
            raise ValueError("the density is not finite where its mode is looked for: give another start")
        slope, (root, saddle) = target.score(x[None])[0], _curvature(target, x)
        step = torch.cholesky_solve(slope[:, None], root)[:, 0]
        still = float(slope @ step) < 1e-9
        if still and saddle is None:
            return Laplace(Whitened(target, x, _inverse_root(root)))
        x = _risen(target, x, step if saddle is None or not still else saddle)
    raise ValueError(f"no mode was found in {iterations} Newton steps: the density may have none")


def _curvature(target: TargetDensity, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the Cholesky factor of minus the Hessian at x, with as much of the identity added as makes it positive.

    Where any was needed x is no mode, and a step away from it comes with it, along the curvature that is most upwards.
    """
    hessian = -jacfwd(lambda x: target.score(x[None])[0])(x)
    if not bool(hessian.isfinite().all()):
        raise ValueError("the density has no finite second derivative where its mode is looked for: give another start")
    hessian, added = (hessian + hessian.T) / 2, 0.0
    while True:
        root, failed = torch.linalg.cholesky_ex(hessian + added * torch.eye(len(x), dtype=x.dtype))
        if not failed:
            return root, _ridge(hessian) if added else None
        added = max(10 * added, 1e-3 * float(hessian.diagonal().abs().mean()) + 1e-12)


def _ridge(hessian: Tensor) -> Tensor:
    """Return the direction of the least eigenvalue of minus the Hessian, as long as the width that its size stands for."""
    values, vectors = torch.linalg.eigh(hessian)
    return vectors[:, 0] * float(values[0].abs().clamp_min(1e-12).rsqrt())


def _risen(target: TargetDensity, x: Tensor, step: Tensor) -> Tensor:
    """Return x + c step with the largest c of 1, 1/2, 1/4, ... at which the density is higher than at x."""
    trials = x + step * 0.5 ** torch.arange(30, dtype=x.dtype)[:, None]
    higher = target.log_prob(trials) > target.log_prob(x[None])
    return trials[int(higher.double().argmax())] if bool(higher.any()) else trials[-1]


def _inverse_root(root: Tensor) -> Tensor:
    """Return a lower triangular L with L L' = (R R')^-1."""
    return torch.linalg.cholesky(torch.cholesky_inverse(root))
