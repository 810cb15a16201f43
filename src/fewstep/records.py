"""Records of runs as JSON files, and the versions that their results depend on."""

from __future__ import annotations

import math
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fewstep import __version__
from fewstep.core.files import write_json

_PACKAGES = ("torch", "deepinv", "diffusers", "torchmetrics", "lpips")


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON, atomically; infinite and undefined numbers become null."""
    write_json(path, _finite(record))


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    found = {"fewstep": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
