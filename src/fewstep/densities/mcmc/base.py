"""What the non-neural samplers have in common: whitened coordinates, a budget that is counted, and `Draws` as the answer."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple, Protocol, final

import torch
from torch import Tensor

from fewstep.core.density import TargetDensity
from fewstep.core.noise import Noise
from fewstep.densities.draws import Draws, Kind
from fewstep.densities.mcmc.bridge import Bridge, StandardNormal, State
from fewstep.densities.whitened import Whitened


class Found(NamedTuple):
    """What a run gives: y, (n, d) whitened; log-weights, (n,) float64, or None; their kind; how many rows hang together."""

    y: Tensor
    log_weights: Tensor | None
    kind: Kind | None
    group: int


class Kernel(Protocol):
    """A Markov step that leaves pi_beta invariant, for a batch of points at once; its sizes are adapted to an acceptance.

    Attributes:
        gradients: whether it looks at the scores of its points.
    """

    gradients: ClassVar[bool]

    def step(self, bridge: Bridge, state: State, beta: Tensor, size: Tensor, noise: Noise) -> tuple[State, Tensor]:
        """Return the next points and the probabilities with which they were accepted, (N,); see `Hamiltonian.step`."""

    def adapted(self, size: Tensor, accept: Tensor, count: int) -> Tensor:
        """Return the step sizes after adaptation number `count`, from 0."""


class MonteCarlo(ABC):
    """A sampler of an unnormalised density that trains nothing: it adapts during warm-up and keeps its settings after.

    Attributes:
        kernel: its Markov step.
    """

    kernel: Kernel

    @abstractmethod
    def run(self, bridge: Bridge, n: int, seed: int, dtype: torch.dtype) -> Found:
        """Return n draws; see `sample`."""

    @final
    @torch.no_grad()
    def sample(
        self,
        target: TargetDensity,
        n: int,
        *,
        seed: int = 0,
        base: TargetDensity | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Draws:
        """Return n draws of `target`; calls are counted with those of the warm-up, per draw.

        Args:
            target: the density; of a `Whitened` one the draws are those of the target inside.
            n: how many, a multiple of the number of chains or of the particles of a run.
            seed: one integer.
            base: where the path to the target starts, normalised and with an exact sampler, in the whitened coordinates;
                N(0, I) where absent.
            dtype: of the points; log-weights are float64 always.

        Raises:
            ValueError: an n that does not fit.
        """
        begin, whitened = time.perf_counter(), target if isinstance(target, Whitened) else Whitened(target)
        bridge = Bridge(base or StandardNormal(target.dim), whitened, self.kernel.gradients)
        found = self.run(bridge, n, seed, dtype)
        return Draws(
            x=whitened.to_x(found.y),
            log_weights=found.log_weights,
            kind=found.kind,
            target_calls=bridge.target_calls / n,
            gradient_calls=bridge.gradient_calls / n,
            seconds=time.perf_counter() - begin,
            seed=seed,
            group=found.group,
        )


def groups_of(n: int, size: int, what: str) -> int:
    """Return n / size, or raise ValueError where it is no positive integer."""
    if n < 1 or n % size:
        raise ValueError(f"n must be a positive multiple of the {size} {what}, got {n}")
    return n // size
