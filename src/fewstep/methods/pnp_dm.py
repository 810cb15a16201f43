r"""PnP-DM: split Gibbs sampling with a diffusion prior.

With a coupling N(x; z, rho^2 I) the two conditionals are sampled in turn, while rho falls to `rho_min`:

    z ~ p(y | z) N(z; x, rho^2 I)     exactly, by the likelihood
    x ~ p(x) N(x; z, rho^2 I)         i.e. x_0 given x_t at noise ratio rho, by ancestral steps of the diffusion

The stationary law of x is the posterior under the inflated noise sigma_y^2 I + rho^2 A A': exact as rho -> 0, very wide at the
published rho_min where that exceeds sigma_y.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fewstep.core.batch import like
from fewstep.core.checks import check_counts, check_positive
from fewstep.core.flow import reverse_draw
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.reference import Reference
from fewstep.core.sampler import Sampler, State


@dataclass(frozen=True)
class PnPDM(Sampler):
    """Plug-and-play diffusion models: principled probabilistic imaging by split Gibbs.

    Args:
        steps: Gibbs iterations.
        rho_max: first coupling, in units of x_0; not above the schedule's largest ratio.
        decay: factor by which it falls at every iteration.
        rho_min: where it stops.
        inner_steps: network calls of one draw from the prior's conditional.
    """

    steps: int = 100
    rho_max: float = 10.0
    decay: float = 0.9
    rho_min: float = 0.3
    inner_steps: int = 20

    needs: ClassVar = frozenset({"draw"})
    exact: ClassVar = "posterior"
    limit: ClassVar = "the posterior as rho_min -> 0, with more steps and inner_steps; too wide where rho_min > sigma_y"
    presets: ClassVar = {
        "paper": {},
        "consistent": {"rho_min": 0.03, "decay": 0.97, "steps": 250, "inner_steps": 80},
    }
    reference: ClassVar = Reference(
        "Principled Probabilistic Imaging using Diffusion Models as Plug-and-Play Priors",
        "Wu, Zihui and Sun, Yu and Chen, Yifan and Zhang, Bingliang and Yue, Yisong and Bouman, Katherine L.",
        2024,
        "Advances in Neural Information Processing Systems",
        "2405.18782",
    )

    def __post_init__(self) -> None:
        check_positive(self, "rho_min")
        check_counts(self, "inner_steps")
        if not self.rho_max > 0:  # infinity stands for the schedule's largest
            raise ValueError(f"rho_max must be positive, got {self.rho_max}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must lie in (0, 1], got {self.decay}")

    @property
    def nfe(self) -> int:
        """See `Sampler`."""
        return self.steps * self.inner_steps

    def init(self, problem: Posterior, noise: Noise) -> State:
        """See `Sampler`; the pseudo-inverse of y."""
        return State(problem.likelihood.start())

    def step(self, problem: Posterior, state: State, k: int, noise: Noise) -> State:
        """See `Sampler`."""
        schedule = problem.schedule
        largest = float(schedule.ratio(torch.ones((), dtype=torch.float64)))
        rho = torch.tensor(max(min(self.rho_max, largest) * self.decay**k, self.rho_min), dtype=torch.float64)
        z = problem.likelihood.draw(state.x, rho, noise)
        t = schedule.time(rho).clamp(0, 1)
        return State(reverse_draw(problem, like(schedule(t)[0], z) * z, t, self.inner_steps, noise))
