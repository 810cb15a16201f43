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
from typing import Any, NamedTuple

from fewstep.core.names import suggestion


class Kind(NamedTuple):
    """What lies in a folder: how it is called, and the class that its classes derive from, "module:class"."""

    noun: str
    said: tuple[str, ...]
    base: str


FOLDERS = {
    "methods": Kind("method", ("method", "methods"), "core.sampler:Sampler"),
    "solvers": Kind("solver", ("solver", "solvers"), "core.sampler:Sampler"),
    "densities.teachers": Kind("density sampler", ("teachers",), "densities.teachers._base:Teacher"),
    "densities.losses": Kind("loss", ("losses",), "core.objective:Objective"),
    "densities.targets": Kind("target", ("target", "targets"), "core.density:TargetDensity"),
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
    found = FOLDERS[folder]
    if word not in (names := available(kind)):
        raise ValueError(f"unknown {found.noun} {name!r}; {suggestion(word, names)}")
    for point in entry_points(group=f"fewstep.{folder}", name=word):
        return point.load()
    return _only_class(f"fewstep.{folder}.{word}", found.base)


def fitting(provides: Collection[str]) -> list[str]:
    """Return the names of the methods whose needs are met by a likelihood that provides `provides`."""
    return [name for name in available() if get(name).needs <= set(provides)]


def _folder(kind: str) -> str:
    folders = {word: folder for folder, found in FOLDERS.items() for word in found.said}
    if kind not in folders:
        raise ValueError(f"unknown kind {kind!r}; choose one of {', '.join(folders)}")
    return folders[kind]


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
