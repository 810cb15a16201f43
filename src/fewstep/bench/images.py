"""`fewstep bench images`: tasks x methods on a folder of photographs.

Every finished (image, task, method) is a line of a JSONL file beside the report, and its first sample an image in a folder beside
that, so a run that was interrupted goes on where it stopped; a line counts only if nothing that could change it has changed.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import track
from torch import Tensor

from fewstep.bench.common import FAILURES, Report, Variant, costs, describe, failure, variants
from fewstep.bench.log import Log, fingerprint
from fewstep.bench.memory import PeakMemory
from fewstep.bench.priors import resolve_prior
from fewstep.bench.sets import COLUMNS, HALVES, PATCH, SetDistances
from fewstep.bench.tasks import Task, named_tasks, with_sigma
from fewstep.calibrated import Asked, Verdict, judge
from fewstep.core.checks import check_pairs
from fewstep.core.denoiser import Denoiser
from fewstep.core.files import read_header
from fewstep.core.noise import mix
from fewstep.core.problem import Posterior
from fewstep.core.samples import Samples
from fewstep.data import centre_crop
from fewstep.images import list_photos, load_image
from fewstep.metrics import coverage, lpips, mobilenet, psnr, ssim
from fewstep.metrics.quality import Missing, lpips_file, lpips_net
from fewstep.operators.image import to_unit
from fewstep.unfolded.sampler import UnfoldedSampler

BASELINE = "measurement"
CALIBRATED = "coverage calibrated"
QUALITY = (
    *("PSNR mean", "PSNR sample", "SSIM mean", "LPIPS mean", "LPIPS sample", "VGG mean", "VGG sample"),
    *("coverage", CALIBRATED),
)
COUNTS = ("nfe", "vjps", "operator calls")
MEASURES = (*QUALITY, *COUNTS, "seconds", "memory MiB")
OPTIONAL = {"VGG mean", "VGG sample", CALIBRATED, *COLUMNS}  # columns that are left out where no row has them


class Photo(NamedTuple):
    """A photograph of a run: its file, its number, which the noise of its measurements depends on, and a hash of the file."""

    path: Path
    number: int
    digest: str

    @classmethod
    def all(cls, paths: Sequence[Path]) -> list[Photo]:
        """Return the photographs of a run in order."""
        return [cls(path, i, hashlib.sha256(path.read_bytes()).hexdigest()[:16]) for i, path in enumerate(paths)]


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
        antithetic: whether samples come in pairs with opposite noise.
        crop: edge of the centre crops; operators that do not take it get the largest square below.
    """

    prior: Denoiser
    samples: int = 4
    level: float = 0.9
    seed: int = 0
    chunk: int | None = None
    lpips_weights: str | Path | None = None
    crop: int = 256
    antithetic: bool = False

    @property
    def nominal(self) -> float:
        """The coverage that right independent samples would have: `level`, or (K - 1) / (K + 1) where K is too small."""
        return min(self.level, max(self.samples - 1, 0) / (self.samples + 1))

    @property
    def mirrored(self) -> str:
        """What is to be said of antithetic samples: the coverage of pairs that are mirror images, see `Samples.interval`."""
        k = self.samples
        most = min(1 - (1 - self.level) * (k + 1) / (k + 2), k / (k + 2))
        return f", antithetic ones up to {most:.2f}" if self.antithetic else ""

    def shape(self, task: Task) -> tuple[int, int, int]:
        """Return (3, H, W) of the images of a task."""
        return task.operator.fit((3, self.crop, self.crop))

    def truth(self, path: Path, task: Task) -> Tensor:
        """Return the clean image that a task measures, (1, 3, H, W) in [0, 1]."""
        _, h, w = self.shape(task)
        return centre_crop(load_image(path), self.crop)[..., :h, :w].contiguous()

    def asked(self, task: Task) -> Asked:
        """Return the intervals that the table is about."""
        return Asked(task.operator, task.sigma, self.samples, self.level, self.antithetic)


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
    antithetic: bool = False,
    features: str | Path | None = None,
    kernels: str | Path | None = None,
) -> Report:
    """Run all methods on all tasks and images, print the tables, write the JSON report to `out` where given, and return it.

    Args:
        folder: of photographs.
        out: path of the JSON file; finished rows go to the .jsonl beside it at once.
        methods: "name" for its first preset, "name:preset", or with fields behind it, "ud2m:photo:network=runs/own/sampler" say;
            all methods where absent.
        tasks: names for `named_tasks`, those of the main table where absent.
        sigma: noise level in [0, 1] units in place of that of each task.
        limit: the most images.
        crop: edge of the centre crops.
        samples: K per measurement.
        seed: of measurements and samples.
        prior: a name or path for `load_prior`, "random", or a denoiser.
        lpips_weights: file or folder of LPIPS weights.
        steps: NFE budgets; methods as published where absent. A trained network of K calls per outer step uses the largest
            multiple of K that fits, and has no row at budgets below K.
        chunk: the most samples that go through the network at once.
        antithetic: samples come in pairs with opposite noise, see `Sampler`, those of every method.
        features: mobilenet_v2.safetensors, see `metrics.mobilenet`: adds distances between the sets of samples and of truths.
        kernels: see `named_tasks`.
    """
    chosen = {name: with_sigma(task, sigma) for name, task in named_tasks(tasks, kernels).items()}
    check_pairs(samples, antithetic)
    setup = Setup(
        resolve_prior(prior),
        samples,
        seed=seed,
        chunk=chunk,
        lpips_weights=lpips_weights,
        crop=crop,
        antithetic=antithetic,
    )
    entries = list(variants(methods, steps, every_preset=False))
    sets = None if features is None else SetDistances(mobilenet(features))
    if sets is not None and (small := [name for name, task in chosen.items() if min(setup.shape(task)[1:]) < PATCH]):
        raise ValueError(
            f"the features are of patches of {PATCH} pixels, which do not fit the crops of {', '.join(small)}"
        )
    photos = Photo.all(list_photos(folder)[:limit])
    settings = (setup.crop, setup.samples, setup.level, setup.seed, setup.antithetic, *_lpips_sources(setup))
    log = Log(None if out is None else Path(out).with_suffix(".jsonl"), fingerprint(setup.prior, *settings))
    for photo in track(photos, "images", transient=True):
        run_image(photo, chosen, entries, setup, log)
    tables = {task.title(name): Table(task, setup, photos, log, sets).rows(entries) for name, task in chosen.items()}
    given = {
        **{
            "folder": folder,
            "images": len(photos),
            "methods": methods,
            "tasks": list(chosen),
            "crop": crop,
            "steps": steps,
        },
        **{"samples": samples, "antithetic": antithetic, "seed": seed, "prior": str(prior)[:200], "level": setup.level},
    }
    return Report("images", given, tables, (*notes(setup), *(sets.notes() if sets else ()))).finish(out)


