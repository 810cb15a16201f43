r"""USF: the space of all decisions that a step of a multistep solver makes, each step making its own.

A step integrates a polynomial through past predictions. Its decisions (Liu et al. 2023, table 1):

* form: the integral runs over x_0 or over epsilon;
* terms: predictions that the polynomial in lambda = log(alpha / sigma) goes through, 1 to 4;
* relaxation: what stands for the integral I_1 of the first derivative: itself (exact), h I_0 / 2 (half; with two terms the released
  DPM-Solver++ 2M, and bh2 of UniPC), or h^2 / 2 times the weight at the end (linear; bh1 of UniPC);
* start: how many points ago the step begins, 0 (multistep) or 1 (with an inner point before it, singlestep);
* corrector: whether the point it starts from is first corrected with the prediction made there, at no network call.

The corrected point is x + (C - P), where P is the increment that led to x and C that of the polynomial that also goes through the
new prediction, so that the network is not called again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fewstep.core.checks import one_of
from fewstep.core.multistep import EPSILON, X0, Coefficient, MultistepSolver, Point, Stage
from fewstep.core.schedule import Schedule
from fewstep.solvers._decisions import FORMS, RELAXATIONS, TERMS, Decision, Increment, correction, moved_by
from fewstep.solvers._references import UNIFIED


@dataclass(frozen=True)
class USF(MultistepSolver):
    """A solver with decisions of its own for every step; the default makes those of DPM-Solver++ 2M at all of them.

    Args:
        steps: network calls.
        decisions: (form, terms, relaxation, start, corrector) of each step; fewer serve equal shares of the steps.
        grid: spacing of the times.
    """

    steps: int = 10
    decisions: tuple[tuple[str, int, str, int, bool], ...] = (("x0", 2, "half", 0, False),)
    grid: str | tuple[float, ...] = "log_snr"

    form: ClassVar = X0
    limit: ClassVar = "the prior as steps grow"
    reference: ClassVar = UNIFIED

    def __post_init__(self) -> None:
        object.__setattr__(self, "decisions", tuple(tuple(decision) for decision in self.decisions))
        if not self.decisions:
            raise ValueError("there must be at least one decision")
        if long := [given for given in self.decisions if len(given) > len(Decision._fields)]:
            raise ValueError(f"a decision must be of {', '.join(Decision._fields)} and no more, got {long[0]}")
        for decision in (Decision(*given) for given in self.decisions):
            one_of("form", decision.form, FORMS)
            one_of("terms", decision.terms, TERMS)
            one_of("relaxation", decision.relaxation, RELAXATIONS)
            one_of("start", decision.start, (0, 1))

    @property
    def order(self) -> int:
        """See `Solver`; what the least of its steps guarantees, and one more where all of them are corrected.

        Steps over an inner point in epsilon do not damp the error of the first step, which is of order 2.
        """
        chosen = [Decision(*given) for given in self.decisions]
        low = (d.relaxation != "exact" or (d.start and FORMS[d.form] is EPSILON) for d in chosen)
        least = min(min(d.terms, 2) if capped else d.terms for d, capped in zip(chosen, low, strict=True))
        return least + all(d.corrector and d.start == 0 for d in chosen)

    def decision(self, k: int) -> Decision:
        """Return the decision of step k."""
        return Decision(*self.decisions[min(k * len(self.decisions) // self.steps, len(self.decisions) - 1)])

    def stages(self, schedule: Schedule, nodes: Sequence[Point], s: Point) -> Sequence[Stage]:
        """See `MultistepSolver`."""
        k = len(nodes) - 1
        own = self.decision(k)
        start = min(own.start, k)
        moved = moved_by(own, nodes, s)
        x: list[Coefficient] = [0.0] * start + [FORMS[own.form].transfer(nodes[start], s)]
        if own.corrector and k > 0 and start == 0:
            moved = moved.plus(correction(self.decision(k - 1), nodes), x[0])
        moved = moved.plus(Increment(x, []))
        return [Stage(s, tuple(moved.x), tuple(moved.predictions))]
