"""What typer does not offer: options generated from the fields of the operators when a command runs, and a check for empty words."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from fewstep.options import flag_of

_KEY = "fewstep.operator"


class OperatorCommand(TyperCommand):
    """A command whose options include the fields of every operator, each once.

    Whether an option belongs to the operator that was chosen is checked where the operator is built.
    """

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, those of the operators included."""
        known = {name for parameter in self.params for name in parameter.opts}
        if not getattr(self, "_complete", False):
            self.params = [*self.params, *(p for p in _generated() if not known & set(p.opts))]
            self._complete = True
        return super().get_params(ctx)


def operator_options(context: typer.Context) -> dict[str, str]:
    """Return the fields of operators that were given on the command line, as text."""
    return dict(context.meta.get(_KEY, {}))


def operator_fields() -> dict[str, dict[str, str]]:
    """Return {option: {operator: help}} over all operators."""
    from fewstep.operators.words import get_operator, operators

    found: dict[str, dict[str, str]] = {}
    for word in operators():
        for field in fields(get_operator(word)):  # type: ignore[arg-type]
            found.setdefault(flag_of(field), {})[word] = str(field.metadata.get("help", ""))
    return found


def _generated() -> list[Any]:
    """Return the options of all operators."""
    kind = inspect.Parameter.KEYWORD_ONLY
    made = made_options(
        inspect.Parameter(
            name,
            kind,
            default=None,
            annotation=Annotated[
                str | None, typer.Option(f"--{name.replace('_', '-')}", help=_help(words), callback=_keep(name))
            ],
        )
        for name, words in operator_fields().items()
    )
    for parameter in made:
        parameter.expose_value = False
    return made


def made_options(parameters: Iterable[inspect.Parameter]) -> list[Any]:
    """Return what typer makes of a function with these parameters, each annotated with its option."""

    def carrier(**_: Any) -> None: ...

    signature = inspect.Signature(list(parameters))
    carrier.__signature__ = signature  # type: ignore[attr-defined]
    carrier.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    host = typer.Typer(add_completion=False)
    host.command()(carrier)
    return [p for p in typer.main.get_command(host).params if p.name in signature.parameters]


def _keep(name: str) -> Callable[[typer.Context, str | None], str | None]:
    """Return a callback that notes the value of an option where it was given."""

    def keep(context: typer.Context, value: str | None) -> str | None:
        if value is not None:
            context.meta.setdefault(_KEY, {})[name] = value
        return value

    return keep


def _help(words: dict[str, str]) -> str:
    """Return one line from the help of every operator that has the field."""
    by_text: dict[str, list[str]] = {}
    for word, text in words.items():
        by_text.setdefault(text, []).append(word)
    return (
        "; ".join(f"[{', '.join(names)}] {text}".strip() for text, names in by_text.items())
        .replace("[", "(")
        .replace("]", ")")
    )


def check_words(words: list[str]) -> None:
    """Raise ValueError where a word is empty, as an unset variable leaves it: as a path it would be the current folder."""
    if words[:1] == ["bench"]:  # whose lists may be empty
        return
    for before, word in itertools.pairwise(words):
        name, sign, value = word.partition("=") if word.startswith("--") else (before, "", word)
        if not value and (sign or not word):
            raise ValueError(f"nothing is given after {name}: an empty word, as an unset variable leaves it")
