"""`fewstep bench unfolded`: UD2M before and after training, on mixtures whose posterior is known, beside the other methods.

The network is trained here, with the objective, the trainer and the sampler that photographs use; only its decoder (the exact
denoiser plus a small correction) and the metric of the energy scores (that of the likelihood) belong to the exact problem.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

from rich.progress import track

from fewstep.bench import ablations
from fewstep.bench.common import Report, Variant, describe, variants
from fewstep.bench.designs import Design, timed
from fewstep.bench.log import Log, fingerprint
from fewstep.bench.trials import SIGMA, Setup, Trial, kept
from fewstep.methods.ud2m import UD2M

PEERS = ("dps", "ddrm", "diffpir", "daps", "cm4ir")
NOTES = (
    "prior: four Gaussians; operator: random, of half the dimension, sigma 0.1. All columns are means over the measurements.",
    "mean error: root mean square over coordinates, in posterior standard deviations. observed / null: trace of the sample "
    "covariance over the exact one, within the row space and the null space of the operator.",
    "SW/floor: sliced 2-Wasserstein distance to exact samples over that of another exact set of the same size.",
    "SBC: smallest p-value of uniform ranks over the coordinates, times their number (Bonferroni); TARP: p-value of expected "
    "coverage; both are small where the sampler is not calibrated. The exact row shows what right samples give.",
    "A trained row was trained in this run; 'seconds' of it are processor seconds of the training, of the others the sampling's.",
    "The presets of ud2m differ in levels, start and outer kernel; both are trained on energy scores in the likelihood's metric: of "
    "the whole vector and of every coordinate.",
)


def main(  # noqa: PLR0913 - one parameter is one option
    out: str | Path | None = None,
    *,
    dims: Sequence[int] = (16,),
    steps: int = 30_000,
    presets: Sequence[str] = ("paper", "consistent"),
    budgets: Sequence[int] = (9, 20, 100, 1000),
    checked: int = 1000,
    ablation: Sequence[str] = (),
    measurements: int = 24,
    num_samples: int = 1500,
    width: int = 384,
    seed: int = 0,
) -> Report:
    """Train and measure, print the tables, write the JSON report to `out` where given, and return it.

    Args:
        out: path of the JSON file; rows are kept beside it as they come, so that the same command goes on where it was stopped.
        dims: sizes of x, one table each.
        steps: of each training.
        presets: of ud2m, which are trained.
        budgets: network calls of the other methods.
        checked: the most network calls of a sampler that SBC and TARP are computed for; they double its time.
        ablation: what is varied in a table of its own instead, of `ablations.ABLATIONS`; "all" for all of them.
        measurements: B.
        num_samples: K per measurement.
        width: of the trained correction.
        seed: of the samples.

    Raises:
        ValueError: an unknown preset or ablation, or a preset that is trained already.
    """
    designs = {preset: Design(UD2M.preset(preset)) for preset in presets}
    chosen = ablations.choose(ablation)
    tables = {}
    for dim in dims:
        setup = Setup(dim, width=width, steps=steps)
        trial = Trial.of(setup, measurements, num_samples, seed)
        path = None if out is None else Path(out).with_suffix(".jsonl")
        log = Log(path, fingerprint(setup.prior, setup, measurements, num_samples, seed, checked))
        title = f"mixture in {dim} dimensions, rank {setup.rank}, sigma {SIGMA}"
        if chosen:
            tables[f"Ablations, {title}"] = list(ablations.rows(chosen, trial, log))
        else:
            tables[title.capitalize()] = list(rows(designs, budgets, trial, checked, log))
    given = {"dims": dims, "steps": steps, "presets": presets, "budgets": budgets, "ablation": chosen}
    given |= {"measurements": measurements, "num_samples": num_samples, "width": width}
    given |= {"seed": seed, "checked": checked}
    return Report("unfolded", given, tables, NOTES + (ablations.NOTES if chosen else ())).finish(out)


def rows(
    designs: dict[str, Design], budgets: Sequence[int], trial: Trial, checked: int, log: Log
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one table: exact samples, UD2M before and after training, the other methods."""
    yield {"method": "exact posterior", "preset": "", "steps": None} | kept(log, "exact", trial.reference)
    for preset, design in designs.items():
        yield from design_rows(preset, design, trial, checked, log)
    entries = list(variants(PEERS, budgets, every_preset=False))
    for entry in track(entries, f"{trial.setup.dim} dimensions", transient=True):
        name = describe(entry)
        yield name | kept(log, str(name), partial(trial.row, entry.sampler, checked))


def design_rows(preset: str, design: Design, trial: Trial, checked: int, log: Log) -> Iterator[dict[str, Any]]:
    """Yield the rows of one design, before and after training, at three steps and at one."""

    def row(steps: int, after: bool) -> dict[str, Any]:
        network, seconds = trained() if after else (design.network(trial.setup).eval(), None)
        variant = Variant("ud2m", f"{preset}, {'' if after else 'un'}trained", design.sampler(network, steps))
        found = describe(variant) | trial.row(variant.sampler, checked)
        return found if seconds is None else found | {"seconds": seconds}

    trained = cache(lambda: timed(lambda: design.train(trial.setup)))
    for after, steps in product((False, True), (3, 1)):
        yield kept(log, f"{preset} {after} {steps}", partial(row, steps, after))
