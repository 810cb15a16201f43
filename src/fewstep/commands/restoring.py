"""`fewstep restore`: one photograph or a folder of them, with a progress bar."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fewstep.restore import Progress as Report
from fewstep.restore import Result, Settings, restore, restore_folder


def run(path: Path, out: Path, chosen: Settings, console: Console, errors: Console, *, quiet: bool) -> int:
    """Restore `path` into `out`; return the exit code: 0, 1 where an image failed, 130 where the run was interrupted."""
    failures: dict[str, str] = {}
    with _progress(errors, quiet) as report:
        if not path.is_dir():
            results = [restore(path, out, chosen, progress=report)]
        else:
            with _share() as share:
                results, failures = restore_folder(path, out, chosen, progress=report, share=share)
    for result in results:
        console.print(_line(result), highlight=False)
        for note in _notes(result.record):
            console.print(f"  {escape(note)}", highlight=False)
    for name, reason in failures.items():
        errors.print(f"[bold red]error:[/] {escape(name)}: {escape(reason)}", highlight=False)
    if any(result.interrupted for result in results):
        return 130
    return 1 if failures else 0


def _line(result: Result) -> str:
    record = result.record
    scores = {k: v for k, v in record.items() if k.startswith(("psnr", "ssim", "lpips", "coverage")) and v is not None}
    told = "".join(f", {name} {value:.3f}" for name, value in scores.items())
    stopped = "interrupted after " if record["interrupted"] else ""
    return escape(
        f"{result.folder}: {stopped}{record['num_samples']} samples, {record['nfe']} network calls each, "
        f"{record['seconds']:.1f} s{told}"
    )


def _notes(record: Mapping[str, Any]) -> list[str]:
    """Return what is told of a run beside its figures: what was done by what, and what the intervals are worth."""
    done = f"{record['method']['name']} on {record['operator']['description']}"
    worth = [f"intervals: {record['intervals']}"] if _doubtful(record) else []
    return [done, *record["notes"], *worth]


def _doubtful(record: Mapping[str, Any]) -> bool:
    """Return whether a trained sampler gave intervals that are not calibrated, or met an operator that nothing is promised for."""
    uncalibrated = not record.get("calibrated", True) and record["num_samples"] > 1
    return uncalibrated or bool(record.get("outside_card"))


@contextmanager
def _progress(console: Console, quiet: bool) -> Iterator[Report | None]:
    """Give a callback that draws a bar of network calls with the time left."""
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps, {task.fields[calls]} network calls,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    bar = Progress(*columns, console=console, transient=True)
    tasks: dict[str, TaskID] = {}

    def report(name: str, done: int, total: int, calls: int) -> None:
        if name not in tasks:
            bar.start()  # not before: an error about the input stands alone on its line
            tasks[name] = bar.add_task(escape(name), total=total, calls=0)
        bar.update(tasks[name], completed=done, calls=calls)

    try:
        yield report
    finally:
        if tasks:
            bar.stop()


@contextmanager
def _share() -> Iterator[tuple[int, int]]:
    """Give (rank, processes) under `accelerate launch`, (0, 1) otherwise."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield 0, 1
        return
    try:
        from accelerate import PartialState
    except ImportError:
        raise ValueError("started by a launcher, but accelerate is not installed; pip install fewstep[train]") from None
    from torch import cuda

    state = PartialState(cpu=not cuda.is_available())  # without it, processes on a CPU do not know of each other
    try:
        yield state.process_index, state.num_processes
        state.wait_for_everyone()  # a launcher stops the others as soon as one of them leaves with an error
    finally:
        state.destroy_process_group()
