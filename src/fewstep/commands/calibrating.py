"""`fewstep calibrate`: intervals of a trained sampler that hold, fitted on photographs and stored beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID
from rich.table import Table

from fewstep.calibrated import Calibrations, Plan, calibrate, outer, with_measured
from fewstep.core.files import read_header
from fewstep.data import list_images, load_pixels
from fewstep.devices import pick_device
from fewstep.measurements import Family
from fewstep.priors.loaders import load_prior
from fewstep.recipes import build, read_recipe
from fewstep.task import Settings, build_sampler
from fewstep.unfolded.sampler import UnfoldedSampler
from fewstep.unfolded.store import CALIBRATION, available_networks, copy_network, find_network

METHOD = "ud2m"


def run(  # noqa: PLR0913 - one parameter is one option
    network: str,
    photos: Path,
    plan: Plan,
    console: Console,
    *,
    fields: dict[str, Any],
    recipe: str | None,
    limit: int | None,
    device: str | None,
    out: Path | None,
) -> Calibrations:
    """Calibrate the sampler that `restore --method ud2m --set network=NETWORK` runs, write the file, print the factors.

    Args:
        network: name or folder of a trained sampler.
        photos: folder of photographs.
        plan: how.
        console: to print to.
        fields: of the sampler.
        recipe: name or file of that whose operators are calibrated for; that of the network where absent.
        limit: the last photographs in sorted order, so many of them.
        device: where to run.
        out: folder for a copy of the network with its calibrations; they go beside the weights where absent.

    Raises:
        ValueError: the network, the recipe or the photographs cannot be used, or the folder has calibrations that do not go with
            these.
    """
    header = read_header(find_network(network))
    families = families_of(header.get("recipe") if recipe is None else recipe)
    if out is None and network in available_networks():
        raise ValueError(f"{network} is shipped: give --out, a folder for a copy of it with your calibrations")
    trained_with = header.get("prior")
    if trained_with is None:
        raise ValueError(f"{network} does not say which prior it was trained with: nothing to calibrate it under")
    sampler = build_sampler(
        Settings(method=METHOD, method_fields={**fields, "network": network}, prior=str(trained_with))
    )
    assert isinstance(sampler, UnfoldedSampler) and sampler.folder is not None
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    place = pick_device(device)
    sampler.unfolded().to(place)
    prior = load_prior(str(trained_with)).to(place)
    home = sampler.folder if out is None else out
    blank = Calibrations(str(header["sha256"]), outer(sampler), plan.crop, tuple(with_measured(families)[0]), ())
    with_earlier(blank, home)  # what does not go with these is refused before the work
    images = [load_pixels(path, plan.crop) for path in list_images(photos)[-(limit or 0) :]]
    with Progress(console=console, transient=True) as bar:
        rows: dict[str, TaskID] = {}

        def report(word: str, done: int, total: int) -> None:
            if word not in rows:
                rows[word] = bar.add_task(word, total=total)
            bar.update(rows[word], completed=done)

        found = calibrate(sampler, prior, images, families, plan, report)
    whole = with_earlier(found, home)
    if home.resolve() != sampler.folder.resolve():
        copy_network(sampler.folder, home)
    path = whole.save(home)
    console.print(table(found))
    console.print(f"written to {escape(str(path))}")
    return found


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
        out.add_row(escape(entry.name), f"{c.level:g}", str(c.num_samples), str(c.images), f"{c.factor:.3f}")
    return out
