"""Where the inner iterations begin, from y, x_t and the previous outer estimate."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.batch import like
from fewstep.core.likelihood import JointLikelihood, Likelihood
from fewstep.core.together import Together, noise_level
from fewstep.unfolded.ram import reconstruct


class Given(NamedTuple):
    """What an initialiser may use; x_t is (N, *event), alpha and sigma are (N,), `previous` the last estimate or None."""

    likelihood: Likelihood
    x_t: Tensor
    alpha: Tensor
    sigma: Tensor
    previous: Tensor | None


class Start(NamedTuple):
    """An initialiser.

    Attributes:
        begin: what it does, (N, *event).
        calls: network calls that it costs.
        remembers: whether it wants the previous outer estimate.
    """

    begin: Callable[[Given], Tensor]
    calls: int = 0
    remembers: bool = False


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


def ram(given: Given) -> Tensor:
    """Return the reconstruction of (y, x_t) by deepinv's RAM, see `unfolded.ram`; measurements of different kinds one by one."""
    likelihood, rest = given.likelihood, (given.x_t, given.alpha, given.sigma)
    if not isinstance(likelihood, Together):
        return reconstruct(likelihood, *rest)  # type: ignore[arg-type]  # others are refused there
    pieces = zip(likelihood.parts, *(value.split(likelihood.sizes) for value in rest), strict=True)
    return torch.cat([reconstruct(part, *values) for part, *values in pieces])


STARTS: dict[str, Start] = {
    "gaussian": Start(gaussian),
    "pinv": Start(pinv),
    "blend": Start(blend),
    "previous": Start(previous, remembers=True),
    "ram": Start(ram, calls=1),
}
