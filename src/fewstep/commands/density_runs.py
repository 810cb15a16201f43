"""What `fewstep density` does with a trained sampler: draws into a file, a diagnosis into a report, a map into a program."""

from __future__ import annotations

import inspect
import json
import shlex
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape

from fewstep.commands.density_target import RUN, Named, read_run
from fewstep.commands.listing import field_table, plain_table
from fewstep.core.density import Bounds, TargetDensity
from fewstep.core.files import check_target, write_bytes
from fewstep.core.registry import available, get
from fewstep.densities.base import DensitySampler, load_density_sampler
from fewstep.densities.diagnosis import Diagnosis, diagnose, summary
from fewstep.densities.distill import METHODS
from fewstep.densities.draws import Draws
from fewstep.densities.export import export as write_program
from fewstep.densities.report import distance_line, expectation_line, render, rows_of, stein_line, summary_rows
from fewstep.densities.storage import check_suffix, read_target
from fewstep.densities.students._sampler import MapSampler
from fewstep.densities.targets import available_targets, target_class
from fewstep.densities.user import UserDensity
from fewstep.outputs import REPORT, RESULT
from fewstep.records import versions, write_record


def sample(
    named: Named, folder: Path | None, drawing: Mapping[str, Any], out: Path | None, console: Console, errors: Console
) -> Draws:
    """Draw, write the draws to `out`, and print what their weights say.

    Args:
        named: the density.
        folder: of the sampler; that of `named` where it is None.
        drawing: the arguments of `DensitySampler.sample`, and "level" of the interval.
        out: a .safetensors, .npz or .csv file, or None.
        console: for the results.
        errors: for notes.
    """
    if out is not None:
        check_suffix(out)
    draws = _drawn(named, folder, drawing, console, errors)
    if out is not None:
        draws.save(out, named.record)
        console.print(f"{len(draws)} draws: {escape(str(out))}", highlight=False)
    show(console, summary_rows(summary(draws, drawing["level"]), named.density))
    return draws


def diagnosis(  # noqa: PLR0913 - what is drawn, or a file of draws
    named: Named,
    folder: Path | None,
    drawing: Mapping[str, Any],
    out: Path,
    console: Console,
    errors: Console,
    *,
    file: Path | None = None,
    rows: int = 1000,
) -> Diagnosis:
    """Compare draws, of a sampler or from `file`, with their density; write report.html and result.json into `out`."""
    if file is not None and folder is not None:
        raise ValueError("give --from or --draws, not both")
    check_target(out / RESULT)
    draws = _read(file, named, errors) if file is not None else _drawn(named, folder, drawing, console, errors)
    with notes(errors), console.status("comparing"):
        found = diagnose(draws, named.density, rows=rows, level=drawing["level"])
    source = str(file or folder or named.folder)
    out.mkdir(parents=True, exist_ok=True)
    record = {"target": named.record, "source": source, **found.record()}
    write_record(out / RESULT, {**record, "command": command_line(), "versions": versions()})
    title = f"Draws of {named.name}"
    write_bytes(out / REPORT, render(found, title, command_line()).encode())
    show(console, rows_of(found))
    show(console, {name: distance_line(d) for name, d in found.distances.items()})
    show(console, {} if found.stein is None else {"squared KSD": stein_line(found.stein)})
    show(console, {name.replace("_", " "): expectation_line(v) for name, v in found.known.items()})
    for line in found.warnings():
        console.print(f"[yellow]note:[/] {escape(line)}", highlight=False)
    console.print(f"report: {escape(str(out / REPORT))}", highlight=False)
    return found


def _read(file: Path, named: Named, errors: Console) -> Draws:
    """Return the draws in `file`; a note says where they are of another density."""
    draws, target = Draws.load(file), read_target(file)
    if target is not None and target != json.loads(json.dumps(named.record)):
        told = f"{file} holds draws of {described(target)}: weights that it has are not of this density"
        errors.print(f"[yellow]note:[/] {escape(told)}", highlight=False)
    return draws


