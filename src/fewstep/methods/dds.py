r"""DDS: decomposed diffusion sampler.

The denoised image is pulled to the data by M conjugate-gradient iterations on (I + gamma A'A) x = D + gamma A'y, started at D, and
re-noised with the *uncorrected* epsilon and share eta of fresh noise (fraction convention). gamma is a constant, not
1 / sigma_y^2: with more steps measured directions go to least squares. A reconstruction method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fewstep.core.checks import check_counts, check_positive, check_shares
from fewstep.core.kernel import epsilon_of, fraction_std, renoise
from fewstep.core.linalg import cg
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.reference import Reference
from fewstep.core.sampler import DiffusionSampler, State


@dataclass(frozen=True)
class DDS(DiffusionSampler):
    """Decomposed diffusion sampler.

    Args:
        steps: network calls.
        gamma: weight of the data term.
        iterations: conjugate-gradient iterations per step (M in the paper).
        eta: share of fresh noise, fraction convention.
        grid: spacing of the times.
    """

    steps: int = 49
    gamma: float = 1.0
    iterations: int = 5
    eta: float = 0.85
    grid: str | tuple[float, ...] = "uniform"

    needs: ClassVar = frozenset({"gaussian"})
    exact: ClassVar = "biased"
    limit: ClassVar = "least squares in measured directions as steps grow (gamma does not know sigma_y)"
    reference: ClassVar = Reference(
        "Decomposed Diffusion Sampler for Accelerating Large-Scale Inverse Problems",
        "Chung, Hyungjin and Lee, Suhyeon and Ye, Jong Chul",
        2024,
        "International Conference on Learning Representations",
        "2303.05754",
    )

    def __post_init__(self) -> None:
        check_shares(self, "eta")
        check_positive(self, "gamma")
        check_counts(self, "iterations")

    def step(self, problem: Posterior, state: State, k: int, noise: Noise) -> State:
        """See `Sampler`."""
        t, s = self.interval(problem, k)
        denoised = problem.denoise(state.x, t)
        x0 = self.pull(problem, denoised)
        if k == self.steps - 1:
            return State(x0)
        epsilon = epsilon_of(problem.schedule, t, state.x, denoised)
        std = fraction_std(problem.schedule, s, self.eta)
        return State(renoise(problem.schedule, s, x0, epsilon, std, noise))

    def pull(self, problem: Posterior, x0: Tensor) -> Tensor:
        """Return x0 after `iterations` of conjugate gradients on the data term, (N, *event)."""
        likelihood = problem.gaussian
        right = x0 + self.gamma * likelihood.A_adjoint(likelihood.y)
        return cg(lambda x: x + self.gamma * likelihood.normal(x), right, x0, tol=1e-10, max_iter=self.iterations).x
