"""`fewstep bench images`: tasks x methods on a folder of photographs.

Every finished (image, task, method) is a line of a JSONL file beside the report, so a run that was interrupted goes on where it
stopped; a line counts only if nothing that could change it has changed.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from fewstep.bench.common import FAILURES, Report, Variant, describe, failed, variants
from fewstep.bench.memory import PeakMemory
from fewstep.bench.priors import resolve_prior
from fewstep.bench.speed import centre_crop
from fewstep.core.denoiser import Denoiser
from fewstep.core.noise import mix
from fewstep.core.problem import Posterior
from fewstep.core.samples import Samples
from fewstep.images import list_photos, load_image
from fewstep.metrics import coverage, lpips, psnr, ssim
from fewstep.operators.image import to_unit
from fewstep.operators.words import (
    DeblurGaussian,
    DeblurMotion,
    DeblurUniform,
    InpaintBox,
    InpaintRandom,
    Jpeg,
    Operator,
    SuperResolution,
)

BASELINE = "measurement"
QUALITY = ("PSNR mean", "PSNR sample", "SSIM mean", "LPIPS mean", "LPIPS sample", "coverage")
COUNTS = ("nfe", "vjps", "operator calls")
MEASURES = (*QUALITY, *COUNTS, "seconds", "memory MiB")


class Task(NamedTuple):
    """An operator and the noise level of its measurements, in [0, 1] units; None where the operator adds none."""

    operator: Operator
    sigma: float | None


TASKS: dict[str, Task] = {
    "deblur-gaussian": Task(DeblurGaussian(), 0.01),
    "deblur-gaussian-noisy": Task(DeblurGaussian(), 0.025),
    "deblur-uniform": Task(DeblurUniform(), 0.01),
    "deblur-motion": Task(DeblurMotion(), 0.01),
    "sr2": Task(SuperResolution(factor=2), 0.01),
    "sr4": Task(SuperResolution(factor=4), 0.01),
    "sr4-noisy": Task(SuperResolution(factor=4), 0.025),
    "inpaint-random": Task(InpaintRandom(rate=0.7), 0.025),
    "inpaint-box": Task(InpaintBox(size=64), 0.025),
    "jpeg10": Task(Jpeg(quality=10), None),
}


@dataclass(frozen=True)
class Setup:
    """What all rows of a run have in common.

    Attributes:
        prior: the denoiser.
        samples: K.
        level: probability of the intervals.
        seed: of measurements and samples.
        chunk: the most samples that go through the network at once.
        lpips_weights: see `metrics.lpips`.
    """

    prior: Denoiser
    samples: int = 4
    level: float = 0.9
    seed: int = 0
    chunk: int | None = None
    lpips_weights: str | Path | None = None

    @property
    def nominal(self) -> float:
        """The coverage that right samples would have: `level`, or (K - 1) / (K + 1) where K is too small for it."""
        return min(self.level, max(self.samples - 1, 0) / (self.samples + 1))


def main(  # noqa: PLR0913 - one parameter is one option
    folder: str | Path,
    out: str | Path | None = None,
    *,
    methods: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    sigma: float | None = None,
    limit: int | None = None,
    crop: int = 256,
    samples: int = 4,
    seed: int = 0,
    prior: str | Denoiser = "natural",
    lpips_weights: str | Path | None = None,
    steps: Sequence[int] | None = None,
    chunk: int | None = None,
) -> Report:
    """Run all methods on all tasks and images, print the tables, write the JSON report to `out` where given, and return it.

    Args:
        folder: of photographs.
        out: path of the JSON file; finished rows go to the .jsonl beside it at once.
        methods: "name" for its first preset or "name:preset"; all methods where absent.
        tasks: of `TASKS`, all where absent.
        sigma: noise level in [0, 1] units in place of that of each task.
        limit: the most images.
        crop: edge of the centre crops.
        samples: K per measurement.
        seed: of measurements and samples.
        prior: a name or path for `load_prior`, "random", or a denoiser.
        lpips_weights: file or folder of LPIPS weights.
        steps: NFE budgets; methods as published where absent.
        chunk: the most samples that go through the network at once.
    """
    chosen = {name: with_sigma(task_called(name), sigma) for name in (tasks or TASKS)}
    setup = Setup(resolve_prior(prior), samples, seed=seed, chunk=chunk, lpips_weights=lpips_weights)
    entries = list(variants(methods, steps, every_preset=False))
    paths = list_photos(folder)[:limit]
    log = Log(None if out is None else Path(out).with_suffix(".jsonl"), fingerprint(setup, crop))
    for path, index in track([(p, i) for i, p in enumerate(paths)], "images", transient=True):
        run_image(path, index, chosen, entries, setup, crop, log)
    tables = {_title(name, task): summary(task, entries, paths, log) for name, task in chosen.items()}
    given = {
        **{
            "folder": folder,
            "images": len(paths),
            "methods": methods,
            "tasks": list(chosen),
            "crop": crop,
            "steps": steps,
        },
        **{"samples": samples, "seed": seed, "prior": str(prior)[:200], "level": setup.level},
    }
    return Report("images", given, tables, notes(setup)).finish(out)


def notes(setup: Setup) -> tuple[str, ...]:
    """Return how to read the numbers."""
    return (
        f"PSNR (dB), SSIM and LPIPS (AlexNet, lower is better) of the mean of {setup.samples} samples and of the first sample, "
        "averaged over the images.",
        f"coverage of the central {setup.level:.0%} intervals per pixel and channel; with K = {setup.samples} samples right "
        f"intervals would hold {setup.nominal:.2f}.",
        "seconds are for all samples of one measurement, nfe, vjps and operator calls for one sample.",
        PeakMemory.note(),
        f"'{BASELINE}' is the image to beat: y itself, interpolated, or decoded.",
    )


def task_called(name: str) -> Task:
    """Return the task; ValueError where there is none of that name."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; choose one of {', '.join(TASKS)}")
    return TASKS[name]


