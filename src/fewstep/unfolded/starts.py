"""Where the inner iterations begin, from y, x_t and the previous outer estimate."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.batch import like
from fewstep.core.likelihood import JointLikelihood, Likelihood
from fewstep.core.together import noise_level


class Given(NamedTuple):
    """What an initialiser may use; x_t is (N, *event), alpha and sigma are (N,), `previous` the last estimate or None."""

    likelihood: Likelihood
    x_t: Tensor
    alpha: Tensor
    sigma: Tensor
    previous: Tensor | None


Start = Callable[[Given], Tensor]


def gaussian(given: Given) -> Tensor:
    """Return E[x_0 | y, x_t] under a standard normal prior: y and x_t, each where it knows more."""
    joint = JointLikelihood(given.likelihood, given.x_t, given.alpha, given.sigma)
    return joint.prox(torch.zeros_like(given.x_t), torch.ones_like(given.alpha))


def pinv(given: Given) -> Tensor:
    """Return the likelihood's own first guess, A^+ y."""
    return given.likelihood.start()


def blend(given: Given) -> Tensor:
    """Return the paper's heuristic (A^+ y sigma_t + alpha_t sigma_y x_t) / sqrt(sigma_y^2 + sigma_t^2).

    Its weights do not sum to one (Kemajou Mbakam et al. 2025, arXiv:2507.02686, as in the public code).
    """
    noise = like(noise_level(given.likelihood), given.x_t)
    alpha, sigma = like(given.alpha, given.x_t), like(given.sigma, given.x_t)
    return (sigma * given.likelihood.start() + alpha * noise * given.x_t) / (noise.square() + sigma.square()).sqrt()


def previous(given: Given) -> Tensor:
    """Return the previous outer estimate, and `gaussian` where there is none yet."""
    return gaussian(given) if given.previous is None else given.previous


STARTS: dict[str, Start] = {"gaussian": gaussian, "pinv": pinv, "blend": blend, "previous": previous}
