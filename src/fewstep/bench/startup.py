"""`fewstep bench startup`: what `import fewstep` costs over `import torch`, and how soon the command line answers."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

from fewstep.bench.common import Report, alternate

COMMANDS = {
    "import fewstep": ("import torch, fewstep; fewstep.Posterior, fewstep.load_prior, fewstep.get", "import torch"),
    "fewstep --help": ("import sys; from fewstep.cli import main; sys.argv = ['fewstep', '--help']; main()", "pass"),
}
NOTES = (
    "seconds: of the processor, median over new interpreters; over: median difference to interpreters, started in turn with them, "
    "that run `import torch` alone (first row) or nothing (second). The first row imports Posterior, load_prior and get, too.",
)


def main(out: str | Path | None = None, *, repeats: int = 5) -> Report:
    """Measure, print the table, write the JSON report to `out` where given, and return it.

    Args:
        out: path of the JSON file.
        repeats: interpreters started for each.
    """
    rows = []
    for name, (code, bare) in COMMANDS.items():
        ours, theirs = alternate([partial(_run, code), partial(_run, bare)], repeats, _children)
        over = statistics.median(a - b for a, b in zip(ours, theirs, strict=True))
        rows.append({"command": name, "seconds": statistics.median(ours), "over": over})
    return Report("startup", {"repeats": repeats}, {"Start": rows}, NOTES).finish(out)


def _children() -> float:
    """Return the processor seconds of the processes that were started and have ended."""
    spent = os.times()
    return spent.children_user + spent.children_system


def _run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
