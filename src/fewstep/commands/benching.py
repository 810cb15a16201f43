"""`fewstep bench NAME`: the function `main` of `fewstep.bench.NAME`, its parameters as options."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Sequence

from fewstep.options import pairs, typed_arguments


def run(name: str, words: Sequence[str]) -> None:
    """Call `fewstep.bench.<name>.main` with the options in `words`, "--name value" each.

    Raises:
        ValueError: there is no such benchmark, it has no such option, or it lacks one that it needs.
    """
    module = f"fewstep.bench.{name}"
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"this version has no benchmark {name!r}")
    function = importlib.import_module(module).main
    values = typed_arguments(function, pairs(words), f"benchmark {name}")
    empty = inspect.Parameter.empty
    missing = [
        p.name for p in inspect.signature(function).parameters.values() if p.default is empty and p.name not in values
    ]
    if missing:
        raise ValueError(f"benchmark {name} needs {', '.join('--' + m for m in missing)}")
    function(**values)
