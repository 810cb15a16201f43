"""The files of a restored photograph; each appears whole or not at all."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from fewstep.images import save_image
from fewstep.store import Summary

RESULT, REPORT, SIMULATED = "result.json", "report.html", "simulation.json"
_OURS = re.compile(
    r"(sample-\d{2,}|mean|std|measurement|truth|interval-(low|high|width))\.png|samples\.safetensors|report\.html|result\.json"
)


class Kind(NamedTuple):
    """What a run leaves in its folder.

    Attributes:
        name: of the run, in words.
        record: the file that tells such a folder from others.
        files: the names of what it writes, the record among them.
    """

    name: str
    record: str
    files: re.Pattern[str]


RESTORATION = Kind("restoration", RESULT, _OURS)
SIMULATION = Kind(
    "simulation", SIMULATED, re.compile(r"measurement\.(png|jpg|safetensors)|truth\.png|simulation\.json")
)


def check_free(folder: Path, source: Path, kind: Kind = RESTORATION) -> None:
    """Raise ValueError where a run from `source` into `folder` would replace it, or a file that no run of its kind wrote."""
    if source.resolve().parent == folder.resolve() and kind.files.fullmatch(source.resolve().name):
        raise ValueError(f"{source} would be replaced by a file of the result: choose another folder than {folder}")
    known = (folder / kind.record).is_file()
    others = [] if known else [p.name for p in folder.iterdir() if kind.files.fullmatch(p.name)]
    if others:
        raise ValueError(f"{folder} holds {min(others)}, which no {kind.name} wrote: choose another folder")


def clear(folder: Path) -> None:
    """Remove what an earlier run left in `folder`, recognised by its result.json; other files are not touched."""
    for left in folder.glob("samples.partial-*"):
        if left.name != f"samples.partial-{os.getpid()}":
            left.unlink()
    if not (folder / RESULT).is_file():
        return
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name):
            path.unlink()


def write_summary(folder: Path, summary: Summary, grey: bool, profile: bytes | None = None) -> dict[str, float]:
    """Write mean, standard deviation and interval as images; return, for the maps, the value that white stands for."""
    save_image(summary.mean, folder / "mean.png", grey=grey, profile=profile)
    if summary.std is None or summary.lower is None or summary.upper is None:
        return {}
    save_image(summary.lower, folder / "interval-low.png", grey=grey, profile=profile)
    save_image(summary.upper, folder / "interval-high.png", grey=grey, profile=profile)
    return {
        "std.png": write_map(folder / "std.png", std_map(summary)),
        "interval-width.png": write_map(folder / "interval-width.png", width_map(summary)),
    }


def std_map(summary: Summary) -> Tensor:
    """Return the standard deviation of a pixel, root mean square over channels, (H, W)."""
    assert summary.std is not None
    return summary.std[0].square().mean(0).sqrt()


def width_map(summary: Summary) -> Tensor:
    """Return the width of the interval of a pixel, mean over channels, (H, W)."""
    assert summary.lower is not None and summary.upper is not None
    return (summary.upper - summary.lower)[0].mean(0)


def write_map(path: Path, values: Tensor) -> float:
    """Write a non-negative field, (H, W), as grey values from black = 0 to white = its maximum, which is returned."""
    white = max(float(values.max()), 1e-6)
    save_image((values / white)[None], path)
    return white
