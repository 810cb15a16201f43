"""Measurements of different kinds in one batch: every item keeps its own likelihood."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fewstep.core.counts import Counts
from fewstep.core.likelihood import Likelihood
from fewstep.core.noise import Noise

UNKNOWN_NOISE = 0.05  # what `noise_level` says of a likelihood without a Gaussian noise level, in units of x


class Together(Likelihood):
    """The likelihoods of several batches as one: what belongs to measurement b goes to the part that holds it.

    Args:
        parts: likelihoods of one event shape; their batches follow each other.

    Raises:
        ValueError: there is none, or the shapes of x differ.
    """

    def __init__(self, parts: Sequence[Likelihood]) -> None:
        if not parts or any(part.event_shape != parts[0].event_shape for part in parts):
            raise ValueError("likelihoods of one batch must be of events of one shape")
        self.parts, self.sizes = tuple(parts), [part.batch for part in parts]
        self.batch, self.counts = sum(self.sizes), Counts()
        self.provides = frozenset.intersection(*(part.provides for part in parts)) - {"svd", "gaussian"}
        self.event_shape, self.dtype, self.device = parts[0].event_shape, parts[0].dtype, parts[0].device
        self.sigma = torch.cat([noise_level(part) for part in parts])

    def log_prob(self, x: Tensor) -> Tensor:
        """See `Likelihood`."""
        return self._each(lambda part, x: part.log_prob(x), x)

    def prox(self, z: Tensor, rho: Tensor | float) -> Tensor:
        """See `Likelihood`."""
        return self._each(lambda part, z, rho: part.prox(z, rho), z, self._per_item(rho))

    def draw(self, z: Tensor, rho: Tensor | float, noise: Noise) -> Tensor:
        """See `Likelihood`; every item draws from its own stream."""
        firsts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        streams = iter([noise.part(range(a, a + n)) for a, n in zip(firsts, self.sizes, strict=True)])
        return self._each(lambda part, z, rho: part.draw(z, rho, next(streams)), z, self._per_item(rho))

    def start(self) -> Tensor:
        """See `Likelihood`."""
        return torch.cat([part.start() for part in self.parts])

    def expand(self, k: int) -> Together:
        """See `Likelihood`; sample k of all measurements comes before sample k + 1, as everywhere."""
        return Together(self.parts * k)

    def counted(self, counts: Counts) -> Together:
        """See `Likelihood`; the operator calls of all parts are added up."""
        twin = Together([part.counted(counts) for part in self.parts])
        twin.counts = counts
        return twin

    def _per_item(self, rho: Tensor | float) -> Tensor:
        return torch.as_tensor(rho, dtype=self.dtype, device=self.device).expand(self.batch)

    def _each(self, f: Callable[..., Tensor], *values: Tensor) -> Tensor:
        pieces = zip(self.parts, *(value.split(self.sizes) for value in values), strict=True)
        return torch.cat([f(part, *rest) for part, *rest in pieces])


def noise_level(likelihood: Likelihood) -> Tensor:
    """Return what a learned sampler is told of the noise, (B,), in units of x: sigma, or `UNKNOWN_NOISE` without one."""
    level = getattr(likelihood, "sigma", None)
    if isinstance(level, Tensor):
        return level.expand(likelihood.batch)
    return torch.full((likelihood.batch,), UNKNOWN_NOISE, dtype=likelihood.dtype, device=likelihood.device)
