"""The folder is the list: a file in `methods/` or `solvers/` that defines one sampler is a method of that name.

Other packages add theirs through the entry-point groups `fewstep.methods` and `fewstep.solvers`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Collection
from importlib.metadata import entry_points

from fewstep.core.sampler import Sampler

# what is said, and the folder that is meant
KINDS = {"method": "methods", "methods": "methods", "solver": "solvers", "solvers": "solvers"}


def available(kind: str = "methods") -> list[str]:
    """Return the names of all samplers of a kind, "methods" (posterior samplers) or "solvers" (prior samplers)."""
    kind = _folder(kind)
    package = importlib.import_module(f"fewstep.{kind}")
    own = [module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")]
    return sorted({*own, *(point.name for point in entry_points(group=f"fewstep.{kind}"))})


def get(name: str, kind: str = "methods") -> type[Sampler]:
    """Return the sampler class called `name`.

    Raises:
        ValueError: there is none; the nearest names are suggested.
    """
    name, kind = name.replace("-", "_"), _folder(kind)
    if name not in (names := available(kind)):
        near = difflib.get_close_matches(name, names, 3, 0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(names)}"
        raise ValueError(f"unknown method {name!r}; {hint}")
    for point in entry_points(group=f"fewstep.{kind}", name=name):
        return point.load()
    return _only_sampler(f"fewstep.{kind}.{name}")


def fitting(provides: Collection[str]) -> list[str]:
    """Return the names of the methods whose needs are met by a likelihood that provides `provides`."""
    return [name for name in available() if get(name).needs <= set(provides)]


def _folder(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; choose one of {', '.join(KINDS)}")
    return KINDS[kind]


def _only_sampler(module_name: str) -> type[Sampler]:
    module = importlib.import_module(module_name)
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Sampler) and value.__module__ == module_name
    ]
    if len(found) != 1:
        raise TypeError(f"{module_name} must define exactly one sampler, it defines {len(found)}")
    return found[0]