def notes(setup: Setup) -> tuple[str, ...]:
    """Return how to read the numbers."""
    return (
        f"PSNR (dB), SSIM and LPIPS (AlexNet; VGG is LPIPS with VGG-16; lower is better) of the mean of {setup.samples} samples and "
        "of the first sample, averaged over the images.",
        f"coverage of the central {setup.level:.0%} intervals per pixel and channel; with K = {setup.samples} samples right "
        f"intervals would hold {setup.nominal:.2f}{setup.mirrored}. '{CALIBRATED}' is that of "
        "the intervals as stretched by the calibration that lies beside a trained sampler, which aims at the level itself.",
        "seconds are for all samples of one measurement, nfe, vjps and operator calls for one sample.",
        PeakMemory.note(),
        f"'{BASELINE}' is the image to beat: y itself, interpolated, or decoded.",
    )


def run_image(photo: Photo, tasks: Mapping[str, Task], entries: Sequence[Variant], setup: Setup, log: Log) -> None:
    """Run whatever is not yet in the log on one image, and what failed: memory may have been short."""
    for name, task in tasks.items():
        base, keys = row_key(photo, task, None, setup), [row_key(photo, task, entry, setup) for entry in entries]
        left = [(entry, key) for entry, key in zip(entries, keys, strict=True) if not log.has(key)]
        if not left and log.has(base):
            continue
        truth = setup.truth(photo.path, task)
        y = task.operator.simulate(truth, task.sigma or 0.0, seed=mix(setup.seed, photo.number))
        where = {"image": photo.path.name, "task": name}
        if not log.has(base):
            row, image = baseline_row(task, y, truth, setup)
            log.add(base, where | {"method": BASELINE} | row, image)
        for entry, key in left:
            found, first = method_row(entry, task, y, truth, setup, mix(setup.seed, photo.number, 1))
            log.add(key, where | describe(entry) | found, first)


