"""The folder is the list: a file in `methods/`, say, that defines one sampler is a method of that name.

Other packages add theirs through the entry-point groups `fewstep.methods`, `fewstep.solvers` and `fewstep.densities.teachers`,
`.losses` and `.targets`.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Collection
from importlib.metadata import entry_points
from typing import Any

from fewstep.core.names import suggestion

# each folder, the singular of what is in it, and the class that its classes derive from
FOLDERS = {
    "methods": ("method", "core.sampler:Sampler"),
    "solvers": ("solver", "core.sampler:Sampler"),
    "densities.teachers": ("density sampler", "densities.teachers._base:Teacher"),
    "densities.losses": ("loss", "core.objective:Objective"),
    "densities.targets": ("target", "core.density:TargetDensity"),
}
# what is said, and the folder that is meant
KINDS = {
    "method": "methods",
    "methods": "methods",
    "solver": "solvers",
    "solvers": "solvers",
    "teachers": "densities.teachers",
    "losses": "densities.losses",
    "target": "densities.targets",
    "targets": "densities.targets",
}


def available(kind: str = "methods") -> list[str]:
    """Return the names of all classes of a kind.

    Args:
        kind: "methods" (posterior samplers), "solvers" (prior samplers), "teachers" (samplers of a density, before they are
            trained), "losses" (what these minimise) or "targets" (densities with certified facts).
    """
    kind = _folder(kind)
    package = importlib.import_module(f"fewstep.{kind}")
    own = [module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")]
    return sorted({*own, *(point.name for point in entry_points(group=f"fewstep.{kind}"))})


def get(name: str, kind: str = "methods") -> type[Any]:
    """Return the class called `name`, see `available`.

    Raises:
        ValueError: there is none; the nearest names are suggested.
    """
    word, folder = name.replace("-", "_"), _folder(kind)
    noun, base = FOLDERS[folder]
    if word not in (names := available(kind)):
        raise ValueError(f"unknown {noun} {name!r}; {suggestion(word, names)}")
    for point in entry_points(group=f"fewstep.{folder}", name=word):
        return point.load()
    return _only_class(f"fewstep.{folder}.{word}", base)


def fitting(provides: Collection[str]) -> list[str]:
    """Return the names of the methods whose needs are met by a likelihood that provides `provides`."""
    return [name for name in available() if get(name).needs <= set(provides)]


def _folder(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; choose one of {', '.join(KINDS)}")
    return KINDS[kind]


def _only_class(module_name: str, base: str) -> type[Any]:
    """Return the one class of a module that derives from `base`, "module:class"."""
    module, (home, _, kind) = importlib.import_module(module_name), base.partition(":")
    ancestor = getattr(importlib.import_module(f"fewstep.{home}"), kind)
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, ancestor) and value.__module__ == module_name
    ]
    if len(found) != 1:
        raise TypeError(f"{module_name} must define exactly one {kind}, it defines {len(found)}")
    return found[0]
