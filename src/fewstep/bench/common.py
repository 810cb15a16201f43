"""What all benchmarks share: which samplers to run, the JSON report with its header, and tables made from it."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from fewstep import __version__
from fewstep.core.files import write_bytes
from fewstep.core.registry import available, get
from fewstep.core.sampler import Sampler
from fewstep.core.samples import Samples
from fewstep.options import assignments, typed_fields

FORMAT = "fewstep.bench"
WIDTH = 240  # columns of what is printed to a file
REMARK = "remark"  # the column that stands below a table instead of in it
FAILED = "failed"  # how the remark of a row without figures begins, which is made anew by the next run
OWNERS = ("method", "preset", "solver", "ablation", "choice")  # columns that name a row
# what a sampler may raise on a problem that it is not made for, or on which it diverges
FAILURES = (ValueError, TypeError, RuntimeError, ArithmeticError, NotImplementedError)


class Variant(NamedTuple):
    """One row of a table: a method, the preset its settings come from, and the sampler itself."""

    method: str
    preset: str
    sampler: Sampler


@dataclass
class Report:
    """The result of one benchmark.

    Attributes:
        benchmark: its name.
        settings: what it was run with.
        tables: rows by title of the table; each row maps columns to numbers, strings or None.
        notes: how to read the numbers, one line each.
    """

    benchmark: str
    settings: Mapping[str, Any]
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def write(self, out: str | Path) -> Path:
        """Write the report with its header to `out` as JSON, atomically."""
        path = Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, (json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n").encode())
        return path

    def finish(self, out: str | Path | None) -> Self:
        """Print the tables, write the report to `out` where given, and return it."""
        show(self.to_json())
        if out is not None:
            self.write(out)
        return self

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values; numbers that are not finite become strings."""
        body = {"settings": self.settings, "notes": self.notes, "tables": self.tables}
        return {"format": FORMAT, "benchmark": self.benchmark, "header": header(), **_plain(body)}


def variants(
    methods: Sequence[str] | None = None,
    budgets: Sequence[int] | None = None,
    *,
    every_preset: bool = True,
    kind: str = "methods",
) -> Iterator[Variant]:
    """Yield presets of methods as published, or once per budget with as many steps as its NFE allows.

    Args:
        methods: "name" or "name:preset", with fields of the method behind it as in "ud2m:photo:network=runs/own"; all that are
            available where absent.
        budgets: network calls per sample, 1 at least.
        every_preset: whether a bare name stands for all presets or for the first alone.
        kind: "methods" or "solvers".

    Raises:
        ValueError: an unknown method, preset or field, a value that is not of its type, a budget below 1, or steps beside a
            budget, which sets them.
    """
    if budgets and min(budgets) < 1:
        raise ValueError(f"budgets must be 1 or more, got {list(budgets)}")
    for entry in available(kind) if methods is None else methods:
        name, *rest = entry.split(":")
        method, chosen = get(name, kind), ":".join(word for word in rest if "=" not in word)
        given = typed_fields(method, assignments(word for word in rest if "=" in word), f"method {name}")
        if budgets and "steps" in given:
            raise ValueError(f"{entry}: the budget sets the steps")
        for preset in [chosen] if chosen else list(method.presets)[: None if every_preset else 1]:
            label = ":".join([preset, *(f"{field}={value}" for field, value in given.items())])
            for budget in budgets or (None,):
                make = partial(method.preset, preset, **given)
                sampler = make() if budget is None else within(make, budget)
                if sampler is not None:
                    yield Variant(name, label, sampler)


def within(make: Callable[..., Sampler], budget: int) -> Sampler | None:
    """Return the sampler with the most steps that make at most `budget` network calls, None where not even one fits.

    One that makes no network calls, or that has no field `steps`, is returned as it is.

    Args:
        make: gives it with `steps` as an argument, or as published.
        budget: of network calls per sample.
    """
    published = make()
    names: set[str] = {f.name for f in fields(published)} if is_dataclass(published) else set()
    if "steps" not in names or published.nfe == 0:
        return published
    low, high = 0, budget
    while low < high:
        middle = (low + high + 1) // 2
        if make(steps=middle).nfe <= budget:
            low = middle
        else:
            high = middle - 1
    return make(steps=low) if low else None


def describe(variant: Variant) -> dict[str, Any]:
    """Return the columns that name a row: method, preset, steps."""
    return {"method": variant.method, "preset": variant.preset, "steps": variant.sampler.steps}


def costs(samples: Samples) -> dict[str, Any]:
    """Return the columns that say what samples have cost."""
    counts = samples.counts
    return {"nfe": counts.network, "vjps": counts.vjp, "operator calls": counts.operator, "seconds": samples.seconds}