def export(named: Named, folder: Path | None, out: Path, steps: int, console: Console, errors: Console) -> None:
    """Write the map of a sampler as a program of its own, see `densities.export`."""
    sampler, place = load(named, folder, "--from", errors)
    if not isinstance(sampler, MapSampler):
        raise ValueError(f"{place} draws by paths, not by a map: distil it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_program(sampler, out, steps)
    except ImportError as error:
        raise ValueError(str(error)) from None
    console.print(f"z -> x in {steps} {'step' if steps == 1 else 'steps'}: {escape(str(out))}", highlight=False)


def target_table(name: str | None, taken: Collection[str] = ()) -> RenderableType:
    """Return one row per density of the zoo, or the fields of one; those with a name that is `taken` need --set."""
    if name is not None:
        return field_table(target_class(name))
    table = plain_table("density", "d", "log Z", "exact draws", "options", "what")
    for word in available_targets():
        table.add_row(word, *_facts(target_class(word), taken))
    return table


def sampler_table(name: str | None) -> RenderableType:
    """Return one row per sampler that `fit` trains and per method of `distill`, or the fields of one."""
    if name is not None:
        return field_table(METHODS[name] if name in METHODS else get(name, "teachers"))
    table = plain_table("sampler", "by", "loss", "source", "what")
    for word in available("teachers"):
        kind = get(word, "teachers")
        table.add_row(word, "fit", kind.default_loss, escape(str(kind.reference)), escape(_first_line(kind)))
    for word, method in METHODS.items():
        table.add_row(word, "distill", "", escape(str(method.reference)), escape(_first_line(method)))
    return table


def load(named: Named, folder: Path | None, option: str, errors: Console) -> tuple[DensitySampler, Path]:
    """Return the sampler in `folder`, or in the folder that stood for the density, and where it was.

    Raises:
        ValueError: neither is there, or the folder does not fit.
    """
    place = folder or named.folder
    if place is None:
        raise ValueError(f"which sampler? give {option} FOLDER, written by `fewstep density fit` or `distill`")
    run = read_run(place) if (place / RUN).is_file() else {"target": named.record}
    if run["target"] != named.record:
        told = f"{place} was trained for {described(run['target'])}"
        errors.print(f"[yellow]note:[/] {escape(told)}", highlight=False)
    if run.get("interrupted"):
        told = f"the training in {place} was interrupted after step {run['steps_done']}"
        errors.print(f"[yellow]note:[/] {escape(told)}", highlight=False)
    return load_density_sampler(place, named.density), place


def show(console: Console, rows: Mapping[str, str]) -> None:
    """Print names and values in two columns."""
    width = max((len(name) for name in rows), default=0)
    for name, value in rows.items():
        console.print(f"{name:{width}s}  {escape(value)}", highlight=False)


@contextmanager
def notes(errors: Console) -> Iterator[None]:
    """Print warnings as one line each."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: errors.print(
            f"[yellow]note:[/] {escape(str(message))}", highlight=False
        )
        yield


def described(record: Mapping[str, Any]) -> str:
    """Return the record of a density in words."""
    given = ", ".join(f"{name} = {value}" for name, value in record["fields"].items())
    changed = "" if "path" not in record else " as it was then"
    return f"{record.get('path', record.get('name'))}{f' ({given})' if given else ''}{changed}"


def command_line() -> str:
    """Return the line that started this program."""
    return shlex.join(["fewstep", *sys.argv[1:]])


def _drawn(named: Named, folder: Path | None, drawing: Mapping[str, Any], console: Console, errors: Console) -> Draws:
    """Return new draws, and say where the density was not finite."""
    sampler, _ = load(named, folder, "--from", errors)
    given = {name: value for name, value in drawing.items() if name != "level"}
    with notes(errors), console.status("sampling"):
        draws = sampler.sample(given.pop("num"), **given)
    density = named.density
    if isinstance(density, UserDensity) and density.tally.nonfinite_values:
        told = f"{density.tally.nonfinite_values} of {density.tally.values} values of {named.name} are NaN or +inf"
        errors.print(f"[yellow]note:[/] {escape(told)}; they count as no mass", highlight=False)
    return draws


def _facts(kind: type[TargetDensity], taken: Collection[str]) -> list[str]:
    """Return d, log Z, whether exact draws exist, the options, and the first line of what it is, as far as the class knows."""
    own: Any = fields(kind)  # type: ignore[arg-type]
    known: Any = kind if any(f.default is MISSING for f in own) else kind()  # a class alone knows what is fixed
    dim, log_z, bounds = (getattr(known, name, None) for name in ("dim", "log_z", "log_z_bounds"))
    told = f"{bounds.low:g} to {bounds.high:g}" if isinstance(bounds, Bounds) else "-"
    return [
        str(dim) if isinstance(dim, int) else "-",
        f"{log_z:.6g}" if isinstance(log_z, float) else told,
        "yes" if kind.sample is not TargetDensity.sample else "no",
        " ".join(f"--set {f.name}=" if f.name in taken else f"--{f.name.replace('_', '-')}" for f in own),
        escape(_first_line(kind)),
    ]


def _first_line(kind: type) -> str:
    return (inspect.getdoc(kind) or "").partition("\n")[0]
