"""What is known of a law of which only an unnormalised log-density is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor

from fewstep.core.checks import check_gradients
from fewstep.core.noise import Noise


class Bounds(NamedTuple):
    """What is known of a log Z that nobody has in closed form: an interval in nats, and who says so."""

    low: float
    high: float
    source: str


class TargetDensity(ABC):
    """An unnormalised density rho on R^d; final subclasses are frozen dataclasses, one file each.

    Attributes:
        dim: the number of coordinates, d.
        log_z: log of the integral of rho in nats, or None where it is not known to 1e-3.
        log_z_bounds: where log_z is None, the best that is known.
        support: (low, high), each a number or (d,), where rho lives in a box; None is all of R^d.
    """

    dim: int
    log_z: float | None = None
    log_z_bounds: Bounds | None = None
    support: tuple[Tensor | float, Tensor | float] | None = None

    @property
    def event_shape(self) -> tuple[int]:
        """The shape of one item, (d,)."""
        return (self.dim,)

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Return the density itself: it is frozen, and a user's function need not know how to be copied."""
        return self

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Return log rho(x), (N, d) -> (N,), in the type of x or a wider one; -inf outside the support."""

    def score(self, x: Tensor) -> Tensor:
        """Return grad log rho(x), (N, d) -> (N, d); by autograd unless a subclass knows better.

        Differentiable where `x` is, and inside the transforms of `torch.func`.
        """
        return gradient(self.log_prob, x)

    def sample(self, noise: Noise) -> Tensor:
        """Return one exact draw per stream of `noise`, (N, d).

        Raises:
            NotImplementedError: no exact sampler is known for this density.
        """
        raise NotImplementedError(f"no exact sampler is known for {type(self).__name__}")

    def expectations(self) -> dict[str, Tensor]:
        """Return what is known exactly: "mean" and "variance", (d,) each, and others that a subclass names; may be empty."""
        return {}


def by_score(target: TargetDensity, x: Tensor) -> Tensor:
    """Return log rho(x), (N, d) -> (N,), whose gradient in x is the target's own score, and zero where that is not finite."""
    with torch.no_grad():
        value, score = target.log_prob(x), target.score(x).nan_to_num(0.0, 0.0, 0.0)
    return value + ((x - x.detach()) * score).sum(1)


def floating(x: Tensor) -> Tensor:
    """Return x, integers as numbers of the default type."""
    return x if x.is_floating_point() else x.to(torch.get_default_dtype())


def gradient(log_prob: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the gradient of each item's log_prob, (N, d) -> (N, d); differentiable where `x` is, and inside `torch.func`.

    Raises:
        RuntimeError: torch is in inference mode.
    """
    if torch._C._functorch.is_functorch_wrapped_tensor(x):  # there, plain autograd is refused
        return torch.func.grad(lambda x: log_prob(x).sum())(x)
    check_gradients()
    x = floating(x)
    further = torch.is_grad_enabled() and x.requires_grad
    with torch.enable_grad():
        x = x if further else x.detach().requires_grad_()
        return torch.autograd.grad(log_prob(x).sum(), x, create_graph=further)[0]
