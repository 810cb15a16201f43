r"""One kernel for fast solvers: past points and past predictions, combined by a table.

With lambda = log(alpha/sigma) and rho = sigma/alpha the probability flow from t to s < t is solved exactly up to an integral of
the prediction, x_0 or epsilon, along the way (Lu et al. 2022, arXiv:2211.01095, prop. 4.1; Zhang and Chen 2022, arXiv:2204.13902):

    x_s = (sigma_s / sigma_t) x_t + alpha_s int_t^s exp(lambda - lambda_s) D dlambda
    x_s = (alpha_s / alpha_t) x_t + alpha_s int_t^s epsilon drho

Every solver, ODE or SDE, one call or several per step, replaces the integrand by a combination of the predictions it has, so a
step is one or more stages, each of them

    x_new = sum_i a_i x_(-i) + sum_j b_j P_(-j) + c z + d,    z ~ N(0, I),

over the points and the predictions seen so far, newest first. A solver states the coefficients; they are computed once for a
grid, in float64.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, Self, final

import numpy as np
import torch
from torch import Tensor

from fewstep.core.batch import like
from fewstep.core.denoiser import PARAMETRISATIONS
from fewstep.core.grid import times_of
from fewstep.core.likelihood import FlatLikelihood
from fewstep.core.noise import Noise
from fewstep.core.problem import Posterior
from fewstep.core.sampler import DiffusionSampler, State
from fewstep.core.schedule import Flow, Schedule

Coefficient = float | Tensor  # one for all items, (N,) one for each, or (1, *event) one for each coordinate
# (problem, x_t, t, noise) -> E[x_0 | x_t, ...], (N, *event)
Predict = Callable[[Posterior, Tensor, Tensor, Noise], Tensor]


def prior_mean(problem: Posterior, x_t: Tensor, t: Tensor, noise: Noise) -> Tensor:
    """Return E[x_0 | x_t] of the prior, (N, *event): the prediction of an unguided solver."""
    return problem.denoise(x_t, t)


class Solver(DiffusionSampler):
    """A sampler of the prior, from any prediction of x_0 that is smooth in (x_t, t).

    Attributes:
        order: global order of convergence in the step; for samplers with fresh noise the weak order. A start with fewer
            predictions leaves an error of order 2, which shows where the schedule starts at a small ratio.
        undriven: why it cannot take the prediction of a guided sampler, empty where it can.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    exact: ClassVar[str] = "posterior"
    undriven: ClassVar[str] = ""

    @property
    @abstractmethod
    def order(self) -> float:
        """Global order of convergence."""

    @abstractmethod
    def advance(self, problem: Posterior, state: State, k: int, noise: Noise, predict: Predict) -> State:
        """Return the state after step k, with x_0 predicted by `predict`."""

    @final
    def init(self, problem: Posterior, noise: Noise) -> State:
        """See `Sampler`.

        Raises:
            ValueError: there is a measurement, which a solver by itself would not see.
        """
        if not isinstance(problem.likelihood, FlatLikelihood):
            name = type(self).__name__
            raise ValueError(
                f"{name} samples the prior and would not see the measurement; call it on Posterior(prior, "
                f"FlatLikelihood(...)), or let it drive a guided method: Driven(<method>, {name}())"
            )
        return super().init(problem, noise)

    @final
    def step(self, problem: Posterior, state: State, k: int, noise: Noise) -> State:
        """See `Sampler`."""
        return self.advance(problem, state, k, noise, prior_mean)


