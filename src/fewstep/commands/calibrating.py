"""`fewstep calibrate`: intervals of a trained sampler that hold, fitted on photographs and stored beside its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID
from rich.table import Table
from torch import Tensor

from fewstep.calibrated import Calibrations, Plan, calibrate, outer, with_measured
from fewstep.core.checks import check_count
from fewstep.core.files import check_target, read_header
from fewstep.data import list_images, load_pixels
from fewstep.devices import pick_device
from fewstep.measurements import Family
from fewstep.priors.loaders import load_prior
from fewstep.recipes import build, read_recipe
from fewstep.task import Settings, build_sampler
from fewstep.unfolded.sampler import UnfoldedSampler
from fewstep.unfolded.store import CALIBRATION, available_networks, copy_network, find_network

METHOD = "ud2m"


@dataclass(frozen=True)
class Job:
    """What is calibrated, on what, and where it goes.

    Attributes:
        network: name or folder of a trained sampler.
        photos: folder of photographs.
        fields: of the sampler.
        recipe: name or file of that whose operators are calibrated for; that of the network where absent.
        limit: the last photographs in sorted order, so many of them.
        device: where to run.
        out: folder for a copy of the network with its calibrations; they go beside the weights where absent.
    """

    network: str
    photos: Path
    fields: Mapping[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    limit: int | None = None
    device: str | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.limit is not None:
            check_count("limit", self.limit)

    def images(self, crop: int) -> list[Tensor]:
        """Return the photographs, uint8, (3, H, W) each; ValueError where one is smaller than `crop`."""
        return [load_pixels(path, crop) for path in list_images(self.photos)[-(self.limit or 0) :]]

    def sampler(self, prior: str) -> UnfoldedSampler:
        """Return the sampler that `restore --method ud2m --set network=NETWORK` runs under the prior of that name."""
        fields = {**self.fields, "network": self.network}
        sampler = build_sampler(Settings(method=METHOD, method_fields=fields, prior=prior))
        assert isinstance(sampler, UnfoldedSampler)
        return sampler


def run(job: Job, plan: Plan, console: Console) -> Calibrations:
    """Calibrate the sampler of a job, write the file, print the factors.

    Raises:
        ValueError: the network, the recipe or the photographs cannot be used, or the folder has calibrations that do not go with
            these.
    """
    header = read_header(find_network(job.network))
    families = families_of(header.get("recipe") if job.recipe is None else job.recipe)
    if job.out is None and job.network in available_networks():
        raise ValueError(f"{job.network} is shipped: give --out, a folder for a copy of it with your calibrations")
    trained_with = header.get("prior")
    if trained_with is None:
        raise ValueError(f"{job.network} does not say which prior it was trained with: nothing to calibrate it under")
    sampler, place = job.sampler(str(trained_with)), pick_device(job.device)
    assert sampler.folder is not None
    sampler.unfolded().to(place)
    prior = load_prior(str(trained_with)).to(place)
    home = sampler.folder if job.out is None else job.out
    check_target(home / CALIBRATION)
    blank = Calibrations(str(header["sha256"]), outer(sampler), plan.crop, tuple(with_measured(families)[0]), ())
    with_earlier(blank, home)  # what does not go with these is refused before the work
    images = job.images(plan.crop)
    with _bars(console) as report:
        found = calibrate(sampler, prior, images, families, plan, report)
    whole = with_earlier(found, home)
    if home.resolve() != sampler.folder.resolve():
        copy_network(sampler.folder, home)
    path = whole.save(home)
    console.print(table(found))
    console.print(f"written to {escape(str(path))}")
    return found


@contextmanager
def _bars(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Give a function (word, done, total) that shows a bar for each word."""
    with Progress(console=console, transient=True) as bar:
        rows: dict[str, TaskID] = {}

        def report(word: str, done: int, total: int) -> None:
            if word not in rows:
                rows[word] = bar.add_task(word, total=total)
            bar.update(rows[word], completed=done)

        yield report


def with_earlier(found: Calibrations, folder: Path) -> Calibrations:
    """Return calibrations with those that lie in a folder already, of the same weights.

    Raises:
        ValueError: these are of other outer steps, crops or families.
    """
    try:
        earlier = Calibrations.load(folder)
    except ValueError:  # none, damaged, or of weights that are gone
        return found
    try:
        return found.joined(earlier)
    except ValueError as reason:
        raise ValueError(f"in {folder} {reason}: delete {CALIBRATION}, or give another --out") from None


def families_of(recipe: str | Mapping[str, Any] | None) -> tuple[Family, ...]:
    """Return the operators that a recipe, or the one in a network's header, trains on; ValueError where it has none."""
    given = read_recipe(recipe) if isinstance(recipe, str) else recipe
    entries = given.get("families", ()) if isinstance(given, Mapping) else getattr(given, "families", ())
    if not entries:
        what = f"the recipe {recipe}" if isinstance(recipe, str) else "the network's header"
        raise ValueError(f"{what} has no families of operators to calibrate for: name a recipe that has, --recipe")
    return tuple(build(Family, entry, "families") for entry in entries)


def table(found: Calibrations) -> Table:
    """Return the factors, one row per entry."""
    out = Table("operator", "level", "samples", "photographs", "factor", box=None, pad_edge=False)
    for entry in found.entries:
        c = entry.calibration
        number = f"{c.num_samples}{' antithetic' * c.antithetic}"
        out.add_row(escape(entry.name), f"{c.level:g}", number, str(c.images), f"{c.factor:.3f}")
    return out
