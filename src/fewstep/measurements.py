"""Training data of a posterior sampler: crops of photographs, each seen through an operator and a noise level of its own."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

import numpy as np
import torch

from fewstep.core.names import suggestion
from fewstep.core.together import Together
from fewstep.data import RandomCrops
from fewstep.operators.base import Operator
from fewstep.operators.image import to_unit
from fewstep.operators.words import get_operator


@dataclass(frozen=True)
class Family:
    """Operators of one word, with fields drawn at random.

    Attributes:
        word: of the operator, see `fewstep operators`.
        weight: how often it is drawn, relative to the others.
        fields: one entry per field: a value that stays, a list of choices, or {"low": a, "high": b} with numbers drawn uniformly
            (integers where both ends are) or, with "log": true, uniformly in the logarithm.
        sigma: of the noise in [0, 1] units, in the same language; 0 for operators that add none.
    """

    word: str
    weight: float = 1.0
    fields: Mapping[str, Any] = field(default_factory=dict)
    sigma: Any = field(default_factory=lambda: {"low": 0.005, "high": 0.1, "log": True})

    def __post_init__(self) -> None:
        if not isinstance(self.fields, Mapping):
            raise ValueError(f"fields of {self.word} must be a mapping of names to values, got {self.fields!r}")
        known = [f.name for f in dataclasses.fields(get_operator(self.word))]  # type: ignore[arg-type]
        for name in self.fields:
            if name not in known:
                raise ValueError(f"operator {self.word} has no field {name!r}; {suggestion(name, known)}")
        if self.weight < 0:
            raise ValueError(f"the weight of {self.word} must not be negative")
        for entry in [*self.fields.values(), self.sigma]:
            check_entry(entry, self.word)
        if not all(isinstance(s, Real) and 0 <= float(s) < math.inf for s in ends(self.sigma)):
            raise ValueError(f"sigma of {self.word} must be finite and not negative, got {self.sigma!r}")

    def draw(self, rng: np.random.Generator) -> tuple[Any, float]:
        """Return an operator and a noise level."""
        values = {name: pick(entry, rng) for name, entry in self.fields.items()}
        return get_operator(self.word)(**values), float(pick(self.sigma, rng))

    def corners(self) -> list[tuple[Operator, float]]:
        """Return operators and noise levels among which every choice and both ends of every range occur."""
        given, sigmas = {name: ends(entry) for name, entry in self.fields.items()}, ends(self.sigma)
        count = max(len(values) for values in (*given.values(), sigmas))
        return [
            (get_operator(self.word)(**{n: v[k % len(v)] for n, v in given.items()}), float(sigmas[k % len(sigmas)]))
            for k in range(count)
        ]

    def kinds(self, apart: Mapping[str, Sequence[float]]) -> list[tuple[dict[str, Any], Family]]:
        """Return what tells parts of the family apart, and each part.

        Args:
            apart: fields with the values at which ranges of them are cut. Of a list every choice is a part; fields that it lacks,
                and ranges without a cut in them, are left whole.
        """
        defaults = {f.name: f.default for f in fields(get_operator(self.word))}  # type: ignore[arg-type]
        given = {name: self.fields.get(name, defaults[name]) for name in apart if name in defaults}
        parts = {name: parts for name, entry in given.items() if (parts := parts_of(entry, apart[name]))}
        kinds = [dict(zip(parts, values, strict=True)) for values in itertools.product(*parts.values())]
        return [(kind, dataclasses.replace(self, fields={**self.fields, **kind})) for kind in kinds]

    @property
    def measured(self) -> dict[str, Any]:
        """The fields that operators of this word have where a measurement comes from outside, as far as they are others."""
        simulated = get_operator(self.word)()
        seen = simulated.measured()
        values = {f.name: getattr(seen, f.name) for f in fields(seen)}  # type: ignore[arg-type]
        return {name: v for name, v in values.items() if v != getattr(simulated, name) and name not in self.fields}

    def outside(self, operator: Operator, sigma: float) -> tuple[str, ...]:
        """Return what of an operator of this word and its noise level can never be drawn, "name value (allowed)" each."""
        allowed = {f.name: self.fields.get(f.name, f.default) for f in fields(type(operator))}  # type: ignore[arg-type]
        found = [(name, getattr(operator, name), entry) for name, entry in allowed.items()]
        wrong = [(n, v, e) for n, v, e in [*found, ("sigma", sigma, self.sigma)] if not holds(e, v)]
        return tuple(f"{name} {value} ({entry_text(entry)})" for name, value, entry in wrong)


def parts_of(entry: Any, cuts: Sequence[float]) -> list[Any]:
    """Return the choices of a recipe's entry, or the ranges into which cuts divide a range, which share their ends; [] without."""
    if not isinstance(entry, Mapping):
        return entry if isinstance(entry, list) else [entry]
    ends = [entry["low"], *sorted(c for c in cuts if entry["low"] < c < entry["high"]), entry["high"]]
    return [{**entry, "low": low, "high": high} for low, high in itertools.pairwise(ends)] if len(ends) > 2 else []


