"""`fewstep bench mixture`: mode weights, moments and transport distance on mixtures, which a Gaussian problem cannot see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from fewstep.bench.common import FAILURES, Report, Variant, costs, describe, failed, variants
from fewstep.bench.gaussian import oracles
from fewstep.metrics import sliced_wasserstein
from fewstep.priors.exact import ExactPosterior
from fewstep.testing.problems import ExactProblem, bimodal_problem, mixture_problem

FLOORS = 8  # pairs of exact samples whose mean distance is the Monte-Carlo floor
NOTES = (
    "bimodal: .3 N(-1, .09) + .7 N(1, .09) seen with sigma 0.5 at y = -0.2; 'P(x>0)' is the weight of the right mode.",
    "mixture: four Gaussians in 8 dimensions through 1 measurement with sigma 1, posterior weights .19, .55, .06, .20; "
    "'mode weights' is the largest error of a mode weight, each sample being shared out by its exact responsibilities.",
    "SW/floor: sliced 2-Wasserstein distance to exact samples over that between two sets of exact samples of the same size.",
    "mean error: in posterior standard deviations (largest over coordinates); sd ratio: to the exact one, smallest and "
    "largest over coordinates. ± columns are one standard error at this number of samples.",
    "oracle rows: DDIM on the exact E[x0 | x_t, y], and the exact draw of p(x0 | x_t, y).",
)


def main(
    out: str | Path | None = None,
    *,
    methods: Sequence[str] | None = None,
    steps: Sequence[int] | None = None,
    num_samples: int = 4000,
    seed: int = 0,
) -> Report:
    """Measure all methods on two mixtures, print the tables, write the JSON report to `out` where given, and return it.

    Args:
        out: path of the JSON file.
        methods: names of methods, all where absent.
        steps: NFE budgets; each preset as published where absent.
        num_samples: K.
        seed: of the samples.
    """
    tables: dict[str, list[dict[str, Any]]] = {}
    for title, exact in problems().items():
        floor = transport_floor(exact.posterior, num_samples)
        tables[title] = [reference_row(exact.posterior)]
        for variant in track([*variants(methods, steps), *oracles(steps)], title, transient=True):
            tables[title].append(measure(variant, exact, num_samples, seed, floor))
    given = {"methods": methods, "steps": steps, "num_samples": num_samples, "seed": seed}
    return Report("mixture", given, tables, NOTES).finish(out)


def problems() -> dict[str, ExactProblem]:
    """Return the problems by title; of the larger one only one direction is measured, so that all its modes stay alive."""
    return {"Bimodal, 1 dimension": bimodal_problem(), "Mixture, 8 dimensions": mixture_problem(rank=1, sigma=1.0)}


def reference_row(posterior: ExactPosterior) -> dict[str, Any]:
    """Return the first row: what is exact."""
    row: dict[str, Any] = {"method": "exact posterior", "preset": "", "steps": None}
    if posterior.means.shape[-1] > 1:
        return row | {"mode weights": 0.0, "mode weights ±": 0.0}
    return row | {
        "P(x>0)": right_mode_weight(posterior),
        "P(x>0) ±": 0.0,
        "mean": float(posterior.mean),
        "sd": float(posterior.cov.sqrt()),
    }


def measure(variant: Variant, exact: ExactProblem, num_samples: int, seed: int, floor: float) -> dict[str, Any]:
    """Return the row of one variant."""
    row = describe(variant)
    try:
        samples = variant.sampler(exact.problem, num_samples, seed=seed)
    except FAILURES as error:
        return row | {"remark": failed(error)}
    x = samples.x.flatten(1)
    weights = bimodal_columns(x) if x.shape[1] == 1 else weight_columns(x, exact.posterior)
    return row | weights | moment_columns(x, exact.posterior) | _transport(x, exact.posterior, floor) | costs(samples)


def bimodal_columns(x: Tensor) -> dict[str, float]:
    """Return P(x > 0) with its standard error, mean and standard deviation of samples in one dimension, (K, 1)."""
    p = float((x > 0).double().mean())
    error = math.sqrt(max(p * (1 - p), 1 / len(x)) / len(x))  # at p = 0 the rule of one in K
    return {"P(x>0)": p, "P(x>0) ±": error, "mean": float(x.mean()), "sd": float(x.std())}


def weight_columns(x: Tensor, posterior: ExactPosterior) -> dict[str, float]:
    """Return the largest error of a posterior mode weight over the samples, (K, D), and its standard error."""
    shares = responsibilities(x, posterior)
    gap = (shares.mean(0) - posterior.weights[0]).abs()
    worst = int(gap.argmax())
    return {"mode weights": float(gap[worst]), "mode weights ±": float(shares[:, worst].std() / len(x) ** 0.5)}


def responsibilities(x: Tensor, posterior: ExactPosterior) -> Tensor:
    """Return p(component | x) under the exact posterior of the first measurement, (K, D) -> (K, M)."""
    parts = zip(posterior.means[0], posterior.covs[0], strict=True)
    logs = [torch.distributions.MultivariateNormal(mean, cov).log_prob(x) for mean, cov in parts]
    return (torch.stack(logs, 1) + posterior.weights[0].log()).softmax(1)


def moment_columns(x: Tensor, posterior: ExactPosterior) -> dict[str, float]:
    """Return mean error and ratios of standard deviations, coordinate by coordinate."""
    sd = posterior.cov[0].diagonal().sqrt()
    ratio = x.std(0) / sd
    return {
        "mean error": float(((x.mean(0) - posterior.mean.flatten()) / sd).abs().max()),
        "mean ±": len(x) ** -0.5,
        "sd ratio min": float(ratio.min()),
        "sd ratio max": float(ratio.max()),
    }


def right_mode_weight(posterior: ExactPosterior) -> float:
    """Return P(x > 0 | y) in one dimension."""
    z = posterior.means[0, :, 0] / posterior.covs[0, :, 0, 0].sqrt()
    return float((posterior.weights[0] * torch.special.ndtr(z)).sum())


def transport_floor(posterior: ExactPosterior, num_samples: int) -> float:
    """Return the mean distance between two exact samples of this size."""
    draws = [posterior.sample(num_samples, seed=1000 + i).flatten(1) for i in range(2 * FLOORS)]
    pairs = zip(draws[::2], draws[1::2], strict=True)
    return sum(sliced_wasserstein(a, b) for a, b in pairs) / FLOORS


def _transport(x: Tensor, posterior: ExactPosterior, floor: float) -> dict[str, float]:
    exact = posterior.sample(len(x), seed=999).flatten(1)
    return {"SW/floor": sliced_wasserstein(x, exact) / floor}
