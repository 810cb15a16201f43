"""`fewstep bench solvers`: solvers at 5 to 20 network calls on mixtures and on a network, under a guided sampler, and DiffRS."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.progress import track

from fewstep.bench import gaussian, mixture, rejection
from fewstep.bench.common import Report, Variant, variants
from fewstep.bench.few_calls import TUNERS, Plan, Tables
from fewstep.bench.grounds import FINE, Ground, mixture_ground, network_ground
from fewstep.bench.log import Log, fingerprint
from fewstep.core.denoiser import Denoiser
from fewstep.core.driven import Driven
from fewstep.core.multistep import Solver
from fewstep.core.registry import available, get
from fewstep.methods.mmps import MMPS
from fewstep.testing.problems import gaussian_problem

GUIDED = MMPS(iterations=5)
NOTES = (
    "error: root mean square, over samples and coordinates, of the distance to the exact probability flow from the same noise, in "
    "units of the prior's standard deviation; empty where the solver draws fresh noise. Columns are budgets of network calls, "
    "each solver with as many of its steps as fit and on its own grid; empty where not one fits.",
    "SW/floor: sliced 2-Wasserstein distance to exact samples over that between two sets of exact samples of the same size.",
    "with statistics: DPM-Solver-v3 with statistics of this prior from its own flow.",
    "tuned: times fitted to the prior on other noise, of the solver with the least untuned error at as many calls (ays, ggdm), "
    "or with the decisions of every step (s3). mean error: over samples, of the root mean square over coordinates, which they "
    "minimise; gain: that of the best untuned solver minus that of the tuned one, ± one standard error.",
    "floors: the same figures of sets that no solver under test has made.",
)
MIXTURES = ("mixtures: four Gaussians, covariances between .02 and .7 along their axes.",)
NETWORK = (
    f"network: its exact flow and exact samples are those of {FINE} steps of third order. Frechet: squared distance in the 64 "
    "features of the classifier 'digits-classifier' to 1000 test digits; mostly bias at few samples, see the floors.",
)
GUIDANCE = (
    "guidance: MMPS (5 conjugate-gradient iterations) under every solver, and by itself with eta = 0; columns as in the benchmarks "
    "'gaussian' and 'mixture'.",
)


def main(  # noqa: PLR0913 - one parameter is one option
    out: str | Path | None = None,
    *,
    solvers: Sequence[str] | None = None,
    budgets: Sequence[int] = (5, 8, 10, 15, 20),
    dims: Sequence[int] = (2, 64),
    num_samples: int = 1000,
    prior: str | Denoiser | None = None,
    images: int = 256,
    data: Path | None = None,
    tuners: Sequence[str] = tuple(TUNERS),
    tuned: Sequence[int] | None = None,
    known: int = 128,
    guided: int = 10,
    plain: int = 50,
    rejected: Sequence[int] = (10, 100),
    seed: int = 0,
) -> Report:
    """Measure all solvers, print the tables, write the JSON report to `out` where given, and return it.

    Finished runs on priors are kept beside `out` with the suffix .jsonl, and an interrupted benchmark goes on from there.

    Args:
        out: path of the JSON file.
        solvers: names, all that can be driven where absent.
        budgets: network calls.
        dims: sizes of the mixtures.
        num_samples: K on mixtures.
        prior: a name or path for `load_prior`, or a denoiser, to be sampled too.
        images: K on that.
        data: the file of digits, for the Frechet distance of the prior "digits".
        tuners: methods of `fewstep tune`, none where empty.
        tuned: network calls at which they are run, some of the budgets; those of 5 and 10 among them where absent.
        known: paths from which DPM-Solver-v3 has its statistics; without where 0.
        guided: network calls of the guided runs; not run where 0.
        plain: network calls of DDIM's guided run that they are held against.
        rejected: steps of DiffRS, the first of them with exact steps too; not run where empty.
        seed: of the samples.
    """
    names = drivable() if solvers is None else list(solvers)
    tuned = [n for n in (5, 10) if n in budgets] if tuned is None else tuned
    tables: dict[str, list[dict[str, Any]]] = {}
    path = None if out is None else Path(out).with_suffix(".jsonl")
    for ground in grounds(dims, num_samples, prior, images, data, seed):
        log = Log(path, fingerprint(ground.problem.prior, len(ground.truth), seed, str(data), known, TUNERS))
        tables |= Tables(ground, Plan(names, budgets, tuners, tuned, known), log).make()
    if guided:
        tables |= guided_tables(list(guided_variants(names, guided, plain)), num_samples, seed)
    if rejected:
        tables["DiffRS: weight of the left mode, .3 in the data and .6 in the model"] = rejection.rows(
            2 * num_samples, rejected, seed
        )
    given = {"solvers": names, "budgets": budgets, "dims": dims, "num_samples": num_samples, "guided": guided}
    given |= {"prior": str(prior)[:200], "images": images, "data": data, "tuners": tuners, "tuned": tuned}
    given |= {"known": known, "plain": plain, "rejected": rejected, "seed": seed}
    notes = {NOTES: dims or prior, MIXTURES: dims, NETWORK: prior, GUIDANCE: guided, rejection.NOTES: rejected}
    told = tuple(note for some, shown in notes.items() if shown for note in some)
    return Report("solvers", given, tables, told).finish(out)


def drivable() -> list[str]:
    """Return the names of the solvers that take any smooth prediction."""
    found = {name: get(name, "solvers") for name in available("solvers")}
    return [name for name, cls in found.items() if not (issubclass(cls, Solver) and cls.undriven)]


def grounds(
    dims: Sequence[int], num_samples: int, prior: str | Denoiser | None, images: int, data: Path | None, seed: int
) -> Iterator[Ground]:
    """Yield the priors, one after the other."""
    for dim in dims:
        yield mixture_ground(dim, num_samples, seed)
    if prior is not None:
        yield network_ground(prior, images, seed, data)


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
