"""`fewstep bench solvers`: solvers at 5 to 20 network calls on mixtures, under a guided sampler, and DiffRS by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from fewstep.bench import gaussian, mixture, rejection
from fewstep.bench.common import FAILURES, Report, Variant, failed, variants
from fewstep.core.driven import Driven
from fewstep.core.likelihood import FlatLikelihood
from fewstep.core.multistep import Solver
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.registry import available, get
from fewstep.core.sampler import Sampler, State
from fewstep.methods.mmps import MMPS
from fewstep.metrics import sliced_wasserstein
from fewstep.priors.exact import MixturePrior
from fewstep.testing.problems import gaussian_problem, mixture_problem

GUIDED = MMPS(iterations=5)
FLOW_STEPS = 150  # of Runge-Kutta's fourth order
NOTES = (
    "error: root mean square, over samples and coordinates, of the distance to the exact probability flow from the same noise, in "
    "units of the prior's standard deviation; empty where the solver draws fresh noise. Columns are budgets of network calls, "
    "each solver with as many of its steps as fit and on its own grid; empty where not one fits.",
    "SW/floor: sliced 2-Wasserstein distance to exact samples over that between two sets of exact samples of the same size.",
    "priors: four Gaussians, covariances between .02 and .7 along their axes.",
    "guidance: MMPS (5 conjugate-gradient iterations) under every solver, and by itself with eta = 0; columns as in the benchmarks "
    "'gaussian' and 'mixture'.",
    *rejection.NOTES,
)


def main(  # noqa: PLR0913 - one parameter is one option
    out: str | Path | None = None,
    *,
    solvers: Sequence[str] | None = None,
    budgets: Sequence[int] = (5, 8, 10, 15, 20),
    dims: Sequence[int] = (2, 64),
    num_samples: int = 1000,
    guided: int = 10,
    plain: int = 50,
    rejected: Sequence[int] = (10, 100),
    seed: int = 0,
) -> Report:
    """Measure all solvers, print the tables, write the JSON report to `out` where given, and return it.

    Args:
        out: path of the JSON file.
        solvers: names, all that can be driven where absent.
        budgets: network calls.
        dims: sizes of the mixtures.
        num_samples: K.
        guided: network calls of the guided runs.
        plain: network calls of DDIM's guided run that they are held against.
        rejected: steps of DiffRS, the first of them with exact steps too; not run where empty.
        seed: of the samples.
    """
    names = drivable() if solvers is None else list(solvers)
    tables: dict[str, list[dict[str, Any]]] = {}
    for dim in dims:
        tables |= prior_tables(dim, names, budgets, num_samples, seed)
    entries = list(guided_variants(names, guided, plain))
    tables |= guided_tables(entries, num_samples, seed)
    if rejected:
        tables["DiffRS: weight of the left mode, .3 in the data and .6 in the model"] = rejection.rows(
            2 * num_samples, rejected, seed
        )
    given = {"solvers": names, "budgets": budgets, "dims": dims, "num_samples": num_samples, "guided": guided}
    given |= {"plain": plain, "rejected": rejected, "seed": seed}
    return Report("solvers", given, tables, NOTES).finish(out)


def drivable() -> list[str]:
    """Return the names of the solvers that take any smooth prediction."""
    found = {name: get(name, "solvers") for name in available("solvers")}
    return [name for name, cls in found.items() if not (issubclass(cls, Solver) and cls.undriven)]


def prior_tables(
    dim: int, names: Sequence[str], budgets: Sequence[int], num_samples: int, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Return the tables of errors and of distances on one mixture, one row per solver and a column per budget."""
    prior: Any = mixture_problem(dim).problem.prior
    problem = Posterior(prior, FlatLikelihood(prior.event_shape, 1, torch.float64))
    truth = exact_flow(prior, problem, num_samples, seed)
    posterior = prior.posterior(problem.likelihood)
    floor, exact = mixture.transport_floor(posterior, num_samples), posterior.sample(num_samples, seed=999).flatten(1)
    scale = float(posterior.cov[0].diagonal().mean().sqrt())

    def error(variant: Variant, x: Tensor) -> float | None:
        if not deterministic(variant.sampler, problem):
            return None
        return float((x - truth).square().mean().sqrt()) / scale

    def distance(_: Variant, x: Tensor) -> float:
        return sliced_wasserstein(x.flatten(1), exact) / floor

    rows = {
        f"Mixture, {dim} dimensions: error": error,
        f"Mixture, {dim} dimensions: SW/floor": distance,
    }
    entries = [(n, v) for n in budgets for v in variants(names, [n], kind="solvers")]
    runs = [(n, v, draw(v.sampler, problem, num_samples, seed)) for n, v in track(entries, f"{dim} d", transient=True)]
    return {title: pivot(runs, measure) for title, measure in rows.items()}


