"""Tables of the methods and the operators, made from the classes themselves."""

from __future__ import annotations

import typing
from dataclasses import MISSING, Field, fields
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from fewstep.core.multistep import MultistepSolver, Solver
from fewstep.core.registry import available, get
from fewstep.core.sampler import Sampler
from fewstep.core.schedule import Flow
from fewstep.operators.words import get_operator, operators
from fewstep.options import flag_of


def all_methods(kind: str) -> Table:
    """Return one row per method: source, needs, network calls, what it converges to, and of solvers the order."""
    rows = {name: _summary(get(name, kind)) for name in available(kind)}
    table = plain_table("method", *next(iter(rows.values()), ()))
    for name, row in rows.items():
        table.add_row(name, *row.values())
    return table


def _summary(cls: type[Sampler]) -> dict[str, str]:
    """Return what there is to say of a method, by heading; ValueError for what is neither a method nor a solver."""
    if not issubclass(cls, Sampler):
        raise ValueError(
            f"{cls.__name__} is neither a method nor a solver: `fewstep density` shows what densities have"
        )
    calls, limit = _calls(cls), escape(f"{cls.exact}: {cls.limit}")
    head = {"source": escape(str(cls.reference))}
    if issubclass(cls, Solver):
        solver: Any = cls()
        return head | {"order": f"{solver.order:g}", "calls per step": _calls_per_step(solver), "converges to": limit}
    return head | {"needs": _needs(cls), "network calls": calls, "converges to": limit}


def _calls_per_step(solver: Solver) -> str:
    """Return the network calls of a step in the middle of the grid, on average, and the most of a solver that adapts."""
    if isinstance(solver, MultistepSolver):
        return f"{solver.plan(Flow(), torch.linspace(1, 0.5, 101, dtype=torch.float64)).calls / 100:.0f}"
    return f"{'at most ' if solver.nfe_varies else ''}{solver.nfe / solver.steps:.0f}"


def one_method(name: str, kind: str) -> RenderableType:
    """Return what a method is, its fields and its presets."""
    cls = get(name, kind)
    about = plain_table("", "")
    for heading, text in (_summary(cls) | {"network calls": _calls(cls)}).items():
        about.add_row(heading, text)
    for preset, values in cls.presets.items():
        about.add_row(f"preset {preset}", escape(", ".join(f"{k} = {v}" for k, v in values.items()) or "the defaults"))
    return Group(about, field_table(cls))


def operator_table(name: str | None) -> RenderableType:
    """Return one row per operator, or the options of one."""
    if name is not None:
        return field_table(get_operator(name))
    table = plain_table("operator", "what happened", "sigma", "options")
    for word, summary in operators().items():
        cls: Any = get_operator(word)
        options = ", ".join(f"--{flag_of(f).replace('_', '-')}" for f in fields(cls))
        table.add_row(word, escape(summary), cls.noise, options)
    return table


def _needs(cls: type[Sampler]) -> str:
    return ", ".join(sorted(cls.needs)) or "nothing"


def _calls(cls: type[Sampler]) -> str:
    """Return the network calls per sample of the defaults, and of each preset where they differ."""
    calls = {"": cls().nfe, **{name: cls.preset(name).nfe for name in cls.presets}}
    most = "at most " if cls().nfe_varies else ""
    return most + ", ".join([str(calls[""]), *(f"{n} ({name})" for name, n in calls.items() if n != calls[""])])


def field_table(cls: Any) -> Table:
    """Return one row per field of a dataclass: option, type, default and meaning."""
    table, hints, helps = (
        plain_table("option", "type", "default", "meaning"),
        typing.get_type_hints(cls),
        dict[str, str](),
    )
    for base in reversed(cls.__mro__):
        helps |= _said(base, "Attributes:") | meanings(base)
    for field in fields(cls):
        text = str(field.metadata.get("help", "")) or helps.get(field.name, "")
        kind = getattr(hints[field.name], "__name__", str(hints[field.name]))
        table.add_row(flag_of(field).replace("_", "-"), escape(kind), escape(_default(field)), escape(text))
    return table


def meanings(cls: type) -> dict[str, str]:
    """Return what the docstring of a class says of its fields, under "Args:"."""
    return _said(cls, "Args:")


def _said(cls: type, heading: str) -> dict[str, str]:
    found: dict[str, str] = {}
    name = ""
    for line in (cls.__doc__ or "").partition(heading)[2].partition("Raises:")[0].splitlines():
        head, colon, text = line.strip().partition(": ")
        if colon and head.isidentifier():
            name, found[head] = head, text
        elif line.strip() and name:
            found[name] += f" {line.strip()}"
    return found


def _default(field: Field[Any]) -> str:
    if field.default_factory is not MISSING:
        return repr(field.default_factory())
    return "needed" if field.default is MISSING else repr(field.default)


def plain_table(*columns: str) -> Table:
    """Return an empty table without lines."""
    table = Table(show_header=any(columns), box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold", header_style="bold")
    return table
