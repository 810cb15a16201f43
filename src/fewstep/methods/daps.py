r"""DAPS: decoupled annealing posterior sampling.

For falling noise ratios r: (1) x0 from x_t by the probability flow; (2) a draw from N(x; x0, r^2 I) p(y | x); (3) fresh noise at the
next ratio. Step (2) is the paper's Langevin chain (`inner="langevin"`), or its exact limit (`inner="draw"`). Taking N(x0, r^2 I) for
p(x_0 | x_t) over-disperses unmeasured directions (variance ratio 2.1 at unit prior variance); with the exact law of x_0 given x_t
and y (`inner="exact"`, for priors that can draw it) the sampler is exact at any number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewstep.core.batch import like
from fewstep.core.flow import flow_calls, probability_flow
from fewstep.core.likelihood import JointLikelihood
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.reference import Reference
from fewstep.core.sampler import Sampler, State

Inner = Callable[["DAPS", Posterior, Tensor, Tensor, Noise], Tensor]


@dataclass(frozen=True)
class DAPS(Sampler):
    """Decoupled annealing posterior sampling.

    Args:
        steps: annealing levels.
        ode_steps: Heun steps of the probability flow per level.
        inner: how x_0 given (x_t, y) is drawn: "langevin", "draw" or "exact".
        langevin_steps: length of the inner chain.
        lr: its step at the first level; it falls linearly to a hundredth of that.
        tau: noise level assumed for y by the inner chain; 0 takes the true one.
        ratio_max: first noise ratio, in units of x_0; not above the schedule's largest.
        ratio_min: last noise ratio.
    """

    steps: int = 200
    ode_steps: int = 3
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
        "consistent": {"inner": "draw", "tau": 0.0, "ratio_min": 0.01},
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
        if self.inner not in INNER:
            raise ValueError(f"unknown inner {self.inner!r}; choose one of {', '.join(INNER)}")

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
        ratios = self.ratios(problem)
        x0 = INNER[self.inner](self, problem, state.x, ratios[k], noise)
        if k == self.steps - 1:
            return State(x0)
        return State(x0 + ratios[k + 1].to(x0) * noise.randn_like(x0))

    def ratios(self, problem: Posterior, rho: float = 7.0) -> Tensor:
        """Return the noise ratio of every level, (steps,), float64."""
        largest = problem.schedule.ratio(torch.ones((), dtype=torch.float64))
        high, low = (r ** (1 / rho) for r in (largest.clamp_max(self.ratio_max), torch.tensor(self.ratio_min).double()))
        return (high + torch.linspace(0, 1, self.steps, dtype=torch.float64) * (low - high)) ** rho

    def decode(self, problem: Posterior, z: Tensor, ratio: Tensor) -> Tensor:
        """Return the probability-flow map of x_t = alpha z, (N, *event)."""
        t = problem.schedule.time(ratio).clamp(0, 1)
        return probability_flow(problem, like(problem.schedule(t)[0], z) * z, t, self.ode_steps)


def _langevin(method: DAPS, problem: Posterior, z: Tensor, ratio: Tensor, noise: Noise) -> Tensor:
    """Run the paper's unadjusted chain on |x - x0|^2 / (2 r^2) + |y - A x|^2 / (2 tau^2)."""
    likelihood = problem.gaussian
    x = x0 = method.decode(problem, z, ratio)
    share = float((ratio - method.ratio_min) / (method.ratio_max - method.ratio_min))
    lr = method.lr * (0.01 + 0.99 * min(max(share, 0.0), 1.0))
    variance = like(likelihood.sigma**2, x) if method.tau == 0 else method.tau**2
    for _ in range(method.langevin_steps):
        drift = (x0 - x) / ratio**2 + likelihood.A_adjoint(likelihood.residual(x)) / variance
        x = x + lr * drift + (2 * lr) ** 0.5 * noise.randn_like(x)
    return x


def _draw(method: DAPS, problem: Posterior, z: Tensor, ratio: Tensor, noise: Noise) -> Tensor:
    """Draw exactly from N(x; x0, r^2 I) p(y | x)."""
    return problem.likelihood.draw(method.decode(problem, z, ratio), ratio, noise)


def _exact(method: DAPS, problem: Posterior, z: Tensor, ratio: Tensor, noise: Noise) -> Tensor:
    """Draw exactly from p(x_0 | x_t, y), for priors that know it."""
    posterior = getattr(problem.prior, "posterior", None)
    if posterior is None:
        raise ValueError("inner='exact' needs a Gaussian or mixture prior; use inner='draw' with a network")
    return posterior(JointLikelihood(problem.likelihood, z, torch.ones_like(ratio), ratio)).draw(noise)


INNER: dict[str, Inner] = {"langevin": _langevin, "draw": _draw, "exact": _exact}
INNER_CALLS: dict[str, Callable[[DAPS], int]] = {
    "langevin": lambda method: flow_calls(method.ode_steps),
    "draw": lambda method: flow_calls(method.ode_steps),
    "exact": lambda method: 0,
}