def ends(entry: Any) -> list[Any]:
    """Return the choices of a recipe's entry, or the two ends of a range."""
    if isinstance(entry, Mapping):
        return [entry["low"], entry["high"]]
    return entry if isinstance(entry, list) else [entry]


def holds(entry: Any, value: Any) -> bool:
    """Return whether `pick` can give a value."""
    if isinstance(entry, list):
        return value in entry
    return entry["low"] <= value <= entry["high"] if isinstance(entry, Mapping) else entry == value


def entry_text(entry: Any) -> str:
    """Return a recipe's entry in words."""
    return f"{entry['low']} to {entry['high']}" if isinstance(entry, Mapping) else str(entry)


def check_entry(entry: Any, word: str) -> None:
    """Raise ValueError where `pick` could not read a recipe's entry for the operator `word`."""
    if isinstance(entry, list) and not entry:
        raise ValueError(f"a field of {word} has an empty list of choices")
    if not isinstance(entry, Mapping):
        return
    if not {"low", "high"} <= set(entry) <= {"low", "high", "log"}:
        raise ValueError(f"a range of {word} has the keys low, high and perhaps log, not {', '.join(map(str, entry))}")
    if not all(isinstance(entry[name], Real) for name in ("low", "high")):
        raise ValueError(f"a range of {word} lies between numbers, not {dict(entry)}")
    if entry["low"] > entry["high"] or (entry.get("log", False) and entry["low"] <= 0):
        raise ValueError(f"a range of {word} must rise, and be positive where it is logarithmic: {dict(entry)}")


def pick(entry: Any, rng: np.random.Generator) -> Any:
    """Return what a recipe's entry stands for: a value, one of a list, or a number in a range."""
    if isinstance(entry, list):
        return entry[int(rng.integers(len(entry)))]
    if not isinstance(entry, Mapping):
        return entry
    low, high = entry["low"], entry["high"]
    whole = isinstance(low, int) and isinstance(high, int)
    if entry.get("log", False):
        value = math.exp(rng.uniform(math.log(low), math.log(high + whole)))
        return min(int(value), high) if whole else value
    return int(rng.integers(low, high + 1)) if whole else rng.uniform(low, high)


@dataclass(frozen=True)
class SimulatedMeasurements:
    """Batches {"x0", "likelihood"}: item i of step k depends on the seed of the crops, k and i only.

    Attributes:
        crops: the clean images.
        families: what may have happened to them.
        device: where the measurements are made.
    """

    crops: RandomCrops
    families: tuple[Family, ...]
    device: str = "cpu"

    def count(self, step: int) -> int:
        """Return the number of items of this step, over all processes."""
        return self.crops.count(step)

    def batch(self, step: int, items: Iterable[int]) -> dict[str, Any]:
        """Return clean items, (B, 3, size, size) in [-1, 1], and the likelihood of what was measured of them."""
        chosen = list(items)
        x0 = self.crops.batch(step, chosen).to(self.device)
        parts = [self.measure(x[None], step, item) for x, item in zip(x0, chosen, strict=True)]
        return {"x0": x0, "likelihood": Together(parts)}

    def measure(self, x: torch.Tensor, step: int, item: int) -> Any:
        """Return the likelihood of what was measured of x, (1, 3, H, W) in [-1, 1], as item `item` of step `step`."""
        return self.measured(x, step, item)[1]

    def measured(self, x: torch.Tensor, step: int, item: int) -> tuple[Any, Any]:
        """Return the operator and the likelihood of `measure`."""
        rng = np.random.default_rng((self.crops.seed, step, item, 1))
        weights = np.array([family.weight for family in self.families])
        shares = weights / weights.sum() if weights.any() else None  # those of weight 0, alone, are equal
        family = self.families[int(rng.choice(len(weights), p=shares))]
        operator, sigma = family.draw(rng)
        return operator, likelihood_of(operator, sigma, x, int(rng.integers(2**31)))

    def check(self) -> None:
        """Raise ValueError where an operator that may be drawn does not fit the crops: training would end there."""
        drawn = [family for family in self.families if family.weight] or self.families
        for family, size in itertools.product(drawn, sorted({shape.size for shape in self.crops.cycle})):
            x = torch.zeros(1, len(self.crops.images[0]), size, size, device=self.device)
            try:
                for operator, sigma in family.corners():
                    likelihood_of(operator, sigma, x, 0)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"families: {family.word} on crops of {size} pixels: {error}") from None


def likelihood_of(operator: Operator, sigma: float, x: torch.Tensor, seed: int) -> Any:
    """Return the likelihood of what is measured of x, (1, C, H, W) in [-1, 1]."""
    y = operator.simulate(to_unit(x), sigma, seed)
    where = {} if isinstance(y, torch.Tensor) else {"device": x.device}  # a file lies nowhere, a tensor beside x
    return operator.likelihood(y, sigma or None, **where)
