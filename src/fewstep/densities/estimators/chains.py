r"""Weights of a consistency sampler of several steps, which draws y_1 = a f(z) + s e and answers y = f(y_1, t_1).

Only the last map and the last noising matter: however c = f(z) came about, y_1 ~ N(a c, s^2 I) given c, and y = g(y_1) with
g = f(., t_1). With pi(y_1) = rho(g(y_1)) |det Dg(y_1)|, whose integral is Z if g is one-to-one and onto, there are two choices.

* Mixture. The N draws of a batch are one draw from each of N proposals, and w_n = pi(y_n) / mean_m N(y_n; a c_m, s^2 I) satisfies
  E[mean w | c] = Z for any c (the balance heuristic of Veach and Guibas 1995; Owen and Zhou 2000). The weights of a batch use
  each other's c and errors computed as if they were independent are on the safe side.
* Path. The density of the pair (z, y_1) against the target's pi(y_1) q_B(z | y_1), with any normalised q_B: the noising kernel
  from t_1 to 1. Each weight on its own, for two steps; since z says far more of y_1 than the kernel knows, of a variance that
  grows with exp of their mutual information. Prefer the mixture.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewstep.core.schedule import Schedule
from fewstep.densities.estimators.gaussian import log_normal


def mixture_log_weights(log_pi: Tensor, y_1: Tensor, means: Tensor, std: float, rows: int = 1024) -> Tensor:
    """Return log pi(y_n) - log mean_m N(y_n; means_m, std^2 I), (N,) float64.

    Args:
        log_pi: log rho(g(y_1)) + log|det Dg(y_1)|, (N,).
        y_1: the noised points, (N, d).
        means: a c, what they were drawn around, (N, d), row by row.
        std: s, positive.
        rows: rows at a time, each against all means.
    """
    x, centres = y_1.double() / std, means.double() / std
    parts = [(-0.5 * torch.cdist(part, centres).square()).logsumexp(1) for part in x.split(rows)]
    constant = x.shape[1] * math.log(std * math.sqrt(2 * math.pi)) + math.log(len(x))
    return log_pi.double() - torch.cat(parts) + constant


def path_log_weights(log_pi: Tensor, y_1: Tensor, means: Tensor, z: Tensor, schedule: Schedule, t: Tensor) -> Tensor:
    """Return log pi(y_1) q_B(z | y_1) / (N(z; 0, I) N(y_1; means, sigma_t^2 I)), (N,) float64.

    Args:
        log_pi: log rho(g(y_1)) + log|det Dg(y_1)|, (N,).
        y_1: the noised points at time t, (N, d).
        means: alpha_t f(z), (N, d).
        z: where each started, (N, d), at time 1.
        schedule: of the noising.
        t: (), in (0, 1).
    """
    t = t.double()
    (alpha, sigma), (alpha_1, sigma_1) = schedule(t), schedule(torch.ones_like(t))
    shrink = float(alpha_1 / alpha)
    spread = float((sigma_1.square() - (shrink * sigma).square()).sqrt())
    backward = log_normal(z, shrink * y_1.double(), spread)
    return log_pi.double() + backward - log_normal(z) - log_normal(y_1, means.double(), float(sigma))