def pivot(
    runs: Sequence[tuple[int, Variant, Tensor | str]], measure: Callable[[Variant, Tensor], float | None]
) -> list[dict[str, Any]]:
    """Return one row per solver and preset with what `measure` says of each run in the column of its budget."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for budget, variant, x in runs:
        row = rows.setdefault((variant.method, variant.preset), {"method": variant.method, "preset": variant.preset})
        if isinstance(x, str):
            row["remark"] = x
        else:
            row[f"{budget} calls"] = measure(variant, x)
    return list(rows.values())


def draw(sampler: Sampler, problem: Posterior, num_samples: int, seed: int) -> Tensor | str:
    """Return samples, (K, *event), or why there are none."""
    try:
        return sampler(problem, num_samples, seed=seed).x[:, 0]
    except FAILURES as error:
        return failed(error)


def exact_flow(prior: MixturePrior, problem: Posterior, num_samples: int, seed: int) -> Tensor:
    """Return where the exact flow leads from the noise of samples 0, 1, ..., (K, *event)."""
    noise = Noise.spawn([seed], range(num_samples), torch.float64)
    start = get("ddim", "solvers")().init(problem.expand(num_samples), noise).x
    ends = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    return prior.flow(start, *ends, FLOW_STEPS)


@torch.no_grad()
def deterministic(sampler: Sampler, problem: Posterior) -> bool:
    """Return whether steps from one start under other noise lead to the same end."""
    items = problem.expand(2)
    start, ends = sampler.init(items, Noise([1, 2], torch.float64)).x, []
    for seeds in ([3, 4], [5, 6]):
        state, noise = State(start), Noise(seeds, torch.float64)
        for k in range(sampler.steps):
            state = sampler.step(items, state, k, noise)
        ends.append(sampler.output(state))
    return torch.equal(*ends)


def guided_variants(names: Sequence[str], budget: int, plain: int) -> Iterator[Variant]:
    """Yield MMPS by itself at both budgets, and under every solver at the first."""
    for calls in (plain, budget):
        yield Variant("mmps", "eta=0", MMPS(steps=calls, eta=0.0, iterations=GUIDED.iterations))
    for variant in variants(names, [budget], kind="solvers"):
        assert isinstance(variant.sampler, Solver)
        yield Variant(f"mmps under {variant.method}", variant.preset, Driven(GUIDED, variant.sampler))


def guided_tables(entries: Sequence[Variant], num_samples: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Return the tables of guided runs on a Gaussian problem, whose law is exact, and on two mixtures."""
    exact = gaussian_problem()
    tables = {
        "Guidance on a Gaussian posterior, 5 dimensions": [
            gaussian.measure(v, exact, num_samples, 2, seed) for v in track(entries, "gaussian", transient=True)
        ]
    }
    for title, problem in mixture.problems().items():
        floor = mixture.transport_floor(problem.posterior, num_samples)
        tables[f"Guidance on a mixture posterior: {title}"] = [
            mixture.measure(v, problem, num_samples, seed, floor) for v in track(entries, title, transient=True)
        ]
    return tables
