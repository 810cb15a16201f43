"""`fewstep sample` and `fewstep tune`: samples of a prior, and the schedule of few steps that suits it best."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional as F

from fewstep.core.denoiser import Denoiser
from fewstep.core.files import check_target
from fewstep.core.likelihood import FlatLikelihood
from fewstep.core.multistep import Solver
from fewstep.core.names import suggestion
from fewstep.core.problem import Posterior
from fewstep.devices import pick_device
from fewstep.images import save_image
from fewstep.options import typed_fields
from fewstep.priors.loaders import load_prior
from fewstep.records import versions, write_record
from fewstep.tuning.align import AlignYourSteps
from fewstep.tuning.base import Report, Task, Tuner, Tuning
from fewstep.tuning.ggdm import GGDM
from fewstep.tuning.schedule_file import SOLVER, TunedSchedule, solver_of
from fewstep.tuning.search import SolverSearch

SIZE = 64  # side of an image of a prior that takes any, pixels
TUNERS: dict[str, type[Tuner]] = {"ays": AlignYourSteps, "ggdm": GGDM, "s3": SolverSearch}


@dataclass(frozen=True)
class Source:
    """What is sampled.

    Attributes:
        prior: name or folder of the prior.
        size: height and width of the images where the prior takes any; None for its own, or 64.
        label: class, for a prior that knows classes; None for all of them.
        device: "cpu", "cuda", ...; None takes a GPU where there is one.
    """

    prior: str
    size: int | None = None
    label: int | None = None
    device: str | None = None

    def problem(self) -> Posterior:
        """Return the prior without a measurement.

        Raises:
            ValueError: the prior cannot be had, has another size, or knows no such class.
        """
        device = pick_device(self.device)
        prior = load_prior(self.prior).to(device)
        shape = self.shape(prior)
        cond = {} if self.label is None else {"label": torch.tensor(self.label, device=device)}
        problem = Posterior(prior, FlatLikelihood(shape, device=device), cond)
        try:
            problem.denoise(torch.zeros(1, *shape, device=device), torch.ones((), device=device))
        except TypeError as error:
            raise ValueError(f"{self.prior}: {error}") from None
        return problem

    def shape(self, prior: Denoiser) -> tuple[int, ...]:
        """Return the shape of one sample; ValueError where a size is asked for that the prior does not have."""
        own = prior.event_shape
        if self.size is not None and (self.size < 1 or any(n not in (None, self.size) for n in own[1:])):
            raise ValueError(f"{self.prior} makes samples of shape {own}, not of size {self.size}")
        return tuple(n if n is not None else self.size or SIZE for n in own)


@dataclass(frozen=True)
class Drawing:
    """How it is sampled.

    Attributes:
        solver: name of the solver; None for that of the schedule, or DPM-Solver++.
        steps: its steps; None for those of the schedule, or of the solver.
        fields: further fields of the solver, as values or as text.
        schedule: file of a tuned schedule.
        num_samples: how many.
        seed: sample k depends on the seed and k alone.
        chunk: samples that go through the network at once.
    """

    solver: str | None = None
    steps: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    schedule: Path | None = None
    num_samples: int = 16
    seed: int = 0
    chunk: int = 64

    def sampler(self) -> Solver:
        """Return the solver; ValueError where there is none of that name, or a field that it does not have."""
        given = dict(self.fields) | ({} if self.steps is None else {"steps": self.steps})
        return solver_of(self.solver, self.schedule, given)


def sample(
    source: Source,
    drawing: Drawing,
    console: Console,
    *,
    out: Path | None,
    grid_image: Path | None,
    quiet: bool = False,
) -> Tensor:
    """Draw samples; write samples.safetensors and sampling.json into `out`, one picture of all of them to `grid_image`.

    Returns:
        The samples, (num, *event), in the coordinates of the prior.
    """
    if out is None and grid_image is None:
        raise ValueError("nothing would be kept: give --out, --grid-image or both")
    for path in (grid_image, None if out is None else out / "samples.safetensors"):
        if path is not None:
            check_target(path)
    solver, problem = drawing.sampler(), source.problem()
    if grid_image is not None and (
        len(problem.likelihood.event_shape) != 3 or problem.likelihood.event_shape[0] not in (1, 3)
    ):
        raise ValueError(
            f"samples of shape {tuple(problem.likelihood.event_shape)} are no images; leave --grid-image out"
        )
    with progress(console, "sampling", quiet) as report:
        drawn = solver(
            problem, drawing.num_samples, seed=drawing.seed, chunk=drawing.chunk, callback=lambda k, n, _: report(k, n)
        )
    x = drawn.x[:, 0].cpu()
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        drawn.save(out)
        record = {**vars(source), "method": drawn.method, "samples": drawing.num_samples, "seed": drawing.seed}
        write_record(
            out / "sampling.json", {**record, "nfe": drawn.nfe, "seconds": drawn.seconds, "versions": versions()}
        )
    if grid_image is not None:
        grid_image.parent.mkdir(parents=True, exist_ok=True)
        save_image(contact_sheet((x + 1) / 2), grid_image)
    places = " and ".join(escape(str(place)) for place in (out, grid_image) if place is not None)
    console.print(f"{drawing.num_samples} samples, {drawn.nfe} network calls each, {drawn.seconds:.1f} s: {places}")
    return x


def tune(  # noqa: PLR0913 - one parameter is one option
    source: Source,
    method: str,
    steps: int,
    out: Path,
    console: Console,
    *,
    solver: str = SOLVER,
    seed: int = 0,
    fields: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> TunedSchedule:
    """Tune a schedule and write it to `out`; what was done so far is kept beside it and taken up by the next run.

    Raises:
        ValueError: an unknown method or field, or a file of an unfinished tuning with other settings.
    """
    if method not in TUNERS:
        raise ValueError(f"unknown method {method!r}; {suggestion(method, TUNERS)}")
    check_target(out)
    tuner = TUNERS[method](**typed_fields(TUNERS[method], fields or {}, f"method {method}"))
    task = Task(source.problem(), steps, solver, seed)
    with progress(console, method, quiet) as report:
        found = Tuning(tuner, task, source.prior, out.with_name(f"{out.name}.partial")).run(report)
    found.save(out)
    told = ", ".join(f"{name} {value:.4g}" for name, value in found.figures.items())
    console.print(f"{steps} steps of {escape(found.solver)}: {told}; written to {escape(str(out))}", highlight=False)
    return found


def contact_sheet(x: Tensor, gap: int = 2) -> Tensor:
    """Return all images side by side, (N, C, H, W) -> (C, rows (H + gap) + gap, columns (W + gap) + gap), white between."""
    columns = math.ceil(math.sqrt(len(x)))
    rows = math.ceil(len(x) / columns)
    framed = F.pad(x, (0, gap, 0, gap), value=1.0)
    blank = torch.ones_like(framed[:1]).expand(rows * columns - len(x), -1, -1, -1)
    grid = torch.cat([framed, blank]).unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
    return F.pad(grid.flatten(3).flatten(1, 2), (gap, 0, gap, 0), value=1.0)


@contextmanager
def progress(console: Console, name: str, quiet: bool) -> Iterator[Report]:
    """Give a callback that draws a bar with the time left."""
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left"))
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
