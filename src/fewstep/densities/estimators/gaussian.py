"""Log-densities of isotropic Gaussians in double precision, and the weights of maps that start from one."""

from __future__ import annotations

import math

from torch import Tensor


def log_normal(x: Tensor, mean: Tensor | float = 0.0, std: float = 1.0) -> Tensor:
    """Return log N(x; mean, std^2 I), (..., d) -> (...) float64."""
    z = (x.double() - mean) / std
    return -0.5 * z.square().sum(-1) - x.shape[-1] * math.log(std * math.sqrt(2 * math.pi))


def map_log_weights(log_rho: Tensor, log_abs_det: Tensor, z: Tensor) -> Tensor:
    """Return log rho(f(z)) + log|det Df(z)| - log N(z; 0, I), (N,) float64: unbiased if f is one-to-one and onto."""
    return log_rho.double() + log_abs_det.double() - log_normal(z)
