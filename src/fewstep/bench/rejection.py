"""A model with the right modes and the wrong weights, and its data: what DiffRS makes of the one given the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fewstep.core.likelihood import FlatLikelihood, JointLikelihood
from fewstep.core.multistep import Predict, prior_mean
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.priors.exact import MixturePrior
from fewstep.solvers.diffrs import Bounds, DiffRS, bounds_of

DATA, MODEL = 0.3, 0.6  # weight of the left mode
QUANTILES = (0.5, 0.75, 0.9)  # the paper takes 0.75
WARM_UP = 2000  # samples whose ratios give the quantiles
NOTES = (
    "DiffRS: data .3 N(-1, .09) + .7 N(1, .09), model the same with weights .6 and .4, exact ratio; 'left' is the weight of the "
    "left mode in the samples, .3 where the rule is right, ± one standard error. nfe and proposals: means. redraw, fresh and "
    "restart have the true bound 7/4 of the ratio, backstep quantiles of a run of the model.",
    "exact step: x_0 drawn exactly from the model's p(x_0 | x_t), so that all the error is the rule's; DDIM: ancestral steps, "
    "whose own error comes on top.",
)


def mixture(left: float) -> MixturePrior:
    """Return left N(-1, .09) + (1 - left) N(1, .09)."""
    weights, means = torch.tensor([left, 1 - left]).double(), torch.tensor([[-1.0], [1.0]]).double()
    return MixturePrior(weights, means, torch.tensor([0.09, 0.09]).double())


def log_ratio(x_t: Tensor, t: Tensor) -> Tensor:
    """Return log of data over model at each point, (N,)."""
    return mixture(DATA).log_prob(x_t, t) - mixture(MODEL).log_prob(x_t, t)


def true_bounds(steps: int) -> Bounds:
    """Return what the ratio and its growth do not exceed."""
    high, low = math.log((1 - DATA) / (1 - MODEL)), math.log(DATA / MODEL)
    return Bounds((high,) * (steps + 1), (high - low,) * (steps + 1))


def model_problem(batch: int = 1) -> Posterior:
    """Return the problem of drawing from the model."""
    return Posterior(mixture(MODEL), FlatLikelihood((1,), batch, torch.float64))


def exact_draw(problem: Posterior, x_t: Tensor, t: Tensor, noise: Noise) -> Tensor:
    """Return a draw of the model's p(x_0 | x_t), (N, 1), for a prediction: the step that follows is then exact."""
    problem.counts.network += 1
    alpha, sigma = (c.expand(len(x_t)) for c in problem.schedule(t))
    joint = JointLikelihood(FlatLikelihood((1,), len(x_t), x_t.dtype), x_t, alpha, sigma)
    return problem.prior.posterior(joint).draw(noise)  # type: ignore[operator]


def rows(num_samples: int, steps: Sequence[int], seed: int = 0) -> list[dict[str, Any]]:
    """Return the rows of the table: every rule at few exact steps, and at each number of DDIM's."""
    first = steps[0]
    kinds = [("exact step", first, exact_draw, "fresh"), *(("DDIM", n, prior_mean, "redraw") for n in steps)]
    return [row for kind in kinds for row in _rules(*kind, num_samples=num_samples, seed=seed)]


def _rules(name: str, steps: int, predict: Predict, exact: str, *, num_samples: int, seed: int) -> list[dict[str, Any]]:
    plain = DiffRS(steps, grid="log_snr")
    tried = [("none", plain)]
    tried += [(rule, rejecting(plain, rule, true_bounds(steps))) for rule in (exact, "restart")]
    for share in QUANTILES:
        bounds = bounds_of(
            plain, model_problem(WARM_UP), log_ratio, Noise(range(10**6, 10**6 + WARM_UP), torch.float64), share
        )
        tried.append((f"backstep, quantile {share:g}", rejecting(plain, "backstep", bounds)))
    return [
        {"rule": rule, "step": name, "steps": steps} | mode_mass(solver, predict, num_samples, seed)
        for rule, solver in tried
    ]


def rejecting(solver: DiffRS, rule: str, bounds: Bounds) -> DiffRS:
    """Return the solver with a rule and the exact ratio."""
    return replace(solver, rule=rule, ratio=log_ratio, bounds=bounds)


@torch.no_grad()
def mode_mass(solver: DiffRS, predict: Predict, num_samples: int, seed: int = 0) -> dict[str, Any]:
    """Return the weight of the left mode in samples with any prediction, and what they cost."""
    problem = model_problem().expand(num_samples)
    noise = Noise.spawn([seed], range(num_samples), torch.float64)
    state = solver.init(problem, noise)
    for k in range(solver.steps):
        state = solver.advance(problem, state, k, noise, predict)
    left = float((state.x < 0).double().mean())
    made = solver.steps if solver.ratio is None else float(state.memory[2].double().mean())
    error = math.sqrt(left * (1 - left) / num_samples)
    return {"left": left, "left ±": error, "nfe": problem.counts.network, "proposals": made}
