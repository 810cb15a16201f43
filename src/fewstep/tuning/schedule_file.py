"""A tuned schedule on disk: the solver, its settings and its times, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fewstep.core.files import write_json
from fewstep.core.multistep import Solver
from fewstep.core.registry import get
from fewstep.options import typed_fields

FORMAT = "fewstep-schedule"
SOLVER = "dpmpp"  # where none is named
# of the fields as JSON has them
_KINDS: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("method", "prior", "solver"), (str, "a name")),
    "times": (list, "a list"),
    **dict.fromkeys(("settings", "figures"), (dict, "an object")),
}


@dataclass(frozen=True)
class TunedSchedule:
    """What a tuner found.

    Attributes:
        method: the tuner.
        prior: what it was tuned for.
        solver: name of the solver.
        times: the falling times, `steps` + 1 of them.
        settings: further fields of the solver.
        figures: what the tuner measured, for the record.
    """

    method: str
    prior: str
    solver: str
    times: tuple[float, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)

    def sampler(self, name: str | None = None, **overrides: Any) -> Solver:
        """Return the solver with these times.

        Args:
            name: another solver, which then takes the times only.
            **overrides: fields of the solver; another number of steps resamples the times, see `grid.times_of`.

        Raises:
            ValueError: there is no such solver, or it has no such fields.
        """
        kind = get(name or self.solver, "solvers")
        own = self.settings if name in (None, self.solver) else {}
        settings = typed_fields(kind, own, f"solver {name or self.solver}")
        fixed = {"steps": len(self.times) - 1, "grid": self.times}
        try:
            solver = kind(**{**settings, **fixed, **overrides})
        except TypeError as error:
            raise ValueError(f"solver {name or self.solver}: {error}") from None
        assert isinstance(solver, Solver)
        return solver

    def save(self, path: str | Path) -> None:
        """Write the schedule to `path`, atomically."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> TunedSchedule:
        """Return what `save` wrote.

        Raises:
            ValueError: the file cannot be read, is no schedule, or lacks a field or has one that is not known or of another
                kind.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as a schedule ({error})") from None
        known = {f.name for f in fields(cls)}
        if not isinstance(values, dict) or values.pop("format", None) != FORMAT or set(values) != known:
            raise ValueError(f"{path} is no schedule of this library: {FORMAT} with {', '.join(sorted(known))}")
        for name, (kind, words) in _KINDS.items():
            if not isinstance(values[name], kind):
                raise ValueError(f"{path} is no schedule: {name} must be {words}, got {values[name]!r}")
        if len(values["times"]) < 2 or not all(type(time) in (int, float) for time in values["times"]):
            raise ValueError(f"{path} is no schedule: times must be two numbers or more, got {values['times']!r}")
        return cls(**{name: frozen(value) if name != "figures" else value for name, value in values.items()})


def solver_of(name: str | None, schedule: str | Path | None, fields: Mapping[str, Any]) -> Solver:
    """Return the solver called `name`, on the times of a file of `TunedSchedule` where there is one.

    Args:
        name: None takes that of the file, with the settings in it, or `SOLVER`.
        schedule: the file.
        fields: further fields, as values or as text.

    Raises:
        ValueError: there is no such solver, it has no such field, or the file cannot be read.
    """
    tuned = None if schedule is None else TunedSchedule.load(schedule)
    name = name or (SOLVER if tuned is None else tuned.solver)
    given = typed_fields(get(name, "solvers"), fields, f"solver {name}")
    solver = get(name, "solvers")(**given) if tuned is None else tuned.sampler(name, **given)
    assert isinstance(solver, Solver)
    return solver


def frozen(value: Any) -> Any:
    """Return a JSON value with tuples for lists, as the fields of a solver have them."""
    if isinstance(value, dict):
        return {name: frozen(inner) for name, inner in value.items()}
    return tuple(frozen(inner) for inner in value) if isinstance(value, list) else value
