"""The decisions of one step of a multistep solver, see `usf`, as coefficients of past points and predictions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.core.multistep import EPSILON, X0, Coefficient, Form, Point, lagrange, quadrature

FORMS: dict[str, Form] = {form.name: form for form in (X0, EPSILON)}
TERMS = (1, 2, 3, 4)


class Integrals(NamedTuple):
    """I_0, the exact I_1, the step h in lambda and the weight at its end."""

    whole: Tensor
    first: Tensor
    h: Tensor
    end: Tensor


RELAXATIONS = {
    "exact": lambda of: of.first,
    "half": lambda of: of.h * of.whole / 2,
    "linear": lambda of: of.end * of.h**2 / 2,
}


class Decision(NamedTuple):
    """What one step decides, see `usf`."""

    form: str = "x0"
    terms: int = 2
    relaxation: str = "half"
    start: int = 0
    corrector: bool = False


class Increment(NamedTuple):
    """sum_i x[i] x_(-i) + sum_j predictions[j] D_(-j), newest first."""

    x: list[Coefficient]
    predictions: list[Coefficient]

    def plus(self, other: Increment, factor: Coefficient = 1.0) -> Increment:
        """Return self + factor other."""
        pairs = zip(self, other, strict=True)
        return Increment(*([a + factor * b for a, b in zip_longest(own, more, fillvalue=0.0)] for own, more in pairs))

    def earlier(self) -> Increment:
        """Return the same as it is seen one step later."""
        return Increment([0.0, *self.x], [0.0, *self.predictions])


def moved_by(decision: Decision, nodes: Sequence[Point], s: Point) -> Increment:
    """Return alpha_s times the integral to `s` of the polynomial through the predictions at `nodes`, newest first."""
    form, known, start = FORMS[decision.form], nodes[: decision.terms], min(decision.start, len(nodes) - 1)
    base = nodes[start].log_snr
    at, weights = quadrature(base, s.log_snr)
    measure = weights * form.weight(at, s)
    logs = [node.log_snr for node in known]
    shares = [(measure * p).sum(0) for p in lagrange(at, logs)]
    if len(known) > max(1, start):
        first = (measure * (at - base)).sum(0)
        of = Integrals(measure.sum(0), first, s.log_snr - base, form.weight(s.log_snr, s))
        excess = RELAXATIONS[decision.relaxation](of) - first
        shares = [share + excess * slope for share, slope in zip(shares, slope_weights(logs, start), strict=True)]
    if form is X0:
        return Increment([], [s.alpha * share for share in shares])
    pairs = list(zip(shares, known, strict=True))  # epsilon = (x - alpha D) / sigma at each of the points
    return Increment(
        [s.alpha * share / node.sigma for share, node in pairs],
        [-s.alpha * share * node.alpha / node.sigma for share, node in pairs],
    )


def correction(before: Decision, nodes: Sequence[Point]) -> Increment:
    """Return C - P: what the prediction at nodes[0] adds to the step that led there, whose decision was `before`."""
    past = nodes[1:]
    start = min(before.start, len(past) - 1)
    wide = before._replace(terms=min(before.terms, len(past)) + 1, relaxation="exact", start=start + 1)
    return moved_by(wide, nodes, nodes[0]).plus(moved_by(before, past, nodes[0]).earlier(), -1.0)


def slope_weights(known: Sequence[Tensor], where: int) -> list[Tensor]:
    """Return the weights by which values at the nodes `known` give the slope of their polynomial at known[where]."""
    here, out = known[where], {}
    others = [m for m in range(len(known)) if m != where]
    for j in others:
        factors = [(here - known[m]) / (known[j] - known[m]) for m in others if m != j]
        out[j] = torch.stack([torch.ones_like(here), *factors]).prod(0) / (known[j] - here)
    out[where] = -torch.stack(list(out.values())).sum(0)
    return [out[j] for j in range(len(known))]
