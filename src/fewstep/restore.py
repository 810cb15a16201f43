"""The main job as one function: a photograph in, samples of what it may have been and how far to trust them out."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.calibrated import Asked, Verdict, judge
from fewstep.core.denoiser import Denoiser
from fewstep.core.files import check_target, write_bytes
from fewstep.core.linalg import Unconverged
from fewstep.core.problem import Posterior
from fewstep.core.sampler import Sampler, settings
from fewstep.core.signals import stop_signals
from fewstep.devices import device_name, pick_device
from fewstep.images import list_photos, read_photo, save_image
from fewstep.operators.grey import in_colour, luma
from fewstep.operators.image import to_unit
from fewstep.outputs import REPORT, RESULT, check_free, clear, std_map, width_map, write_summary
from fewstep.priors.loaders import load_prior
from fewstep.priors.windowed import Windowed
from fewstep.records import versions, write_record
from fewstep.report import Map, Picture, Report, render
from fewstep.scores import Truth
from fewstep.store import SampleStore, Summary
from fewstep.task import (
    DEFAULT_PRIOR,
    Settings,
    Task,
    build_sampler,
    build_word,
    command_line,
    prepare,
    settled,
    word_of,
)

__all__ = ["DEFAULT_PRIOR", "Result", "Settings", "restore", "restore_folder"]

_HALF = 1 << 28  # numbers in all samples beyond which they are stored in half precision

Progress = Callable[[str, int, int, int], None]  # (file name, steps done, steps in all, network calls done)


@dataclass(frozen=True)
class Result:
    """What was restored.

    Attributes:
        folder: where everything lies.
        record: the content of `result.json`.
        summary: mean, standard deviation and interval in [0, 1]; None where nothing was finished.
    """

    folder: Path
    record: dict[str, Any]
    summary: Summary | None

    @property
    def interrupted(self) -> bool:
        """Whether the run was stopped before its last sample."""
        return bool(self.record["interrupted"])


def restore(
    path: str | Path,
    out: str | Path,
    chosen: Settings | None = None,
    *,
    progress: Progress | None = None,
    prior: Denoiser | None = None,
) -> Result:
    """Restore one photograph into the folder `out`.

    It writes measurement.png, sample-00.png, ..., samples.safetensors, mean.png, std.png, interval-low.png,
    interval-high.png, interval-width.png, report.html and result.json, each whole or not at all. After an interruption
    (KeyboardInterrupt) the finished samples are kept and summarised, and `Result.interrupted` is true. What an earlier run wrote
    is there until the first sample of this one is drawn.

    Args:
        path: an image file.
        out: a folder, made where it is missing; what an earlier run wrote there is replaced, files of others are refused.
        chosen: how; the defaults where None.
        progress: called after every step.
        prior: used instead of `chosen.prior`.

    Raises:
        ValueError: bad input, with cause and way out.
        FloatingPointError: the run diverged.
        OSError: the folder cannot be written.
    """
    check_target(Path(out) / RESULT)
    chosen = chosen or Settings()
    photo = read_photo(path)
    chosen = settled(chosen, word_of(photo, chosen))
    sampler = build_sampler(chosen)
    device = pick_device(chosen.device)
    task = prepare(photo, chosen, device)
    denoiser = _windowed(prior or load_prior(chosen.prior), chosen.window).to(device)
    task = _in_channels(task, denoiser)
    problem = Posterior(denoiser, task.likelihood)
    sampler.check(problem, chosen.samples)
    if chosen.lpips_weights is not None and not Path(chosen.lpips_weights).exists():
        raise ValueError(f"LPIPS weights {chosen.lpips_weights} do not exist")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    check_free(folder, photo.path)
    return _Run(folder, chosen, sampler, task, problem, progress).result()


def restore_folder(
    path: str | Path,
    out: str | Path,
    chosen: Settings,
    *,
    progress: Progress | None = None,
    share: tuple[int, int] = (0, 1),
) -> tuple[list[Result], dict[str, str]]:
    """Restore every photograph of a folder into a folder of its own name; return the results and what failed, and why.

    Args:
        path: a folder of images.
        out: the folder of the folders.
        chosen: how.
        progress: called after every step.
        share: (rank, processes): every process takes each `processes`-th image, starting with its rank.
    """
    check_target(Path(out) / RESULT)
    if chosen.method:  # an unknown method, operator or field fails once, not for every image
        build_sampler(chosen)
    if chosen.operator is not None:
        build_word(chosen.operator, chosen.operator_fields)
    prior = load_prior(chosen.prior)
    results: list[Result] = []
    failures: dict[str, str] = {}
    photos = list_photos(path)
    names = _names(photos)
    for photo in photos[share[0] :: share[1]]:
        try:
            results.append(restore(photo, Path(out) / names[photo], chosen, progress=progress, prior=prior))
        except (ValueError, FloatingPointError, OSError, NotImplementedError) as error:
            failures[photo.name] = str(error)
            continue
        if results[-1].interrupted:
            break
    return results, failures


class _Run:
    """One run: draws, writes what is finished, summarises."""

    def __init__(
        self,
        folder: Path,
        chosen: Settings,
        sampler: Sampler,
        task: Task,
        problem: Posterior,
        progress: Progress | None,
    ) -> None:
        self.folder, self.chosen, self.sampler, self.task = folder, chosen, sampler, task
        self.problem, self.progress = problem, progress
        self.scores = Truth(task.truth, chosen.lpips_weights)
        self.notes: tuple[str, ...] = task.notes
        self.begin = time.perf_counter()

    def result(self) -> Result:
        """Draw, and write everything, also when interrupted."""
        shape, interrupted = (1, *self.task.likelihood.event_shape), False
        dtype = torch.float16 if self.chosen.samples * math.prod(shape) > _HALF else torch.float32
        with SampleStore(self.folder, shape, dtype) as store:
            with _unconverged() as stopped_short:
                try:
                    self._draw(store)
                except KeyboardInterrupt:
                    interrupted = True
            if stopped_short:
                told = "a solver stopped before it converged, so that samples keep to the measurement less closely than asked"
                self.notes += (f"{told}; {self.task.word.easier} helps",)
            with stop_signals() as stopped:  # what is drawn is summarised in any case
                verdict = self._verdict(store.count)
                calibration = verdict.calibration if verdict else None
                whole = store.summary(self.output, self.chosen.level, calibration) if store.count else None
                summary = None if whole is None else self._framed(whole)
            interrupted = interrupted or stopped()
        record = self._record(store, summary, interrupted, verdict)
        if summary is None:
            if (self.folder / RESULT).is_file():
                return Result(self.folder, record, None)  # what an earlier run wrote stays
            self._begin()
        write_record(self.folder / RESULT, record)
        self._write_report(record, summary)
        return Result(self.folder, record, summary)

    def output(self, x: Tensor) -> Tensor:
        """Return samples, (..., 3, H, W), as what is delivered: in [0, 1], and grey where the photograph is."""
        x = to_unit(x).clamp(0, 1)
        return luma(x).expand_as(x) if self.task.photo.grey else x

    def _framed(self, summary: Summary) -> Summary:
        """Return the statistics within the frame of the photograph; what lies beyond it is only in the samples."""
        framed = self.task.word.framed
        others = (None if x is None else framed(x) for x in (summary.std, summary.lower, summary.upper))
        return Summary(framed(summary.mean), *others)

    def _verdict(self, count: int) -> Verdict | None:
        """Return what is known of the intervals of `count` samples; None where the method is no trained sampler."""
        task, chosen = self.task, self.chosen
        asked = Asked(task.word.seen(task.y), task.sigma, count, chosen.level, chosen.paired)
        verdict = judge(self.sampler, asked)
        if verdict is None or not task.photo.grey:
            return verdict
        return Verdict(None, (*verdict.outside, "grey"), "not calibrated: the photographs of calibration are in colour")

    def _draw(self, store: SampleStore) -> None:
        for part in self.sampler.stream(
            self.problem,
            self.chosen.samples,
            seed=self.chosen.seed,
            chunk=self._chunk(),
            antithetic=self.chosen.paired,
            callback=self._report,
        ):
            if not store.count:
                self._begin()
            for number, x in enumerate(part.x, part.first):
                sample = self.task.word.framed(self.output(x.float().cpu()))
                self._save(sample, f"sample-{number:02d}.png")
                self.scores.see(sample)
            store.append(part)

    def _begin(self) -> None:
        """Make room for the results of this run, now that there are some, and write what they came from."""
        task = self.task
        clear(self.folder)
        write_record(self.folder / RESULT, {"input": str(task.photo.path), "num_samples": 0, "interrupted": True})
        self._save(task.shown, "measurement.png")
        if task.truth is not None:
            self._save(task.truth, "truth.png")

    def _save(self, x: Tensor, name: str) -> None:
        photo = self.task.photo
        save_image(x, self.folder / name, grey=photo.grey, profile=photo.profile)

    def _chunk(self) -> int:
        """Return how many samples run together: the bound on memory, without any effect on the result."""
        pixels = math.prod(self.task.likelihood.event_shape[-2:])
        return max(1, (1 << 22 if self.task.likelihood.device.type == "cuda" else 1 << 18) // pixels)

    def _report(self, done: int, total: int, _state: Any) -> None:
        if self.progress is not None:
            calls = round(done / total * self.sampler.nfe * self.chosen.samples)
            self.progress(self.task.photo.path.name, done, total, calls)

    def _record(
        self, store: SampleStore, summary: Summary | None, interrupted: bool, verdict: Verdict | None
    ) -> dict[str, Any]:
        task, chosen = self.task, self.chosen
        maps = write_summary(self.folder, summary, task.photo.grey, task.photo.profile) if summary else {}
        return {
            "input": str(task.photo.path),
            "size": list(task.baseline.shape[1:]),
            "method": {"name": chosen.method, **settings(self.sampler)},
            "exact": self.sampler.exact,
            "operator": {"name": task.word.word, "description": task.word.seen(task.y).describe()},
            "sigma": task.sigma,
            "prior": chosen.prior,
            "seed": chosen.seed,
            "num_samples": store.count,
            "antithetic": chosen.paired,
            "interrupted": interrupted,
            "nfe": store.counts.network,
            "vjp": store.counts.vjp,
            "operator_calls": store.counts.operator,
            "seconds": round(time.perf_counter() - self.begin, 3),
            "device": device_name(task.likelihood.device),
            "level": chosen.level,
            **(_promise(verdict) if verdict else {}),
            "white": maps,
            "notes": list(self.notes),
            "versions": versions(),
            **self.scores.scores(task.baseline, summary, chosen.level),
        }

    def _write_report(self, record: dict[str, Any], summary: Summary | None) -> None:
        if summary is None or self.scores.first is None:
            return
        percent = f"{100 * self.chosen.level:.0f} %"
        pictures = [
            Picture("Measurement", self.task.baseline),
            Picture("Mean: the average of the samples", summary.mean),
            Picture("Sample: one of them", self.scores.first),
            *([Picture("Truth", self.task.truth)] if self.task.truth is not None else []),
        ]
        maps = []
        if summary.std is not None:
            maps = [
                Map("Standard deviation", std_map(summary)),
                Map(f"Width of the {percent} interval", width_map(summary)),
            ]
        report = Report(
            title=f"{self.task.photo.path.name}, restored",
            lead=f"{record['num_samples']}{' antithetic' * self.chosen.paired} samples by {self.chosen.method} "
            f"under {record['operator']['description']}",
            pictures=pictures,
            maps=maps,
            table={k: v for k, v in record.items() if v not in (None, [], {})},
            command=command_line(self.task.photo.path, self.folder, self.chosen),
            limit=f"{self.chosen.method} converges to: {self.sampler.limit}.",
            reference=self.sampler.reference,
            warnings=_warnings(record, self.sampler),
            profile=None if self.task.photo.grey else self.task.photo.profile,  # the report is in RGB
        )
        write_bytes(self.folder / REPORT, render(report).encode(errors="replace"))  # names may be no valid UTF-8


def _warnings(record: dict[str, Any], sampler: Sampler) -> list[str]:
    """Return what the reader of a report must not miss."""
    lines = []
    if record["interrupted"]:
        lines.append(f"The run was interrupted; this is what {record['num_samples']} finished samples say.")
    if sampler.exact == "mode":
        lines.append("This method gives a point estimate: the spread of its samples is no uncertainty.")
    elif record.get("calibrated") and not record["outside_card"]:
        lines.append(f"Intervals: {record['intervals']}.")
    elif sampler.exact == "biased":
        lines += [f"Intervals: {record['intervals']}."] if "intervals" in record else []
        lines.append(
            "This method does not sample the exact posterior: read the intervals as its own, not as guaranteed."
        )
    return lines


def _promise(verdict: Verdict) -> dict[str, Any]:
    """Return what `result.json` says of the intervals of a trained sampler."""
    return {
        "intervals": verdict.text,
        "calibrated": verdict.calibration is not None,
        "outside_card": list(verdict.outside),
    }


@contextmanager
def _unconverged() -> Iterator[list[str]]:
    """Give a list that takes what iterative solvers that stop too early say; other warnings pass."""
    found: list[str] = []
    with warnings.catch_warnings():
        show = warnings.showwarning

        def take(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
            if issubclass(category, Unconverged):
                found.append(str(message))
            else:
                show(message, category, *place, **options)

        warnings.simplefilter("always", Unconverged)
        warnings.showwarning = take
        yield found


def _windowed(prior: Denoiser, window: int) -> Denoiser:
    """Return the prior in windows where it takes images of any size."""
    return Windowed(prior, window) if None in prior.event_shape else prior


def _in_channels(task: Task, prior: Denoiser) -> Task:
    """Return the task in the channels of the prior: a grey likelihood becomes one of the luma of colour images."""
    given, wanted = task.likelihood.event_shape[0], prior.event_shape[0]
    if given == 1 and wanted == 3:
        return replace(task, likelihood=in_colour(task.likelihood))
    if given != wanted:
        raise ValueError(f"the prior is of {wanted} channels, the measurement of an image of {given}")
    truth = None if task.truth is None else task.truth[:, :wanted]  # a grey image is held as three equal channels
    return replace(task, truth=truth, baseline=task.baseline[:, :wanted])


def _names(photos: list[Path]) -> dict[Path, str]:
    """Return a folder name for each file: its stem, or its whole name where two files share a stem."""
    stems = [photo.stem for photo in photos]
    names: dict[Path, str] = {}
    for photo in photos:
        name = photo.stem if stems.count(photo.stem) == 1 else photo.name.replace(".", "-")
        while name in names.values():
            name += "-2"
        names[photo] = name
    return names