class Point(NamedTuple):
    """A time and its (alpha, sigma), float64, () or (N,) each."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor

    @classmethod
    def of(cls, schedule: Schedule, t: Tensor) -> Self:
        """Return the point at time t."""
        return cls(t, *schedule(t))

    @classmethod
    def at_ratio(cls, schedule: Schedule, ratio: Tensor) -> Self:
        """Return the point where sigma / alpha = `ratio`."""
        return cls.of(schedule, schedule.time(ratio))

    @property
    def ratio(self) -> Tensor:
        """rho = sigma / alpha."""
        return self.sigma / self.alpha

    @property
    def log_snr(self) -> Tensor:
        """lambda = log(alpha / sigma)."""
        return torch.log(self.alpha / self.sigma)


class Form(NamedTuple):
    """Which prediction the integral runs over: its name in `PARAMETRISATIONS`, the transfer of x and the weight in lambda."""

    name: str
    transfer: Callable[[Point, Point], Tensor]
    weight: Callable[[Tensor, Point], Tensor]


X0 = Form("x0", lambda t, s: s.sigma / t.sigma, lambda log_snr, s: torch.exp(log_snr - s.log_snr))
EPSILON = Form("epsilon", lambda t, s: s.alpha / t.alpha, lambda log_snr, s: -torch.exp(-log_snr))


# what a polynomial may be in
VARIABLES: dict[str, Callable[[Point], Tensor]] = {
    "t": lambda point: point.t,
    "rho": lambda point: point.ratio,
    "log_rho": lambda point: -point.log_snr,
}

# Adams-Bashforth for even steps, newest first
ADAMS: dict[int, tuple[float, ...]] = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
    5: (1901 / 720, -2774 / 720, 2616 / 720, -1274 / 720, 251 / 720),
}


class Stage(NamedTuple):
    """One row of the table: the point it leads to, and the coefficients a, b (newest first), c and d."""

    end: Point
    x: tuple[Coefficient, ...]
    predictions: tuple[Coefficient, ...]
    noise: Coefficient = 0.0
    offset: Coefficient = 0.0


class Call(NamedTuple):
    """One network call, at time t with its (alpha, sigma), the row that follows it, and whether that ends at t = 0."""

    t: Tensor
    alpha: Coefficient
    sigma: Coefficient
    row: Stage
    last: bool


class History(NamedTuple):
    """Points before the current one and predictions, newest first, (N, *event) each."""

    x: tuple[Tensor, ...] = ()
    predictions: tuple[Tensor, ...] = ()


class Plan(NamedTuple):
    """All calls of a solver on a grid, step by step, and how far back their rows read."""

    solver: MultistepSolver
    steps: tuple[tuple[Call, ...], ...]
    depth_x: int
    depth_predictions: int

    @property
    def calls(self) -> int:
        """Network calls."""
        return sum(len(step) for step in self.steps)

    def advance(self, problem: Posterior, state: State, k: int, noise: Noise, predict: Predict) -> State:
        """Return the state after step k, see `Solver`."""
        past = state.memory or History()
        xs, predictions = (state.x, *past.x), past.predictions
        for t, alpha, sigma, row, last in self.steps[k]:
            x0 = predict(problem, xs[0], t, noise)
            to_kind = PARAMETRISATIONS[self.solver.form.name].from_x0
            seen = to_kind(x0, xs[0], _scale(alpha, x0), _scale(sigma, x0))
            past = () if last else predictions  # the result is the prediction of x_0 as it is
            predictions = (self.solver.on_prediction(seen, past), *past)
            terms = (self.solver.direction(predictions), *past)
            x = _combine((*row.x, *row.predictions), (*xs[: len(row.x)], *terms[: len(row.predictions)]))
            if not isinstance(row.noise, float) or row.noise > 0:
                x = x + _scale(row.noise, x) * noise.randn_like(x)
            if not isinstance(row.offset, float) or row.offset != 0:
                x = x + _scale(row.offset, x)
            xs = (x, *xs)
        return State(xs[0], History(xs[1 : 1 + self.depth_x], predictions[: self.depth_predictions]))


class MultistepSolver(Solver):
    """A solver that is a table.

    Attributes:
        form: the prediction that it combines, X0 or EPSILON.
        recall: how many past predictions `on_prediction` and `direction` read.
    """

    form: ClassVar[Form]
    recall: ClassVar[int] = 0

    @abstractmethod
    def stages(self, schedule: Schedule, nodes: Sequence[Point], s: Point) -> Sequence[Stage]:
        """Return the rows of the step from nodes[0] to `s`, where s.t > 0.

        Args:
            schedule: to place inner points.
            nodes: where there are predictions, newest first; the first of them is the current point.
            s: the point to be reached, which the last row leads to.
        """

    def on_prediction(self, prediction: Tensor, past: Sequence[Tensor]) -> Tensor:
        """Return what is kept of a prediction, (N, *event), given those kept before it, newest first; none at the last step."""
        return prediction

    def direction(self, kept: Sequence[Tensor]) -> Tensor:
        """Return what the rows combine for the newest of the predictions kept, newest first, (N, *event)."""
        return kept[0]

    @property
    def nfe(self) -> int:
        """See `Sampler`."""
        return plan_of(self, Flow()).calls

    @final
    def advance(self, problem: Posterior, state: State, k: int, noise: Noise, predict: Predict) -> State:
        """See `Solver`."""
        return plan_of(self, problem.schedule).advance(problem, state, k, noise, predict)

    def plan(self, schedule: Schedule, times: Tensor) -> Plan:
        """Return the table for falling `times`, (steps + 1,), or (steps + 1, N) where each item has its own, float64.

        A step to t = 0 returns the prediction of x_0.

        Raises:
            ValueError: some items reach t = 0 before others.
        """
        nodes: list[Point] = []
        steps = []
        for t, s in itertools.pairwise(Point.of(schedule, t) for t in times):
            nodes.insert(0, t)
            last = bool((s.t == 0).all())
            if bool((s.t == 0).any()) and not last:
                raise ValueError("all items must reach t = 0 in the same step")
            stages = [_denoising(self.form, t, s)] if last else self.stages(schedule, nodes, s)
            inner = [stage.end for stage in stages[:-1]]
            nodes[:0] = reversed(inner)
            steps.append(tuple(_call(point, stage, last) for point, stage in zip((t, *inner), stages, strict=True)))
        rows = [call.row for step in steps for call in step]
        depth_x, depth = max(len(r.x) for r in rows) - 1, max(len(r.predictions) for r in rows) - 1
        return Plan(self, tuple(steps), depth_x, max(depth, self.recall))


def plan_of(solver: MultistepSolver, schedule: Schedule) -> Plan:
    """Return the table of a solver on its own grid, made once."""
    if not isinstance(solver.grid, str | tuple):  # a list of times is no key of the cache
        solver = replace(solver, grid=tuple(map(float, solver.grid)))
    return _plan(solver, schedule)


@lru_cache(maxsize=64)
def _plan(solver: MultistepSolver, schedule: Schedule) -> Plan:
    return solver.plan(schedule, times_of(solver.grid, schedule, solver.steps))


def row(form: Form, t: Point, s: Point, weights: Sequence[Coefficient], back: int = 0) -> Stage:
    """Return the row x_s = transfer x_t + alpha_s sum_j weights[j] P_(-j), where x_t is `back` points ago."""
    return Stage(s, (0.0,) * back + (form.transfer(t, s),), tuple(s.alpha * weight for weight in weights))


_GAUSS = tuple(torch.from_numpy(a / 2) for a in np.polynomial.legendre.leggauss(32))


def quadrature(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return nodes and weights of Gauss-Legendre's rule on [a, b], (32, *shape of a) each."""
    nodes, weights = (values.reshape(-1, *[1] * a.ndim) for values in _GAUSS)
    return a + (nodes + 0.5) * (b - a), (b - a) * weights