def alternate(
    runs: Sequence[Callable[[], Any]], repeats: int, clock: Callable[[], float] | None = None
) -> list[list[float]]:
    """Return the seconds of `repeats` repeats of each run; they take turns, their order swapping from turn to turn.

    Seconds are those of `clock`; where absent, of the processor on a CPU, and of the clock where a GPU is in use.
    """
    clock = clock or (time.perf_counter if torch.cuda.is_initialized() else time.process_time)
    times: list[list[float]] = [[] for _ in runs]
    for k in range(repeats):
        for run, kept in list(zip(runs, times, strict=True))[:: 1 if k % 2 == 0 else -1]:
            begin = clock()
            run()
            kept.append(clock() - begin)
    return times


def failed(error: BaseException) -> str:
    """Return one line for a cell whose sampler refused or diverged."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def failure(error: BaseException) -> dict[str, str]:
    """Return the row of a sampler that refused or diverged."""
    return {REMARK: f"{FAILED}: {failed(error)}"}


def header() -> dict[str, Any]:
    """Return command, version, commit, machine and date."""
    return {
        "command": shlex.join(["fewstep", *sys.argv[1:]]),
        "version": __version__,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
    }


def commit() -> str | None:
    """Return the git commit of the source tree, with "+" where it has changes, or None."""
    here = Path(__file__).parent
    try:
        git = ["git", "-C", str(here)]
        name = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        tree = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return name.stdout.strip() + ("+" if tree.stdout.strip() else "")


def machine() -> dict[str, Any]:
    """Return what the seconds depend on."""
    return {
        "cpu": _cpu_name(),
        "cores": _cores(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def read(path: str | Path) -> dict[str, Any]:
    """Return a report written by `Report.write`.

    Raises:
        ValueError: the file is missing or is no report.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a benchmark report ({error})") from None
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise ValueError(f"{path} is no benchmark report of fewstep")
    return report


def markdown(path: str | Path) -> str:
    """Return the tables of a report as Markdown, each under its title, followed by notes and machine."""
    try:
        return _markdown(read(path))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is a damaged benchmark report ({type(error).__name__}: {error})") from None


def _markdown(report: Mapping[str, Any]) -> str:
    parts = []
    for title, rows in report["tables"].items():
        parts += [f"### {title}", _markdown_table(rows)] if rows else []
        parts += ["\n".join(f"- {remark}" for remark in remarks(rows))] if remarks(rows) else []
    parts += ["\n".join(f"- {note}" for note in report["notes"])] if report["notes"] else []
    head, where = report["header"], report["header"]["machine"]
    parts.append(
        f"`{head['command']}`, fewstep {head['version']}, {head['date'][:10]}; {where['gpu'] or where['cpu']}, "
        f"{where['threads']} threads of {where['cores']} cores, torch {where['torch']}."
    )
    return "\n\n".join(parts) + "\n"


def show(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the tables of a report (`read` or `Report.to_json`) to the terminal."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    for title, rows in report["tables"].items():
        table = RichTable(title=Text(title), title_justify="left")
        names = columns(rows)
        for name in names:
            table.add_column(Text(name), justify="left" if _is_text(rows, name) else "right")
        for row in rows:
            table.add_row(*(Text(cell(row.get(name))) for name in names))
        console.print(table)
        for remark in remarks(rows):
            console.print(f"- {remark}", markup=False, highlight=False)
    for note in report["notes"]:
        console.print(note, style="dim", markup=False, highlight=False)


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the columns of all rows, but the remarks, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row if name != REMARK))


def remarks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the remarks of all rows, each once, after the names of the rows that have it."""
    owners: dict[str, list[str]] = {}
    for row in rows:
        if row.get(REMARK):
            name = " ".join(str(row[key]) for key in OWNERS if row.get(key))
            owners.setdefault(row[REMARK], []).append(name)
    return [f"{', '.join(dict.fromkeys(names))}: {text}" for text, names in owners.items()]


def cell(value: Any) -> str:
    """Return a value as it stands in a table: three decimals below 10, fewer above, two digits of what is tiny or huge.

    None is nothing.
    """
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.1e}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"


def _markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = columns(rows)
    marks = ["---" if _is_text(rows, name) else "--:" for name in names]
    body = [[cell(row.get(name)).replace("|", "\\|") for name in names] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [names, marks, *body])


def _is_text(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    return not any(isinstance(row.get(name), int | float) for row in rows)


def _plain(value: Any) -> Any:
    """Return JSON values: tuples as lists, paths as strings, inf and NaN as "inf", "-inf", "nan"."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
