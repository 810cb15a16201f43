"""Outer steps around an unfolded network: N of them make a sampler of p(x | y) at K N network calls."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from fewstep.core.checks import one_of
from fewstep.core.kernel import KERNELS
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.reference import Reference
from fewstep.core.sampler import GuidedSampler, State
from fewstep.core.schedule import Schedule
from fewstep.unfolded.decoders import AdaptedDecoder
from fewstep.unfolded.network import UnfoldedNetwork

UD2M_REFERENCE = Reference(
    "Learning few-step posterior samplers by unfolding and distillation of diffusion models",
    "Kemajou Mbakam, Charlesquin and Spence, Jonathan and Pereyra, Marcelo",
    2025,
    "Transactions on Machine Learning Research",
    "2507.02686",
)


class UnfoldedSampler(GuidedSampler):
    """A guided sampler whose prediction is one run of an unfolded network.

    Attributes:
        kernel: name of the step from t to s, one of `KERNELS`.
    """

    kernel: str

    needs: ClassVar = frozenset({"prox"})
    prediction: ClassVar = "draw"
    reference: ClassVar = UD2M_REFERENCE

    @abstractmethod
    def unfolded(self) -> UnfoldedNetwork:
        """Return the network."""

    @property
    @abstractmethod
    def folder(self) -> Path | None:
        """Where the trained network lies; None for one in memory or untrained."""

    @property
    def nfe(self) -> int:
        """See `Sampler`; K calls per outer step, and those of the start."""
        return self.steps * self.unfolded().calls

    def refusal(self, problem: Posterior) -> str:
        """See `Sampler`; a trained network has a denoiser of its own, which has to fit the images."""
        decoder, channels = self.unfolded().decoder, problem.likelihood.event_shape[0]
        if isinstance(decoder, AdaptedDecoder) and decoder.denoiser.event_shape[0] != channels:
            return f"the network was trained on images of {decoder.denoiser.event_shape[0]} channels, not of {channels}"
        return super().refusal(problem)

    def predict_x0(self, problem: Posterior, x_t: Tensor, t: Tensor, noise: Noise) -> Tensor:
        """See `GuidedSampler`."""
        return self.unfolded().to(x_t.device)(problem, x_t, t, noise)

    def estimate(self, problem: Posterior, state: State, t: Tensor, noise: Noise) -> Tensor:
        """See `GuidedSampler`; the network may start from the previous estimate."""
        return self.unfolded().to(state.x.device)(problem, state.x, t, noise, state.memory)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("kernel", self.kernel, KERNELS)

    def shares(self, schedule: Schedule, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """See `GuidedSampler`."""
        return KERNELS[self.kernel](schedule, t, s, self.eta)


@dataclass(frozen=True)
class Unfolded(UnfoldedSampler):
    """A sampler of a network in memory, trained or not.

    Args:
        network: the network.
        steps: outer steps N.
        eta: share of fresh noise; 1 is ancestral, which an exact draw of p(x_0 | y, x_t) asks for.
        kernel: "bridge", or "one_step" as in the paper's code.
        grid: spacing of the times.
        folder: where the weights were read from, and where calibrations of them lie; None where they were not.
        facts: what the header there says of their training, and their SHA-256 in half precision as a whole network.
    """

    network: UnfoldedNetwork = field(repr=False)
    steps: int = 3
    eta: float = 1.0
    kernel: str = "bridge"
    grid: str | tuple[float, ...] = "quadratic"
    folder: Path | None = None
    facts: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    exact: ClassVar = "biased"
    limit: ClassVar = "what the network was trained to; exact at any number of steps if it draws from p(x_0 | y, x_t)"

    def unfolded(self) -> UnfoldedNetwork:
        """See `UnfoldedSampler`."""
        return self.network


def outer_steps(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of outer steps that a recipe or a header gives, as `Unfolded` takes them; ValueError for others."""
    if unknown := set(given) - {"eta", "kernel", "grid"}:
        raise ValueError(f"outer steps have eta, kernel and grid, not {', '.join(sorted(unknown))}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
