"""`fewstep bench NAME`: the function `main` of `fewstep.bench.NAME`, its parameters as options."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand

from fewstep.commands.extras import made_options
from fewstep.options import described_arguments, pairs, typed_arguments, written_as


class BenchCommand(TyperCommand):
    """A benchmark, whose help lists the parameters of its `main`; only that help and the run itself import it."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help."""
        self.params = [*self.params, *_options(_main(str(self.name)))]
        super().format_help(ctx, formatter)


def run(name: str, words: Sequence[str]) -> None:
    """Call `fewstep.bench.<name>.main` with the options in `words`, "--name value" each; a flag needs no value.

    Raises:
        ValueError: there is no such benchmark, it has no such option, or it lacks one that it needs.
    """
    function = _main(name)
    flags = [argument.name for argument in described_arguments(function) if argument.kind == "BOOL"]
    values = typed_arguments(function, pairs(words, flags), f"benchmark {name}")
    empty = inspect.Parameter.empty
    missing = [
        p.name for p in inspect.signature(function).parameters.values() if p.default is empty and p.name not in values
    ]
    if missing:
        raise ValueError(f"benchmark {name} needs {', '.join('--' + m for m in missing)}")
    function(**values)


def _main(name: str) -> Callable[..., Any]:
    module = f"fewstep.bench.{name}"
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"this version has no benchmark {name!r}")
    return importlib.import_module(module).main


def _options(function: Callable[..., Any]) -> list[Any]:
    """Return the parameters of a function as options, for help alone: all are text."""
    found = []
    for argument in described_arguments(function):
        name = f"--{argument.name.replace('_', '-')}"
        option = typer.Option(name, help=escape(argument.text), metavar=argument.kind)
        default = argument.default if argument.default is inspect.Parameter.empty else written_as(argument.default)
        kind = inspect.Parameter.KEYWORD_ONLY
        found.append(inspect.Parameter(argument.name, kind, default=default, annotation=Annotated[str | None, option]))
    return made_options(found)
