"""Any guided sampler under any solver: the guided prediction of x_0 is one more denoiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from fewstep.core.multistep import Solver
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.reference import Reference
from fewstep.core.registry import available, get
from fewstep.core.sampler import DiffusionSampler, GuidedSampler, Sampler, State


@final
@dataclass(frozen=True)
class Driven(DiffusionSampler):
    """The prediction of a guided sampler under the steps, the grid and the kernel of a solver.

    Converges to what the guided sampler does with many steps; `steps`, `grid` and `eta` of the guided sampler play no part.

    Args:
        guided: what predicts x_0 from (y, x_t).
        solver: what steps.

    Raises:
        ValueError: the method makes no prediction, or one that is no smooth function of (x_t, t), so that there is nothing for a
            solver to integrate, or the solver is made for the prior alone.
    """

    guided: GuidedSampler
    solver: Solver

    exact: ClassVar = "biased"
    limit: ClassVar = "what the guided sampler converges to"

    def __post_init__(self) -> None:
        if reason := undriven(type(self.guided)):
            fits = [name for name in available() if not undriven(get(name))]
            name = type(self.guided).__name__
            raise ValueError(
                f"{name} {reason}; run it as it is, or take one that a solver can drive: {', '.join(fits)}"
            )
        if self.solver.undriven:
            raise ValueError(f"{type(self.solver).__name__} {self.solver.undriven}; take another solver")

    @property
    def steps(self) -> int:  # type: ignore[override]
        """Length of the loop: the solver's."""
        return self.solver.steps

    @property
    def grid(self) -> str | tuple[float, ...]:  # type: ignore[override]
        """The time grid: the solver's."""
        return self.solver.grid

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """What the guided sampler needs."""
        return self.guided.needs

    @property
    def reference(self) -> Reference:  # type: ignore[override]
        """The publication of the guided sampler; `solver.reference` is the other."""
        return self.guided.reference

    @property
    def nfe_varies(self) -> bool:  # type: ignore[override]
        """Whether items may need different numbers of calls: the solver's."""
        return self.solver.nfe_varies

    @property
    def nfe(self) -> int:
        """See `Sampler`; predictions of the solver times network calls of each."""
        return self.solver.nfe * (self.guided.nfe // self.guided.steps)

    def step(self, problem: Posterior, state: State, k: int, noise: Noise) -> State:
        """See `Sampler`."""
        return self.solver.advance(problem, state, k, noise, self.guided.predict_x0)


def undriven(method: type[Sampler]) -> str:
    """Return why no solver can drive a method, empty where one can."""
    if not issubclass(method, GuidedSampler):
        return "steps in a way of its own, and makes no prediction of x_0 that a solver could step with"
    if method.prediction != "mean":
        return "draws x_0 afresh at every step, and a solver would integrate the noise"
    if method.estimate is not GuidedSampler.estimate:
        return "also uses its previous prediction, which a solver does not keep for it"
    return ""