def row_key(photo: Photo, task: Task, entry: Variant | None, setup: Setup) -> str:
    """Return the name of a row in the log, of the baseline where there is no entry."""
    where = f"{photo.path.name}|{photo.number}|{photo.digest}|{task}"
    return f"{where}|{BASELINE}" if entry is None else row_mark(where, entry, setup.asked(task))


def row_mark(where: str, entry: Variant, asked: Asked) -> str:
    """Return `where` with what decides a method's row; of trained weights it says which they are and how they were calibrated."""
    sampler, key = entry.sampler, f"{where}|{entry.sampler!r}"
    if not isinstance(sampler, UnfoldedSampler) or sampler.folder is None:
        return key
    verdict = judge(sampler, asked)
    return f"{key}|{read_header(sampler.folder).get('sha256')}|{verdict and verdict.calibration}"


def baseline_row(task: Task, y: Any, truth: Tensor, setup: Setup) -> tuple[dict[str, Any], Tensor]:
    """Return the measures of the image to beat, and the image; both, as all others, within the frame of the measurement."""
    x = task.operator.baseline(y).clamp(0, 1)
    truth = task.operator.framed(truth)
    return {"PSNR mean": psnr(x, truth), **_perceptual(x, truth, "mean", setup)}, x


def method_row(
    entry: Variant, task: Task, y: Any, truth: Tensor, setup: Setup, seed: int
) -> tuple[dict[str, Any], Tensor | None]:
    """Return the measures of one method on one measurement and its first sample in [0, 1], or why there are none."""
    try:
        likelihood = task.operator.likelihood(y, task.sigma)
        if missing := entry.sampler.needs - likelihood.provides:
            return {"remark": f"not applicable: needs {', '.join(sorted(missing))}"}, None
        with PeakMemory() as memory:
            samples = entry.sampler(
                Posterior(setup.prior, likelihood),
                setup.samples,
                seed=seed,
                chunk=setup.chunk,
                antithetic=setup.antithetic,
            )
        samples, truth = replace(samples, x=task.operator.framed(samples.x)), task.operator.framed(truth)
    except FAILURES as error:
        return failure(error), None
    row = measures(samples, truth, setup) | calibrated(judge(entry.sampler, setup.asked(task)), samples, truth)
    return row | {"memory MiB": memory.mebibytes}, to_unit(samples.x[0]).clamp(0, 1)


def measures(samples: Samples, truth: Tensor, setup: Setup) -> dict[str, Any]:
    """Return quality, coverage and cost of samples, (K, 1, 3, H, W) in [-1, 1], against the truth in [0, 1]."""
    mean, first = (to_unit(x).clamp(0, 1) for x in (samples.mean, samples.x[0]))
    row: dict[str, Any] = {"PSNR mean": psnr(mean, truth), "PSNR sample": psnr(first, truth)}
    row |= _perceptual(mean, truth, "mean", setup)
    row |= {f"{name} sample": value for name, (value, _) in _lpips(first, truth, setup).items()}
    if samples.num_samples > 1:
        lower, upper = (to_unit(x) for x in samples.interval(setup.level))
        row["coverage"] = coverage((lower, upper), truth)
    return row | costs(samples)


def calibrated(verdict: Verdict | None, samples: Samples, truth: Tensor) -> dict[str, Any]:
    """Return the coverage of calibrated intervals, and what is known of them; nothing for what is no trained sampler."""
    if verdict is None:
        return {}
    row: dict[str, Any] = {"verdict": verdict.text}
    if verdict.calibration is not None:
        lower, upper = (to_unit(x) for x in verdict.calibration.apply(samples))
        row[CALIBRATED] = coverage((lower, upper), truth)
    return row


