r"""DAPS: decoupled annealing posterior sampling.

For falling noise ratios r: (1) x0 from x_t by a few Euler steps of the probability flow; (2) a draw from N(x; x0, r^2 I) p(y | x);
(3) fresh noise at the next ratio. Step (2) is the paper's Langevin chain (`inner="langevin"`), or its exact limit (`inner="draw"`).
Taking N(x0, r^2 I) for p(x_0 | x_t) over-disperses unmeasured directions (variance ratio 2.1 at unit prior variance; few Euler steps
shrink that by chance); with the exact law of x_0 given x_t and y (`inner="exact"`, for priors that can draw it) the sampler is
exact at any number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core.batch import like
from fewstep.core.checks import check_counts, check_not_negative, check_positive, check_rising, one_of
from fewstep.core.flow import flow_calls, probability_flow
from fewstep.core.grid import spaced
from fewstep.core.likelihood import JointLikelihood
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.reference import Reference
from fewstep.core.sampler import Sampler, State

Inner = Callable[["DAPS", Posterior, Tensor, int, Noise], Tensor]  # (method, problem, x_t / alpha_t, level, noise)


@dataclass(frozen=True)
class DAPS(Sampler):
    """Decoupled annealing posterior sampling.

    Args:
        steps: annealing levels.
        ode_steps: steps of the probability flow per level, from its ratio to a tenth of `ratio_min` and from there to 0.
        ode_order: 1 takes Euler steps, 2 Heun's, with a second network call in every step but the last.
        inner: how x_0 given (x_t, y) is drawn: "langevin", "draw" or "exact".
        langevin_steps: length of the inner chain.
        lr: its step at the first level; it falls linearly in the level's number to a hundredth of that.
        tau: noise level assumed for y by the inner chain; 0 takes the true one.
        ratio_max: first noise ratio, in units of x_0; not above the schedule's largest.
        ratio_min: last noise ratio.
    """

    steps: int = 200
    ode_steps: int = 5
    ode_order: int = 1
    inner: str = "langevin"
    langevin_steps: int = 100
    lr: float = 1e-4
    tau: float = 0.01
    ratio_max: float = 100.0
    ratio_min: float = 0.1

    needs: ClassVar = frozenset({"gaussian", "draw"})
    exact: ClassVar = "posterior"
    limit: ClassVar = "the posterior with inner='exact'; otherwise unmeasured directions are too wide (N(x0, r^2 I))"
    presets: ClassVar = {
        "paper": {},
        "consistent": {"inner": "draw", "tau": 0.0, "ode_steps": 3, "ode_order": 2, "ratio_min": 0.01},
        "exact": {"inner": "exact", "ratio_min": 0.01},
    }
    reference: ClassVar = Reference(
        "Improving Diffusion Inverse Problem Solving with Decoupled Noise Annealing",
        "Zhang, Bingliang and Chu, Wenda and Berner, Julius and Meng, Chenlin and Anandkumar, Anima and Song, Yang",
        2025,
        "Conference on Computer Vision and Pattern Recognition",
        "2407.01521",
    )

    def __post_init__(self) -> None:
        one_of("inner", self.inner, INNER)
        if self.ode_order not in (1, 2):
            raise ValueError(f"ode_order is 1 (Euler) or 2 (Heun), got {self.ode_order}")
        check_counts(self, "ode_steps", "langevin_steps")
        check_positive(self, "lr")
        check_not_negative(self, "tau")
        check_rising(self, "ratio_min", "ratio_max")

    @property
    def nfe(self) -> int:
        """See `Sampler`; the exact inner draw needs no network."""
        return self.steps * INNER_CALLS[self.inner](self)

    def init(self, problem: Posterior, noise: Noise) -> State:
        """See `Sampler`; noise at the first ratio, in units of x_0."""
        first = self.ratios(problem)[0].to(noise.dtype)
        return State(first * noise.randn(*problem.likelihood.event_shape))

    def step(self, problem: Posterior, state: State, k: int, noise: Noise) -> State:
        """See `Sampler`; the state is x_t / alpha_t, and x_0 itself after the last step."""
        x0 = INNER[self.inner](self, problem, state.x, k, noise)
        if k == self.steps - 1:
            return State(x0)
        return State(x0 + self.ratios(problem)[k + 1].to(x0) * noise.randn_like(x0))

    def ratios(self, problem: Posterior) -> Tensor:
        """Return the noise ratio of every level, (steps,), float64."""
        largest = problem.schedule.ratio(torch.ones((), dtype=torch.float64))
        return spaced(largest.clamp_max(self.ratio_max), torch.tensor(self.ratio_min, dtype=torch.float64), self.steps)

    def decode(self, problem: Posterior, z: Tensor, k: int) -> Tensor:
        """Return the probability-flow map of x_t = alpha z at level k, (N, *event)."""
        last = torch.tensor(self.ratio_min / 10, dtype=torch.float64)
        return probability_flow(problem, z, spaced(self.ratios(problem)[k], last, self.ode_steps), self.ode_order)


def _langevin(method: DAPS, problem: Posterior, z: Tensor, k: int, noise: Noise) -> Tensor:
    """Run the paper's unadjusted chain on |x - x0|^2 / (2 r^2) + |y - A x|^2 / (2 tau^2)."""
    likelihood, ratio = problem.gaussian, method.ratios(problem)[k]
    x = x0 = method.decode(problem, z, k)
    lr = method.lr * (1 - 0.99 * k / method.steps)
    variance = like(likelihood.sigma**2, x) if method.tau == 0 else method.tau**2
    for _ in range(method.langevin_steps):
        drift = (x0 - x) / ratio**2 + likelihood.A_adjoint(likelihood.residual(x)) / variance
        x = x + lr * drift + (2 * lr) ** 0.5 * noise.randn_like(x)
    return x


def _draw(method: DAPS, problem: Posterior, z: Tensor, k: int, noise: Noise) -> Tensor:
    """Draw exactly from N(x; x0, r^2 I) p(y | x)."""
    return problem.likelihood.draw(method.decode(problem, z, k), method.ratios(problem)[k], noise)


def _exact(method: DAPS, problem: Posterior, z: Tensor, k: int, noise: Noise) -> Tensor:
    """Draw exactly from p(x_0 | x_t, y), for priors that know it."""
    ratio = method.ratios(problem)[k]
    posterior = getattr(problem.prior, "posterior", None)
    if posterior is None:
        raise ValueError("inner='exact' needs a Gaussian or mixture prior; use inner='draw' with a network")
    return posterior(JointLikelihood(problem.likelihood, z, torch.ones_like(ratio), ratio)).draw(noise)


INNER: dict[str, Inner] = {"langevin": _langevin, "draw": _draw, "exact": _exact}
INNER_CALLS: dict[str, Callable[[DAPS], int]] = {
    "langevin": lambda method: flow_calls(method.ode_steps, method.ode_order),
    "draw": lambda method: flow_calls(method.ode_steps, method.ode_order),
    "exact": lambda method: 0,
}