def lagrange(at: Tensor, known: Sequence[Tensor]) -> list[Tensor]:
    """Return the Lagrange polynomials of the nodes `known` at the points `at`, (Q, ...) each."""
    out = []
    for j, own in enumerate(known):
        factors = [(at - other) / (own - other) for m, other in enumerate(known) if m != j]
        out.append(torch.stack([torch.ones_like(at), *factors]).prod(0))
    return out


def interpolated(
    form: Form, schedule: Schedule, nodes: Sequence[Point], s: Point, variable: Callable[[Point], Tensor]
) -> Stage:
    """Return the row that integrates the Lagrange polynomial in `variable` through the predictions at `nodes`.

    By Gauss-Legendre quadrature in lambda, exact to rounding for smooth schedules; of order len(nodes).
    """
    log_snr, weights = quadrature(nodes[0].log_snr, s.log_snr)
    at = variable(Point.at_ratio(schedule, torch.exp(-log_snr)))
    measure = weights * form.weight(log_snr, s)
    return row(form, nodes[0], s, [(measure * p).sum(0) for p in lagrange(at, [variable(node) for node in nodes])])


def midpoint(schedule: Schedule, t: Point, s: Point) -> list[Stage]:
    """Return the rows of the second-order step with the prediction of x_0 taken at the middle of [t, s] in lambda."""
    h = s.log_snr - t.log_snr
    middle = Point.at_ratio(schedule, torch.exp(-t.log_snr - h / 2))
    return [row(X0, t, middle, (-torch.expm1(-h / 2),)), row(X0, t, s, (-torch.expm1(-h), 0.0), back=1)]


def _denoising(form: Form, t: Point, s: Point) -> Stage:
    """Return the row whose result is the prediction of x_0 at t."""
    if form is X0:
        return Stage(s, (0.0,), (1.0,))
    return Stage(s, (1 / t.alpha,), (-t.ratio,))


def _call(point: Point, stage: Stage, last: bool) -> Call:
    """Return a call and its row, with numbers for coefficients that all items share."""

    def number(c: Coefficient) -> Coefficient:
        return c if isinstance(c, float) or c.ndim else float(c)

    x, predictions = tuple(map(number, stage.x)), tuple(map(number, stage.predictions))
    plain = Stage(stage.end, x, predictions, number(stage.noise), number(stage.offset))
    return Call(point.t, number(point.alpha), number(point.sigma), plain, last)


def _scale(c: Coefficient, x: Tensor) -> Any:
    """Return a coefficient in a form that broadcasts against `x`, (N, *event)."""
    return c if isinstance(c, float) else like(c, x)


def _combine(coefficients: Sequence[Coefficient], values: Sequence[Tensor]) -> Tensor:
    """Return sum_i coefficients[i] values[i], (N, *event)."""
    pairs = [(c, v) for c, v in zip(coefficients, values, strict=True) if not isinstance(c, float) or c != 0]
    (first, value), *rest = pairs
    out = value * _scale(first, value)
    for c, v in rest:
        out = out.add(v, alpha=c) if isinstance(c, float) else out + like(c, v) * v
    return out
