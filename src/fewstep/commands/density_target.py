"""A density by what is said of it on the command line: a name of the zoo, a Python path, or a folder that was trained for one."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import json
import math
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from fewstep.core.density import TargetDensity
from fewstep.core.names import suggestion
from fewstep.densities.targets import available_targets, target, target_class
from fewstep.densities.user import as_target, own_dim
from fewstep.options import typed_fields

RUN = "run.json"  # what a folder was trained for
FUNCTION = "log_prob"  # of a file, where none is named
End = float | tuple[float | None, ...] | None  # of the box where a density lives
_CODE = ("score", "support")  # arguments whose text is Python


@dataclass(frozen=True)
class Own:
    """What a function alone does not say.

    Args:
        dim: the number of coordinates.
        low: lower end of the box where the density lives, the same in every coordinate, or one for each, None where there is none.
        high: its upper end, as `low`.
        score: name of the gradient beside it, where autograd should not be used.
        log_z: log of its integral, where it is known.
    """

    dim: int | None = None
    low: End = None
    high: End = None
    score: str | None = None
    log_z: float | None = None


@dataclass(frozen=True)
class Named:
    """A density and what identifies it.

    Attributes:
        density: the density.
        name: what it is called in titles.
        record: its name or path, its fields, and the hash of its source, as JSON takes it.
        code: the line of Python that makes it.
        folder: the folder that stood for it, or None.
    """

    density: TargetDensity
    name: str
    record: dict[str, Any]
    code: str
    folder: Path | None = None


def find(word: str, given: Mapping[str, str], options: Collection[str] = ()) -> Named:
    """Return the density that `word` means.

    Args:
        word: a name of `fewstep.densities.targets`, "module:function", "file.py:function", "file.py" (its `log_prob`), or a
            folder that `fit` or `distill` wrote for a density of the zoo; a name goes before a folder of that name.
        given: its fields, as text.
        options: names that a mistyped field may have meant.

    Raises:
        ValueError: there is none such, a field that it does not have, or a function that is no density.
    """
    if word.replace("-", "_") not in available_targets() and Path(word).is_dir():
        return _of_folder(Path(word), given)
    if ":" in word or word.endswith(".py"):
        return _of_path(word, given, options)
    kind = target_class(word)
    fields = _absolute(_fields(kind, given, word, options))
    name = kind.__module__.rpartition(".")[2]
    record = {"name": name, "fields": {k: _plain(v) for k, v in fields.items()}}
    return Named(target(name, **fields), name, record, _known(record))


def read_run(folder: Path) -> dict[str, Any]:
    """Return what `fit` or `distill` noted of a folder.

    Raises:
        ValueError: it is no such folder.
    """
    try:
        record = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"{folder} was not written by `fewstep density fit` or `distill`: no {RUN}") from None
    if not isinstance(record, dict) or not isinstance(record.get("target"), dict):
        raise ValueError(f"{folder / RUN} does not say what density it is of")
    return record


def _of_folder(folder: Path, given: Mapping[str, str]) -> Named:
    record = read_run(folder)["target"]
    if given:
        raise ValueError(f"{folder} stands for a density with its fields: leave out --{next(iter(given))}")
    if "path" in record:  # a folder of weights must not decide which code is run
        raise ValueError(
            f"{folder} is of {record['path']}: name that, with its options, and say where its sampler is, {folder}"
        )
    found = target(record["name"], **record["fields"])
    return Named(found, record["name"], record, _known(record), folder)


def _of_path(word: str, given: Mapping[str, str], options: Collection[str]) -> Named:
    place, _, attribute = word.rpartition(":") if not word.endswith(".py") else (word, "", FUNCTION)
    module = _module(place)
    found = _attribute(module, attribute, place)
    record = {"path": f"{_where(module, place)}:{attribute}", "fields": dict(given), "sha256": _hash(module)}
    if isinstance(found, type) and issubclass(found, TargetDensity):
        values = _fields(found, given, word, options)
        return Named(
            found(**values), attribute, record, f"target = {attribute}({_arguments(values)})  # {record['path']}"
        )
    if isinstance(found, type):
        raise ValueError(f"{word} is a class, but no TargetDensity: name an object of it, {place}:OBJECT")
    own = Own(**_fields(Own, given, word, options))
    if isinstance(found, TargetDensity):
        if given and own != Own(dim=found.dim):
            raise ValueError(f"{word} is a density already: it takes no options")
        return Named(found, attribute, record, f"target = {attribute}  # {record['path']}")
    if not callable(found):
        raise ValueError(f"{word} is no function, but of type {type(found).__name__}")
    if own.dim is None and own_dim(found) is None:
        raise ValueError(f"{word} is a function, which does not say its number of coordinates: give --dim")
    arguments = ", ".join(filter(None, (attribute, _arguments(_settings(own)))))
    made = f"target = fewstep.densities.user.as_target({arguments})  # {record['path']}"
    return Named(_density(found, own, module, place), attribute, record, made)


def _known(record: Mapping[str, Any]) -> str:
    fields = _arguments(record["fields"])
    return f'target = fewstep.target("{record["name"]}"{", " if fields else ""}{fields})'


def _arguments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value if name in _CODE else repr(value)}" for name, value in values.items())


def _settings(own: Own) -> dict[str, Any]:
    """Return the arguments of `as_target` that were given; the score by its name."""
    ends = None if (found := _support(own)) is None else str(found).replace("inf", "float('inf')")
    values = {"dim": own.dim, "score": own.score, "support": ends, "log_z": own.log_z}
    return {name: value for name, value in values.items() if value is not None}


def _support(own: Own) -> tuple[End, End] | None:
    if own.low is None and own.high is None:
        return None
    return -math.inf if own.low is None else own.low, math.inf if own.high is None else own.high


def _density(function: Any, own: Own, module: ModuleType, place: str) -> TargetDensity:
    support = _support(own)
    score = None if own.score is None else _attribute(module, own.score, place)
    try:
        return as_target(function, own.dim, score=score, support=support, log_z=own.log_z)
    except TypeError as error:
        raise ValueError(str(error)) from None


def _module(place: str) -> ModuleType:
    """Import a file or a module; what lies beside the file, or in the current folder, can be imported by it."""
    path = Path(place)
    if place.endswith(".py") and not path.is_file():
        raise ValueError(f"there is no file {place}")
    try:
        with _importing_from(path.resolve().parent if place.endswith(".py") else Path.cwd()):
            if not place.endswith(".py"):
                return importlib.import_module(place)
            name = f"_density_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module  # dataclasses look their module up
            spec.loader.exec_module(module)
            return module
    except Exception as error:
        raise ValueError(f"{place} cannot be imported: {type(error).__name__}: {error}") from error


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _attribute(module: ModuleType, name: str, place: str) -> Any:
    if not hasattr(module, name):
        raise ValueError(f"{place} has no {name!r}; {suggestion(name, _public(module))}")
    return getattr(module, name)


def _public(module: ModuleType) -> Iterable[str]:
    return (n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__)


def _where(module: ModuleType, place: str) -> str:
    return str(Path(place).resolve()) if place.endswith(".py") else module.__name__


def _hash(module: ModuleType) -> str:
    file = getattr(module, "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else ""


def _fields(cls: type, given: Mapping[str, str], owner: str, options: Collection[str]) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(cls) if f.init}
    for name in given:
        if name.replace("-", "_") not in names:
            raise ValueError(f"{owner} has no option {name!r}; {suggestion(name, {*names, *options})}")
    return typed_fields(cls, given, owner)


def _absolute(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value.resolve() if isinstance(value, Path) else value for name, value in fields.items()}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
