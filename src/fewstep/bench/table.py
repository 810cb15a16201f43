"""`fewstep bench table`: the Markdown tables of the docs from a benchmark's JSON."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from fewstep.bench.common import markdown
from fewstep.core.files import write_bytes


def main(file: str | Path, out: str | Path | None = None) -> str:
    """Return the Markdown tables of the report `file`; write them to `out` where given, else to the terminal.

    Raises:
        ValueError: the file is missing or is no report.
    """
    text = markdown(file)
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(Path(out), text.encode())
    else:
        Console(soft_wrap=True).print(text, markup=False, highlight=False, end="")
    return text
