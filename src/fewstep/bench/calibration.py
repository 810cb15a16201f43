"""`fewstep bench calibration`: whether intervals cover, task by task, on photographs that neither training nor calibration saw.

The intervals of each method are measured as they are, as the calibration beside a trained sampler stretches them (one factor per
family of operators), and by a factor that is fitted here to the very task. One photograph is one observation.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.progress import track
from torch import Tensor

from fewstep.bench.common import FAILURES, Report, Variant, describe, failure, variants
from fewstep.bench.images import row_mark
from fewstep.bench.log import Log, fingerprint
from fewstep.bench.priors import resolve_prior
from fewstep.bench.tasks import Task, named_tasks
from fewstep.bench.trials import kept
from fewstep.calibrated import Asked, Plan, judge, simulated
from fewstep.core.denoiser import Denoiser
from fewstep.core.files import files_hash
from fewstep.data import list_images, load_pixels
from fewstep.measurements import Family
from fewstep.metrics import coverage
from fewstep.uncertainty import Calibration

TASKS: tuple[str, ...] = (
    *("deblur-gaussian", "deblur-gaussian-noisy", "deblur-uniform", "deblur-motion", "sr2", "sr4", "sr4-noisy"),
    *("inpaint-random", "jpeg10-gaussian"),
)
NOTES = (
    "coverage of the central 90% intervals, per pixel and channel, a mean over photographs with its standard error; 'plain': as the "
    "samples have them, of which right independent ones would hold 'right' at this K, antithetic ones more (`Samples.interval`); "
    "'family': stretched by the factor that lies beside the weights of a trained sampler, one per family of operators; 'fitted': by "
    "a factor fitted to this task on other photographs.",
    "A factor bounds the mean over photographs of min(share of missed pixels, worst), with a margin for how few it was fitted on: "
    "where no photograph is missed by more than the share `worst`, the expected coverage lies between the level and the level + "
    "2 worst / (n + 1); photographs that are missed by more count as missed by that share.",
    "width: mean half width of the intervals stretched by the stored factor, by the fitted one where there is none, or plain, in "
    "[0, 1] units; error: mean absolute error of the median.",
)


@dataclass(frozen=True)
class Setup:
    """What all rows of a run have in common.

    Attributes:
        prior: the denoiser.
        fitted: photographs of calibration, uint8, (3, H, W) each; none to measure stored factors alone.
        fresh: photographs on which coverage is measured.
        plan: crop, numbers of samples and level, of which the first are used, bound of a photograph's loss, seed.
    """

    prior: Denoiser
    fitted: Sequence[Tensor]
    fresh: Sequence[Tensor]
    plan: Plan

    def row(self, entry: Variant, task: Task) -> dict[str, Any]:
        """Return the coverage of a method on a task, or why there is none."""
        try:
            return self.measured(entry, task)
        except FAILURES as error:
            return failure(error)

    def measured(self, entry: Variant, task: Task) -> dict[str, Any]:
        """Return the coverage of a method on a task."""
        (level, *_), (num, *_), family = self.plan.levels, self.plan.samples, exactly(task)
        verdict = judge(entry.sampler, Asked(task.operator, task.sigma, num, level, self.plan.antithetic))
        factors = {"family": None if verdict is None else verdict.calibration, "fitted": self.own(entry, family)}
        rows = []
        again = replace(self.plan, seed=self.plan.seed + 1)
        for samples, truth in simulated(entry.sampler, self.prior, self.fresh, [family], again):
            ends = {"plain": samples.interval(level)}
            ends |= {name: c.apply(samples) for name, c in reversed(factors.items()) if c is not None}
            low, high = list(ends.values())[-1]
            width, error = (high - low).mean() / 4, (samples.quantile(0.5) - truth).abs().mean() / 2
            found = {name: coverage(end, truth) for name, end in ends.items()}
            rows.append(found | {"width": float(width), "error": float(error)})
        stretched = {f"{name} factor": None if c is None else c.factor for name, c in factors.items()}
        right = min(level, (num - 1) / (num + 1))
        return {"photographs": len(rows), "right": right, **summary(rows), **stretched}

    def own(self, entry: Variant, family: Family) -> Calibration | None:
        """Return the calibration that is fitted to one task, None without photographs for it."""
        level = self.plan.levels[0]
        pairs = simulated(entry.sampler, self.prior, self.fitted, [family], self.plan)
        return Calibration.fit(pairs, level, worst=self.plan.bound(level)) if self.fitted else None


def main(  # noqa: PLR0913 - one parameter is one option
    calibration: str | Path,
    folder: str | Path,
    out: str | Path | None = None,
    *,
    methods: Sequence[str] = ("ud2m:photo",),
    steps: Sequence[int] | None = None,
    tasks: Sequence[str] = TASKS,
    fitted: int = 32,
    limit: int | None = None,
    crop: int = 64,
    samples: int = 8,
    worst: float | None = None,
    seed: int = 0,
    prior: str | Denoiser = "natural",
    chunk: int | None = None,
    antithetic: bool = True,
    kernels: str | Path | None = None,
) -> Report:
    """Calibrate and measure, print the tables, write the JSON report to `out` where given, and return it.

    Args:
        calibration: folder of photographs to calibrate on: the last in sorted order, those held out from training, are taken.
        folder: of photographs on which coverage is measured.
        out: path of the JSON file; finished rows go to the .jsonl beside it at once.
        methods: entries of `common.variants`.
        steps: NFE budgets; methods as published where absent.
        tasks: names for `named_tasks`.
        fitted: the most photographs of calibration; 0 to measure the factors that lie beside the weights alone, in less than half
            the time.
        limit: the most photographs of measurement.
        crop: edge of the centre crops.
        samples: K per measurement.
        worst: see `Plan`.
        seed: of measurements and samples.
        prior: a name or path for `load_prior`, "random", or a denoiser.
        chunk: the most samples that go through the network at once.
        antithetic: samples come in pairs with opposite noise, see `Sampler`.
        kernels: see `named_tasks`.
    """
    plan = Plan(samples=(samples,), crop=crop, worst=worst, seed=seed, chunk=chunk, antithetic=antithetic)
    if fitted < 0:
        raise ValueError(f"the number of photographs of calibration must not be negative, got fitted = {fitted}")
    sources = (list_images(calibration)[-fitted:] if fitted else [], list_images(folder)[:limit])
    before, after = ([load_pixels(path, crop) for path in paths] for paths in sources)
    if before:
        plan.check(len(before))
    setup = Setup(resolve_prior(prior), before, after, plan)
    mark = fingerprint(setup.prior, replace(plan, chunk=None), *map(files_hash, sources))
    log = Log(None if out is None else Path(out).with_suffix(".jsonl"), mark)
    entries = list(variants(methods, steps, every_preset=False))
    tables: dict[str, list[dict[str, Any]]] = {}
    chosen = [(name, task, e) for name, task in named_tasks(tasks, kernels).items() for e in entries]
    for name, task, entry in track(chosen, "tasks", transient=True):
        asked = Asked(task.operator, task.sigma, samples, plan.levels[0], antithetic)
        row = kept(log, row_mark(str(task), entry, asked), lambda e=entry, t=task: setup.row(e, t))  # type: ignore[misc]
        tables.setdefault("Coverage", []).append({"task": name, **describe(entry), **row})
    given = {
        "calibration": calibration,
        "folder": folder,
        "crop": crop,
        "samples": samples,
        "antithetic": antithetic,
        "worst": worst,
        "seed": seed,
    }
    return Report("calibration", given, tables, NOTES).finish(out)


def exactly(task: Task) -> Family:
    """Return the family that draws nothing but this task."""
    values = {f.name: getattr(task.operator, f.name) for f in fields(task.operator)}  # type: ignore[arg-type]
    return Family(task.operator.word, fields=values, sigma=task.sigma or 0.0)


def summary(rows: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """Return means over photographs, those of coverage with their standard errors."""
    out: dict[str, float | None] = {}
    for name in ("plain", "family", "fitted"):
        values = [row[name] for row in rows if name in row]
        out[name] = statistics.fmean(values) if values else None
        out[f"± {name}"] = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return out | {name: statistics.fmean(row[name] for row in rows) for name in ("width", "error")}
