"""`fewstep calibrate`: intervals of a trained sampler that hold, fitted on photographs and stored beside its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID
from rich.table import Table

from fewstep.calibrated import Calibrations, Plan, calibrate
from fewstep.core.files import read_header
from fewstep.data import list_images, load_image
from fewstep.measurements import Family
from fewstep.recipes import build, read_recipe
from fewstep.restore import open_prior, pick_device
from fewstep.task import Settings, build_sampler
from fewstep.unfolded.sampler import UnfoldedSampler
from fewstep.unfolded.store import find_network

METHOD = "ud2m"


def run(  # noqa: PLR0913 - one parameter is one option
    network: str,
    photos: Path,
    plan: Plan,
    console: Console,
    *,
    fields: dict[str, Any],
    recipe: str,
    limit: int | None,
    device: str | None,
    out: Path | None,
) -> Calibrations:
    """Calibrate the sampler that `restore --method ud2m --set network=NETWORK` runs, write the file, print the factors.

    Raises:
        ValueError: the network, the recipe or the photographs cannot be used.
    """
    trained_with = read_header(find_network(network)).get("prior")
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
    prior = open_prior(str(trained_with)).to(place)
    images = [load_image(path) for path in list_images(photos)[-(limit or 0) :]]
    with Progress(console=console, transient=True) as bar:
        rows: dict[str, TaskID] = {}

        def report(word: str, done: int, total: int) -> None:
            if word not in rows:
                rows[word] = bar.add_task(word, total=total)
            bar.update(rows[word], completed=done)

        found = calibrate(sampler, prior, images, families_of(recipe), plan, report)
    path = found.save(out or sampler.folder)
    console.print(table(found))
    console.print(f"written to {escape(str(path))}")
    return found


def families_of(recipe: str) -> tuple[Family, ...]:
    """Return the operators that a recipe trains on; ValueError where it trains on none."""
    entries = getattr(read_recipe(recipe), "families", ())
    if not entries:
        raise ValueError(f"the recipe {recipe} has no families of operators to calibrate for")
    return tuple(build(Family, entry, "families") for entry in entries)


def table(found: Calibrations) -> Table:
    """Return the factors, one row per entry."""
    out = Table("operator", "level", "samples", "photographs", "factor", box=None, pad_edge=False)
    for entry in found.entries:
        c = entry.calibration
        out.add_row(escape(entry.name), f"{c.level:g}", str(c.num_samples), str(c.images), f"{c.factor:.3f}")
    return out
