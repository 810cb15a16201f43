"""Words become values of the types that a dataclass or a function declares."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import fewstep
from fewstep.options import assignments, cuts, described_arguments, pairs, typed_arguments, typed_fields, written_as
from fewstep.testing.problems import gaussian_problem


@dataclass(frozen=True)
class Example:
    """Every type that fields have."""

    steps: int = 1
    rate: float = 0.5
    name: str = ""
    on: bool = False
    limit: int | None = 3
    sizes: tuple[int, ...] = ()
    file: Path | None = None
    path: str = field(default="", metadata={"flag": "mask"})


def test_conversion():
    words = {
        "steps": "7",
        "rate": "1e-3",
        "on": "yes",
        "limit": "none",
        "sizes": "3, 4",
        "file": "a/b",
        "mask": "m.png",
    }
    made = Example(**typed_fields(Example, words, "method x"))
    assert made == Example(7, 0.001, "", True, None, (3, 4), Path("a/b"), "m.png")
    assert typed_fields(Example, {"steps": 5}, "method x") == {"steps": 5}


@pytest.mark.parametrize("name", [n for n in fewstep.available() if hasattr(fewstep.get(n), "grid")])
def test_the_grid_of_a_method_is_a_name_or_its_times(name):
    """Where a sampler of the prior takes "1,0.5,0.2,0" a method does."""
    sampler, problem = fewstep.get(name), gaussian_problem().problem
    made = sampler(steps=3, **typed_fields(sampler, {"grid": "1,0.5,0.2,0"}, name))
    assert made.grid == (1.0, 0.5, 0.2, 0.0) and made.times(problem).tolist() == [1.0, 0.5, 0.2, 0.0]
    assert typed_fields(sampler, {"grid": "log_snr"}, name) == {"grid": "log_snr"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"stepp": "1"}, "method x has no option 'stepp'; did you mean steps"),
        ({"path": "1"}, "no option 'path'"),
        ({"zzz": "1"}, "choose one of"),
        ({"steps": "1.5"}, "steps must be int, got '1.5'"),
        ({"on": "maybe"}, "on must be bool"),
        ({"limit": "x"}, "NoneType or int"),
    ],
)
def test_errors(words, message):
    with pytest.raises(ValueError, match=message):
        typed_fields(Example, words, "method x")


def test_functions_and_words():
    def function(names: Sequence[str] | None = None, levels: Sequence[float] = (), count: int = 1) -> None: ...

    values = typed_arguments(function, pairs(["--names", "a,b", "--levels=1,2.5"]), "benchmark x")
    assert values == {"names": ("a", "b"), "levels": (1.0, 2.5)}
    for wrong in (["--names"], ["names", "a"], ["--", "a"]):
        with pytest.raises(ValueError, match="expected --name value"):
            pairs(wrong)
    flags = ["a_b", "c"]
    assert pairs(["--a-b", "--c", "no", "--d", "1"], flags) == {"a-b": "true", "c": "no", "d": "1"}
    assert pairs(["--c=off", "--a-b"], flags) == {"c": "off", "a-b": "true"}
    with pytest.raises(ValueError, match="expected --name value, got '--d'"):
        pairs(["--c", "--d"], flags)
    assert assignments(["a=1", "b=x=y"]) == {"a": "1", "b": "x=y"}
    with pytest.raises(ValueError, match="field=value"):
        assignments(["a"])


def test_parameters_are_described_for_a_help():
    def main(
        folder: str | Path, rate: float = 0.5, names: Sequence[str] | None = None, *, sizes: Sequence[int] = (3, 4)
    ):
        """Do it.

        Args:
            folder: of photographs,
                all of them.
            rate: see [here]: so.
            sizes: of each.

        Raises:
            names: is no argument.
        """

    folder, rate, names, sizes = described_arguments(main)
    assert (folder.kind, folder.text) == ("PATH", "of photographs, all of them.")
    assert folder.default is inspect.Parameter.empty
    assert (rate.kind, rate.text, written_as(rate.default)) == ("FLOAT", "see [here]: so.", "0.5")
    assert (names.kind, names.text, written_as(names.default)) == ("TEXT,...", "", None)
    assert (sizes.kind, written_as(sizes.default), written_as(())) == ("INT,...", "3,4", None)
    assert written_as(True) == "true"


def test_fields_are_given_with_numbers_to_cut_at_or_without():
    assert cuts(["factor", "quality=15,30", " rate = 0.5"]) == {"factor": (), "quality": (15, 30), "rate": (0.5,)}
    assert [type(number) for number in cuts(["quality=15,0.5"])["quality"]] == [int, float]
    for word in ("quality=", "quality=a", "quality=15;30"):
        with pytest.raises(ValueError, match=f"to cut at, got '{word}'"):
            cuts([word])
