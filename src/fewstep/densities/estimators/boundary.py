r"""The "weights" rho(f(z)) / p_0(z) of published one-step samplers, which leave out |det Df(z)| and estimate nothing.

"The running-cost term vanishes and the weight reduces to the boundary likelihood" (Jutras-Dube et al. 2025, arXiv:2502.07579, on
one step). For f(z) = s z and the Gaussian it maps to, they are constant, so the effective sample size reads 1, and log Z is
off by d log s. Kept to reproduce published columns, never to weight draws.
"""

from __future__ import annotations

from torch import Tensor

from fewstep.densities.estimators.gaussian import log_normal


def invalid_boundary_log_weights(log_rho: Tensor, z: Tensor) -> Tensor:
    """Return log rho(f(z)) - log N(z; 0, I), (N,) float64: not importance weights. For `Draws` of kind "invalid".

    Args:
        log_rho: log rho(f(z)), (N,).
        z: (N, d).
    """
    return log_rho.double() - log_normal(z)