def with_sigma(task: Task, sigma: float | None) -> Task:
    """Return the task with another noise level, where one is given and the task has noise."""
    return task if sigma is None or task.sigma is None else Task(task.operator, sigma)


def run_image(
    path: Path, index: int, tasks: Mapping[str, Task], entries: Sequence[Variant], setup: Setup, crop: int, log: Log
) -> None:
    """Run whatever is not yet in the log on one image."""
    truth = None
    for name, task in tasks.items():
        base, left = row_key(path, task, None), [entry for entry in entries if not log.has(row_key(path, task, entry))]
        if not left and log.has(base):
            continue
        truth = centre_crop(load_image(path), crop) if truth is None else truth
        y = task.operator.simulate(truth, task.sigma or 0.0, seed=mix(setup.seed, index))
        where = {"image": path.name, "task": name}
        if not log.has(base):
            log.add(base, where | {"method": BASELINE} | baseline_row(task, y, truth, setup))
        for entry in left:
            row = method_row(entry, task, y, truth, setup, mix(setup.seed, index, 1))
            log.add(row_key(path, task, entry), where | describe(entry) | row)


def row_key(path: Path, task: Task, entry: Variant | None) -> str:
    """Return the name of a row in the log; of the baseline where there is no entry."""
    return f"{path.name}|{task}|{BASELINE if entry is None else repr(entry.sampler)}"


def baseline_row(task: Task, y: Any, truth: Tensor, setup: Setup) -> dict[str, Any]:
    """Return the measures of the image to beat."""
    x = task.operator.baseline(y, tuple(truth.shape[1:])).clamp(0, 1)  # type: ignore[arg-type]
    return {"PSNR mean": psnr(x, truth), **_perceptual(x, truth, "mean", setup)}


def method_row(entry: Variant, task: Task, y: Any, truth: Tensor, setup: Setup, seed: int) -> dict[str, Any]:
    """Return the measures of one method on one measurement, or why there are none."""
    try:
        likelihood = task.operator.likelihood(y, tuple(truth.shape[1:]), task.sigma)  # type: ignore[arg-type]
        if missing := entry.sampler.needs - likelihood.provides:
            return {"remark": f"not applicable: needs {', '.join(sorted(missing))}"}
        with PeakMemory() as memory:
            samples = entry.sampler(Posterior(setup.prior, likelihood), setup.samples, seed=seed, chunk=setup.chunk)
    except FAILURES as error:
        return {"remark": f"failed: {failed(error)}"}
    return measures(samples, truth, setup) | {"memory MiB": memory.mebibytes}


