"""What is said of a name that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggestion(word: str, choices: Iterable[str]) -> str:
    """Return "did you mean ...?" where something is near, the list of choices otherwise."""
    choices = sorted(choices)
    if not choices:
        return "it has none"
    near = difflib.get_close_matches(word, choices, 2, 0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(choices)}"
