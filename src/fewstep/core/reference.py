"""Where a method comes from: for the docs, `fewstep methods` and `fewstep cite`."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Reference:
    """A publication.

    Args:
        title: as printed.
        authors: "Family, Given and Family, Given" as BibTeX wants them.
        year: of the version cited.
        venue: conference or journal.
        arxiv: identifier such as "2209.14687", empty where there is none.
    """

    title: str
    authors: str
    year: int
    venue: str
    arxiv: str = ""

    @property
    def key(self) -> str:
        """BibTeX key: first family name, year, first long word of the title."""
        family = re.sub(r"\W", "", self.authors.split(",")[0]).lower()
        word = next((w for w in re.findall(r"[A-Za-z]+", self.title) if len(w) > 3), "paper").lower()
        return f"{family}{self.year}{word}"

    def bibtex(self) -> str:
        """Return the BibTeX entry."""
        fields = {"title": self.title, "author": self.authors, "booktitle": self.venue, "year": str(self.year)}
        if self.arxiv:
            fields |= {"eprint": self.arxiv, "archivePrefix": "arXiv"}
        body = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
        return f"@inproceedings{{{self.key},\n{body}\n}}"

    def __str__(self) -> str:
        """Return a one-line citation."""
        first = self.authors.split(" and ")[0].split(",")[0]
        others = " et al." if " and " in self.authors else ""
        where = f"arXiv:{self.arxiv}" if self.arxiv else self.venue
        return f"{first}{others} ({self.year}), {self.title}, {where}"