def measures(samples: Samples, truth: Tensor, setup: Setup) -> dict[str, Any]:
    """Return quality, coverage and cost of samples, (K, 1, 3, H, W) in [-1, 1], against the truth in [0, 1]."""
    mean, first = (to_unit(x).clamp(0, 1) for x in (samples.mean, samples.x[0]))
    row: dict[str, Any] = {"PSNR mean": psnr(mean, truth), "PSNR sample": psnr(first, truth)}
    row |= _perceptual(mean, truth, "mean", setup)
    row["LPIPS sample"] = lpips(first, truth, weights=setup.lpips_weights)[0]
    if samples.num_samples > 1:
        lower, upper = (to_unit(x) for x in samples.interval(setup.level))
        row["coverage"] = coverage((lower, upper), truth)
    counts = samples.counts
    cost = {"nfe": counts.network, "vjps": counts.vjp, "operator calls": counts.operator, "seconds": samples.seconds}
    return row | cost


def _perceptual(x: Tensor, truth: Tensor, name: str, setup: Setup) -> dict[str, Any]:
    (similarity, why), (distance, why_not) = ssim(x, truth), lpips(x, truth, weights=setup.lpips_weights)
    reasons = {"missing": "; ".join(r for r in (why, why_not) if r)}
    return {f"SSIM {name}": similarity, f"LPIPS {name}": distance} | ({} if not reasons["missing"] else reasons)


def summary(task: Task, entries: Sequence[Variant], paths: Sequence[Path], log: Log) -> list[dict[str, Any]]:
    """Return one row per method with the means over the images of one task."""
    rows = []
    for entry in [None, *entries]:
        name = {"method": BASELINE, "preset": "", "steps": None} if entry is None else describe(entry)
        rows.append(name | _average([log.row(row_key(path, task, entry)) for path in paths]))
    return rows


def _average(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    done = [row for row in rows if "remark" not in row]
    out: dict[str, Any] = {"images": len(done)}
    for measure in MEASURES:
        values = [float(row[measure]) for row in done if row.get(measure) is not None]
        mean = statistics.fmean(values) if values and all(map(math.isfinite, values)) else None
        out[measure] = int(mean) if mean is not None and measure in COUNTS and mean.is_integer() else mean
    remarks = dict.fromkeys(row["remark"] for row in rows if "remark" in row)
    missing = dict.fromkeys(row["missing"] for row in done if row.get("missing"))
    return out | {"remark": "; ".join([*remarks, *missing]) or None}


def _title(name: str, task: Task) -> str:
    return f"{name}: {task.operator.describe()}" + (f", sigma {task.sigma:g}" if task.sigma is not None else "")


def fingerprint(setup: Setup, crop: int) -> str:
    """Return a hash of the prior's weights and of all settings that a row depends on."""
    digest = hashlib.sha256(repr((crop, setup.samples, setup.level, setup.seed, str(setup.lpips_weights))).encode())
    digest.update(f"{type(setup.prior).__name__} {setup.prior.schedule!r}"[:1000].encode())
    for name, value in setup.prior.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class Log:
    """Finished rows, in memory and, where a path is given, one JSON line each on disk.

    Args:
        path: of the JSONL file; lines of another fingerprint and a line cut off in the middle are passed over.
        mark: the fingerprint of this run.
    """

    def __init__(self, path: Path | None, mark: str) -> None:
        self.path, self.mark = path, mark
        cut_off = path is not None and path.exists() and not path.read_bytes().endswith(b"\n")
        self._gap = "\n" if cut_off else ""  # so that the next row does not join a line that was cut off
        self._rows = {row["key"]: row for row in self._read() if row.get("mark") == mark}

    def row(self, key: str) -> dict[str, Any]:
        """Return a row; KeyError where it is not there."""
        return self._rows[key]

    def has(self, key: str) -> bool:
        """Return whether the row is there."""
        return key in self._rows

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        """Add a row and write it at once."""
        self._rows[key] = {"key": key, "mark": self.mark, **row}
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._gap + json.dumps(self._rows[key]) + "\n")
            self._gap = ""

    def _read(self) -> Iterator[dict[str, Any]]:
        if self.path is None or not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and "key" in row:
                yield row
