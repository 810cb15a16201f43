"""`fewstep bench gaussian`: every method against the exact posterior of a Gaussian problem with a null space.

The law of a method that is affine in its noise is computed exactly, by propagating mean and covariance through the very steps
that ship; of the others it is estimated from samples, and the row says so.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from fewstep.bench.common import FAILURES, Report, Variant, costs, describe, failed, variants
from fewstep.core.problem import Posterior
from fewstep.core.sampler import Sampler
from fewstep.testing.law import GaussianLaw, affine_error, distance
from fewstep.testing.oracle import ExactDraw, ExactMean
from fewstep.testing.problems import ExactProblem, gaussian_problem, scalar_problem
from fewstep.testing.propagate import finite_step_law

AFFINE = 1e-6  # relative defect below which a method counts as affine in its noise
ORACLE_STEPS = (1, 2, 4, 8, 16, 64)
# prior variance, gain and noise level of the reference columns
MODES = ((1.0, 1.0, 0.05), (1.0, 0.1, 0.05), (1.0, 0.0, 0.05), (0.04, 1.0, 0.05), (0.04, 1.0, 0.2))
NOTES = (
    "mean error: largest over the principal directions of the posterior, in its standard deviations; variance ratios: to the exact "
    "posterior variance, smallest and largest over directions, and averaged over the measured directions and over the null space.",
    "law: 'exact' is computed by propagating mean and covariance through the sampler's own steps and carries no Monte-Carlo "
    "error; 'K samples' is estimated, one standard error being mean ± and ratio ±.",
    "oracle rows: DDIM on the exact E[x0 | x_t, y] (the error of few steps alone) and the exact draw of p(x0 | x_t, y).",
    "seconds: for `timed samples` samples of the 5-dimensional problem, on this machine; nfe, vjps and operator calls are "
    "per sample.",
    "scalar modes: signed mean error in posterior standard deviations / variance ratio, prior N(0.3, s2), "
    "y = gain (mean + 1.2 sd).",
)


class Estimate(NamedTuple):
    """A law and how it was found; `samples` is 0 where it is exact."""

    law: GaussianLaw
    samples: int


def main(
    out: str | Path | None = None,
    *,
    methods: Sequence[str] | None = None,
    steps: Sequence[int] | None = None,
    num_samples: int = 2000,
    timed: int = 64,
    seed: int = 0,
) -> Report:
    """Measure all methods, print the tables, write the JSON report to `out` where given, and return it.

    Args:
        out: path of the JSON file.
        methods: names of methods, all where absent.
        steps: NFE budgets; each preset as published where absent.
        num_samples: samples for the law of a method that is not affine in its noise.
        timed: samples of the timed run.
        seed: of the samples.
    """
    problem = gaussian_problem()
    rows, modes = [], []
    for variant in track([*variants(methods, steps), *oracles(steps)], "gaussian", transient=True):
        rows.append(measure(variant, problem, num_samples, timed, seed))
        # who is affine there is affine here: the check is not repeated
        modes.append(scalar_row(variant, num_samples, seed, affine=rows[-1].get("law") == "exact"))
    given = {"methods": methods, "steps": steps, "num_samples": num_samples, "timed samples": timed, "seed": seed}
    title = "Gaussian problem, 5 dimensions, rank 3, sigma 0.2"
    return Report("gaussian", given, {title: rows, "Scalar modes": modes}, NOTES).finish(out)


def oracles(budgets: Sequence[int] | None = None) -> list[Variant]:
    """Return the oracle rows: the exact mean under DDIM and ancestral steps, and the exact draw."""
    rows = []
    for n in budgets or ORACLE_STEPS:
        rows += [Variant("oracle mean", f"eta={eta:g}", ExactMean(steps=n, eta=eta)) for eta in (0.0, 1.0)]
    return [*rows, *(Variant("oracle draw", "", ExactDraw(steps=n)) for n in budgets or (1, 10))]


def measure(variant: Variant, exact: ExactProblem, num_samples: int, timed: int, seed: int) -> dict[str, Any]:
    """Return the row of one variant: distances to the posterior and costs."""
    row = describe(variant)
    try:
        found = estimate(variant.sampler, exact.problem, num_samples, seed)
        row |= distances(found, exact) | costs(variant.sampler(exact.problem, timed, seed=seed))
    except FAILURES as error:
        row["remark"] = failed(error)
    return row


def estimate(sampler: Sampler, problem: Posterior, num_samples: int, seed: int, affine: bool | None = None) -> Estimate:
    """Return the law of the sampler, exact where it is affine in its noise (found out where not told), else from samples."""
    if is_affine(sampler, problem) if affine is None else affine:
        with contextlib.suppress(TypeError):  # it carries more than numbers from step to step
            return Estimate(finite_step_law(sampler, problem), 0)
    x = sampler(problem, num_samples, seed=seed).x.flatten(1)
    return Estimate(GaussianLaw(x.mean(0), torch.atleast_2d(torch.cov(x.T))), num_samples)


def is_affine(sampler: Sampler, problem: Posterior) -> bool:
    """Return whether the sampler is affine in its noise on this problem, hence has a Gaussian law."""
    try:
        return affine_error(sampler, problem) < AFFINE
    except TypeError:  # it draws uniform numbers
        return False


def distances(found: Estimate, exact: ExactProblem) -> dict[str, Any]:
    """Return the columns that compare a law with the posterior."""
    near = distance(found.law, exact.posterior)
    observed, null = subspaces(exact.problem)
    k = found.samples
    ratio = _ratio_in(found.law.cov, exact.posterior.cov[0])
    return {
        "law": f"{k} samples" if k else "exact",
        "mean error": near.mean_error,
        "mean ±": k**-0.5 if k else None,
        "variance ratio min": near.low,
        "variance ratio max": near.high,
        "measured": ratio(observed),
        "null space": ratio(null),
        "ratio ±": (2 / k) ** 0.5 if k else None,
    }


def subspaces(problem: Posterior) -> tuple[Tensor, Tensor]:
    """Return orthonormal bases of the measured directions and of the null space, (D, R) and (D, D - R)."""
    matrix = problem.likelihood.physics.matrix  # type: ignore[attr-defined]
    _, values, right = torch.linalg.svd(matrix, full_matrices=True)
    rank = int((values > 1e-9 * values.max()).sum())
    return right[:rank].T, right[rank:].T


def _ratio_in(cov: Tensor, truth: Tensor) -> Callable[[Tensor], float]:
    return lambda basis: float(torch.trace(basis.T @ cov @ basis) / torch.trace(basis.T @ truth @ basis))


def scalar_row(variant: Variant, num_samples: int, seed: int, affine: bool | None = None) -> dict[str, Any]:
    """Return signed mean error / variance ratio on each of the scalar reference problems."""
    row = describe(variant)
    for variance, gain, sigma in MODES:
        exact = scalar_problem(variance, gain, sigma)
        row[f"s2={variance:g} a={gain:g} sy={sigma:g}"] = _scalar_cell(
            variant.sampler, exact, num_samples, seed, affine
        )
    return row


def _scalar_cell(sampler: Sampler, exact: ExactProblem, num_samples: int, seed: int, affine: bool | None) -> str:
    try:
        law = estimate(sampler, exact.problem, num_samples, seed, affine).law
    except FAILURES as error:
        return failed(error)
    variance = float(exact.posterior.cov)
    mean, ratio = float(law.mean - exact.posterior.mean) / math.sqrt(variance), float(law.cov) / variance
    return f"{mean:+.2f}/{ratio:.2f}" if math.isfinite(mean) and math.isfinite(ratio) else "diverges"
