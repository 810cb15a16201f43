"""Targets with certified facts: the folder is the list, a file that defines one `TargetDensity` is a target of that name.

Files whose name starts with an underscore hold what several targets share.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from fewstep.core.density import TargetDensity
from fewstep.core.names import suggestion
from fewstep.core.registry import available, get


def available_targets() -> list[str]:
    """Return the names of all targets."""
    return available("targets")


def target(name: str, **fields: Any) -> TargetDensity:
    """Return the target called `name`, with its fields as given, such as `target("funnel", dim=10)`.

    Raises:
        ValueError: there is none (the nearest names are suggested), or it has no field of that name.
    """
    kind = target_class(name)
    known = [f.name for f in dataclasses.fields(kind) if f.init]  # type: ignore[arg-type]
    for field in fields:
        if field not in known:
            raise ValueError(f"{name} has no field {field!r}; {suggestion(field, known)}")
    missing = [f.name for f in dataclasses.fields(kind) if _required(f) and f.name not in fields]  # type: ignore[arg-type]
    if missing:
        raise ValueError(f"{name} needs {', '.join(missing)}: {(inspect.getdoc(kind) or '').splitlines()[0]}")
    return kind(**fields)


def target_class(name: str) -> type[TargetDensity]:
    """Return the class of the target called `name`.

    Raises:
        ValueError: there is none; the nearest names are suggested.
    """
    return get(name, "targets")


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
