"""`fewstep doctor`: what is installed, where it would run, and what is known to go wrong."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from fewstep.compat import prepare_torchvision
from fewstep.metrics import Missing, lpips_net
from fewstep.priors.loaders import load_prior
from fewstep.records import versions
from fewstep.task import DEFAULT_PRIOR

_LEAST_DISK = 1 << 30  # bytes


def show(console: Console) -> list[str]:
    """Print versions, devices and problems; return the problems that keep `fewstep restore` from working."""
    for name, version in versions().items():
        console.print(f"{name:13s} {version}", highlight=False)
    console.print(f"{'devices':13s} {', '.join(devices())}; {torch.get_num_threads()} CPU threads", highlight=False)
    serious, minor = _failing(SERIOUS), _failing(MINOR)
    for kind, lines in (("[bold red]problem[/]", serious), ("[yellow]note[/]", minor)):
        for line in lines:
            console.print(f"{kind}: {escape(line)}", highlight=False)
    if not serious:
        console.print("ready")
    return serious


def devices() -> list[str]:
    """Return the devices that torch can use, in words."""
    found = ["cpu"]
    found += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return [*found, *(["mps"] if torch.backends.mps.is_available() else [])]


def _failing(checks: list[Callable[[], str | None]]) -> list[str]:
    return [line for check in checks if (line := check())]


def _prior() -> str | None:
    try:
        load_prior(DEFAULT_PRIOR)
    except (ValueError, OSError, ImportError) as error:
        return f"the prior {DEFAULT_PRIOR!r} cannot be loaded: {error}"
    return None


def _torchvision() -> str | None:
    if prepare_torchvision():
        return (
            "torchvision's operators were not built for this torch; worked around here, install the matching pair to mend it, "
            "or call prepare_torchvision() of fewstep.compat before you import deepinv yourself"
        )
    return None


def _lpips() -> str | None:
    try:
        lpips_net()
    except Missing as reason:
        return f"LPIPS will be null: {reason}"
    except ValueError as error:
        return str(error)
    return None


def _disk() -> str | None:
    free = shutil.disk_usage(Path.cwd()).free
    return f"only {free / 1e9:.1f} GB are free here" if free < _LEAST_DISK else None


def _importable(name: str) -> str | None:
    prepare_torchvision()
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        return f"{name} cannot be imported: {' '.join(str(error).split())}"
    return None


SERIOUS: list[Callable[[], str | None]] = [partial(_importable, "deepinv"), partial(_importable, "diffusers"), _prior]
MINOR: list[Callable[[], str | None]] = [_torchvision, _lpips, _disk]