def _perceptual(x: Tensor, truth: Tensor, name: str, setup: Setup) -> dict[str, Any]:
    found = {"SSIM": ssim(x, truth), **_lpips(x, truth, setup)}
    reasons = "; ".join(dict.fromkeys(why for _, why in found.values() if why))
    return {f"{k} {name}": value for k, (value, _) in found.items()} | ({"missing": reasons} if reasons else {})


def _lpips(x: Tensor, truth: Tensor, setup: Setup) -> dict[str, tuple[float | None, str | None]]:
    """Return LPIPS by both networks; what was asked for must be there for AlexNet, and may be missing for VGG."""
    found = {"LPIPS": lpips(x, truth, weights=setup.lpips_weights)}
    try:
        return found | {"VGG": lpips(x, truth, net="vgg", weights=setup.lpips_weights)}
    except ValueError as reason:
        return found | {"VGG": (None, str(reason))}


def _lpips_sources(setup: Setup) -> list[str]:
    """Return where the weights of both networks come from, "none" where there are none: rows without LPIPS are other rows."""
    found = []
    for net, forgiven in (("alex", Missing), ("vgg", ValueError)):
        try:
            lpips_net(net, setup.lpips_weights)
            found.append(str(lpips_file(net, setup.lpips_weights)))
        except forgiven:
            found.append("none")
    return found


@dataclass(frozen=True)
class Table:
    """The table of one task.

    Attributes:
        task: the task.
        setup: what all rows have in common.
        photos: the images.
        log: where their rows are.
        sets: distances between sets of images; None for none.
    """

    task: Task
    setup: Setup
    photos: Sequence[Photo]
    log: Log
    sets: SetDistances | None = None

    def rows(self, entries: Sequence[Variant]) -> list[dict[str, Any]]:
        """Return one row per method with the means over the images."""
        truths = (
            None
            if self.sets is None
            else self.sets.features(
                [self.task.operator.framed(self.setup.truth(p.path, self.task)) for p in self.photos]
            )
        )
        rows = []
        for entry in [None, *entries]:
            name = {"method": BASELINE, "preset": "", "steps": None} if entry is None else describe(entry)
            keys = [row_key(photo, self.task, entry, self.setup) for photo in self.photos]
            rows.append(name | _average([self.log.row(key) for key in keys]) | self._distances(keys, truths))
        if self.sets is not None and truths is not None and (halves := self.sets.halves(truths)):
            rows.append({"method": HALVES, "images": len(truths), **halves})
        return _aligned(rows)

    def _distances(self, keys: Sequence[str], truths: Sequence[Tensor] | None) -> dict[str, float]:
        """Return the distances of a method's first samples from the truths, where all that it finished were kept."""
        done = [(i, self.log.image(key)) for i, key in enumerate(keys) if "remark" not in self.log.row(key)]
        images = [image for _, image in done if image is not None]
        if self.sets is None or truths is None or not done or len(images) < len(done):
            return {}
        return self.sets.between(self.sets.features(images), [truths[i] for i, _ in done])


def _aligned(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with the same columns in the same order, None where there is nothing."""
    names = ("method", "preset", "steps", "images", *QUALITY, *COLUMNS, *COUNTS, "seconds", "memory MiB", "remark")
    found = {name for row in rows for name, value in row.items() if value is not None}
    return [{name: row.get(name) for name in names if name in found or name not in OPTIONAL} for row in rows]


def _average(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the means over the rows that are no failures, of the measures that all of them have."""
    done = [row for row in rows if "remark" not in row]
    out: dict[str, Any] = {"images": len(done)}
    partial = []
    for measure in MEASURES:
        values = [float(row[measure]) for row in done if row.get(measure) is not None]
        if 0 < len(values) < len(done):
            partial.append(f"{measure} is known for {len(values)} of {len(done)} images only")
        whole = bool(values) and len(values) == len(done) and all(map(math.isfinite, values))
        mean = statistics.fmean(values) if whole else None
        out[measure] = int(mean) if mean is not None and measure in COUNTS and mean.is_integer() else mean
    said = [row[key] for key in ("remark", "missing", "verdict") for row in rows if row.get(key)]
    return out | {"remark": "; ".join([*dict.fromkeys(said), *partial]) or None}
