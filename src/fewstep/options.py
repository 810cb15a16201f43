"""Fields of a frozen dataclass from words: the options of methods and operators are their fields, here and nowhere else."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.core.names import suggestion

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_LISTS = (tuple, list, Sequence)
_KINDS = {bool: "BOOL", int: "INT", float: "FLOAT", Path: "PATH", str: "TEXT"}


def typed_fields(cls: type, values: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Return `values` with strings converted to the types of the fields of a dataclass.

    Args:
        cls: the dataclass; a field whose metadata has a "flag" is given by that name too.
        values: field names, "-" read as "_", and their values; those that are no strings pass unchanged.
        owner: what to call it in messages, e.g. "method diffpir".

    Raises:
        ValueError: an unknown field, with a suggestion, or a value that is not of its type.
    """
    hints = typing.get_type_hints(cls)
    names = {flag_of(f): f.name for f in dataclasses.fields(cls) if f.init}
    return _typed(names, hints, values, owner)


def typed_arguments(function: Callable[..., Any], values: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Return `values` with strings converted to the types of the parameters of a function; see `typed_fields`."""
    hints = typing.get_type_hints(function)
    return _typed({name: name for name in inspect.signature(function).parameters}, hints, values, owner)


@dataclasses.dataclass(frozen=True)
class Argument:
    """A parameter of a function as one option.

    Attributes:
        name: of the parameter.
        kind: what is to be given, "INT" say.
        default: `inspect.Parameter.empty` where there is none.
        text: what the docstring says of it.
    """

    name: str
    kind: str
    default: Any
    text: str


def described_arguments(function: Callable[..., Any]) -> list[Argument]:
    """Return the parameters of a function with the texts of the section "Args" of its docstring."""
    hints, section = typing.get_type_hints(function), (inspect.getdoc(function) or "").partition("Args:\n")[2]
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section.partition("\n\n")[0], re.MULTILINE)
    texts = {name: " ".join(text.split()) for name, text in entries}
    parameters = inspect.signature(function).parameters.values()
    return [Argument(p.name, _kind(hints.get(p.name, str)), p.default, texts.get(p.name, "")) for p in parameters]


def written_as(value: Any) -> str | None:
    """Return a value as it is written on the command line; None where there is nothing to write."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or None
    return None if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def known_fields(cls: type, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `values` as they are; TypeError, with a suggestion, where a name is no field of the dataclass."""
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    for name in values:
        if name not in names:
            raise TypeError(f"unexpected keyword argument {name!r} of {cls.__name__}; {suggestion(name, names)}")
    return values


def flag_of(field: dataclasses.Field[Any]) -> str:
    """Return the name of a field on the command line, with "_"."""
    return str(field.metadata.get("flag", field.name))


def assignments(words: Iterable[str]) -> dict[str, str]:
    """Return {"field": "value"} for words "field=value"; ValueError for anything else."""
    out = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not name.strip():
            raise ValueError(f"expected field=value, got {word!r}")
        out[name.strip()] = value.strip()
    return out


def cuts(words: Iterable[str]) -> dict[str, tuple[float, ...]]:
    """Return {"field": numbers} for words "field=15,30", without numbers for "field"; ValueError for anything else."""
    out: dict[str, tuple[float, ...]] = {}
    for word in words:
        name, sign, values = word.partition("=")
        try:
            out[name.strip()] = tuple(_number(value) for value in values.split(",")) if sign else ()
        except ValueError:
            raise ValueError(f"expected a field, or field=number,number to cut at, got {word!r}") from None
    return out


def _number(value: str) -> float:
    number = float(value)
    return int(number) if number.is_integer() else number


def pairs(words: Sequence[str], flags: Collection[str] = ()) -> dict[str, str]:
    """Return {"name": "value"} for words "--name value" or "--name=value"; ValueError for anything else.

    One of the `flags` before another name, or at the end, is "true".
    """
    out, rest = {}, list(words)
    while rest:
        name, sign, value = rest.pop(0).partition("=")
        if not sign and name[2:].replace("-", "_") in flags and (not rest or rest[0].startswith("--")):
            sign, value = "=", "true"
        if not name.startswith("--") or len(name) < 3 or (not sign and not rest):
            raise ValueError(f"expected --name value, got {name!r}")
        out[name[2:]] = value if sign else rest.pop(0)
    return out


def _typed(names: Mapping[str, str], hints: Mapping[str, Any], values: Mapping[str, Any], owner: str) -> dict[str, Any]:
    out = {}
    for given, value in values.items():
        flag = given.replace("-", "_")
        if flag not in names:
            raise ValueError(f"{owner} has no option {given!r}; {suggestion(flag, names)}")
        out[names[flag]] = _convert(value, hints[names[flag]], f"{owner}: {flag}")
    return out


def _convert(value: Any, hint: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return _read(value, hint)
    except ValueError:
        pass
    wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in _alternatives(hint))
    raise ValueError(f"{where} must be {wanted}, got {value!r}")


def _read(value: str, hint: Any) -> Any:
    """Return `value` as the first member of a union that it can be; ValueError where it can be none."""
    for kind in _alternatives(hint):
        try:
            return _parse(value, kind)
        except (ValueError, TypeError):
            continue
    raise ValueError(value)


def _alternatives(hint: Any) -> list[Any]:
    """Return the members of a union, None first and text last so that the narrowest reading wins."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = list(typing.get_args(hint)) if union else [hint]
    order = {type(None): 0, bool: 1, int: 2, float: 3, Path: 5, str: 6}
    return sorted(members, key=lambda kind: order.get(kind, 4))


def _kind(hint: Any) -> str:
    """Return what a value of a type looks like, "INT" or "TEXT,..." say: the first of a union that words can be."""
    for kind in _alternatives(hint):
        if typing.get_origin(kind) in _LISTS:
            return f"{_kind(typing.get_args(kind)[0])},..."
        if kind in _KINDS:
            return _KINDS[kind]
    return "TEXT"


def _parse(value: str, kind: Any) -> Any:
    """Return `value` as a `kind`; ValueError where it is none."""
    origin, inner = typing.get_origin(kind), [a for a in typing.get_args(kind) if a is not Ellipsis]
    if origin in _LISTS:
        parts = [part.strip() for part in value.split(",") if part.strip()]
        kinds = inner * len(parts) if len(inner) == 1 else inner
        return tuple(_read(part, k) for part, k in zip(parts, kinds, strict=True))
    if kind is type(None):
        return _choice(value.lower(), {"none": None, "null": None})
    if kind is bool:
        return _choice(value.lower(), {**dict.fromkeys(_TRUE, True), **dict.fromkeys(_FALSE, False)})
    if kind not in _KINDS:
        raise ValueError(value)
    return kind(value)


def _choice(value: str, meanings: Mapping[str, Any]) -> Any:
    if value not in meanings:
        raise ValueError(value)
    return meanings[value]
