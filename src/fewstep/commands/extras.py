"""Options generated from the fields of the operators, when the command runs and not before."""

from __future__ import annotations

import inspect
from collections.abc import Callable
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
    """Return typer's own parameters of a function whose signature is made of the fields."""
    texts = operator_fields()

    def carrier(**_: Any) -> None: ...

    annotations = {
        name: Annotated[
            str | None, typer.Option(f"--{name.replace('_', '-')}", help=_help(words), callback=_keep(name))
        ]
        for name, words in texts.items()
    }
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(n, kind, default=None, annotation=a) for n, a in annotations.items()]
    carrier.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    carrier.__annotations__ = dict(annotations)
    host = typer.Typer(add_completion=False)
    host.command()(carrier)
    made = [p for p in typer.main.get_command(host).params if p.name in texts]
    for parameter in made:
        parameter.expose_value = False
    return made


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
