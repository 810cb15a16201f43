"""Renew the generated parts of methods.md from the classes of the methods: `python docs/make_methods.py`."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from fewstep.commands.listing import meanings
from fewstep.core.registry import available, get
from fewstep.core.sampler import Sampler

PAGE = Path(__file__).parent / "methods.md"
MARKED = re.compile(r"(<!-- begin: (\w+) -->\n).*?(<!-- end: \2 -->)", re.DOTALL)


def methods() -> dict[str, type[Sampler]]:
    """Return the methods of this package; those of others that happen to be installed are theirs to document."""
    found = {name: get(name) for name in available()}
    return {name: cls for name, cls in found.items() if cls.__module__ == f"fewstep.methods.{name}"}


def overview() -> str:
    """Return one row per method: needs, network calls, what it converges to."""
    head = ["method", "needs", "network calls", "declares", "converges to"]
    rows = [
        [f"[`{name}`](#{name})", ", ".join(sorted(cls.needs)), calls(cls), cls.exact, cls.limit]
        for name, cls in methods().items()
    ]
    return table(head, rows)


def calls(cls: type[Sampler]) -> str:
    """Return the network calls per sample of the defaults, and of the presets where they differ."""
    usual = cls().nfe
    others = {name: cls.preset(name).nfe for name in cls.presets}
    return ", ".join([str(usual), *(f"{n} ({name})" for name, n in others.items() if n != usual)])


def details() -> str:
    """Return one section per method: source, fields with defaults and meaning, presets."""
    return "\n".join(section(name, cls) for name, cls in methods().items())


def section(name: str, cls: type[Sampler]) -> str:
    """Return the section of a method."""
    said = meanings(cls)
    rows = [[f"`{f.name}`", f"`{f.default!r}`", said[f.name]] for f in fields(cls)]  # type: ignore[arg-type]
    lines = [f"### {name}", "", f"{cls.reference}.", "", table(["field", "default", "meaning"], rows)]
    named = {preset: values for preset, values in cls.presets.items() if values}
    for preset, values in named.items():
        lines.append(f"Preset `{preset}`: {', '.join(f'`{key} = {value!r}`' for key, value in values.items())}.\n")
    return "\n".join(lines)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def renewed(page: str) -> str:
    """Return the page with its generated parts as the classes have them now."""
    parts = {"overview": overview, "details": details}
    return MARKED.sub(lambda m: m[1] + parts[m[2]]() + m[3], page)


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
