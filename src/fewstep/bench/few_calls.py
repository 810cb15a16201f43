"""Tables of all solvers at a few network calls on one prior: untuned, with statistics of the prior, and tuned to it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track

from fewstep.bench.common import Variant, variants
from fewstep.bench.grounds import ERROR, FRECHET, TRANSPORT, Ground
from fewstep.bench.log import Log
from fewstep.core.multistep import MultistepSolver
from fewstep.core.noise import Noise
from fewstep.core.sampler import Sampler
from fewstep.solvers.dpm_v3 import DPMSolverV3, Statistics, estimate
from fewstep.tuning.align import AlignYourSteps
from fewstep.tuning.base import Task, Tuner, Tuning
from fewstep.tuning.ggdm import GGDM
from fewstep.tuning.search import SolverSearch

FITTED = "with statistics"  # preset of DPM-Solver-v3
LEVELS, LOWEST = 60, 0.0099  # of the statistics: how many, and the last ratio, below that of the grids
TUNERS: dict[str, Tuner] = {  # lighter than their defaults, so that a table is made in minutes
    "ays": AlignYourSteps(rounds=3, nodes=60, bank=96, fine=60),
    "ggdm": GGDM(rounds=50, items=24, bank=96, fine=60),
    "s3": SolverSearch(rounds=8, tried=10, bank=48, fine=60),
}


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        names: solvers.
        budgets: network calls.
        tuners: names in `TUNERS`.
        tuned: budgets at which they are run.
        known: samples from which DPM-Solver-v3 has its statistics; 0 leaves that row out.
    """

    names: Sequence[str]
    budgets: Sequence[int]
    tuners: Sequence[str] = tuple(TUNERS)
    tuned: Sequence[int] = (5, 10)
    known: int = 128

    def __post_init__(self) -> None:
        if self.tuners and (never := sorted(set(self.tuned) - set(self.budgets))):
            raise ValueError(f"tuned budgets {never} are not among the budgets {list(self.budgets)}")


class Cell(NamedTuple):
    """The figures of one run, see `Ground.figures`, and where they stand."""

    budget: int
    method: str
    preset: str
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class Tables:
    """The tables of one prior.

    Attributes:
        ground: the prior and its samples.
        plan: what is run.
        log: finished runs.
    """

    ground: Ground
    plan: Plan
    log: Log

    def make(self) -> dict[str, list[dict[str, Any]]]:
        """Run what is not in the log and return the tables by title."""
        chosen = [(n, name) for n in self.plan.tuned for name in self.plan.tuners]
        for n, _ in chosen:
            self._tunable(n)  # that there is none should not be found after hours
        title, cells = self.ground.title, list(self._untuned())
        rows = [
            self._tuned(name, n, self._base(cells, n)) for n, name in track(chosen, f"{title}: tuning", transient=True)
        ]
        cells += [Cell(row["calls"], f"tuned by {row['tuner']}", "", row) for row in rows]
        shown = [measure for measure in (ERROR, TRANSPORT, FRECHET) if any(measure in cell.figures for cell in cells)]
        tables = {f"{title}: {measure}": pivot(cells, measure) for measure in shown}
        beside = {"tuned": [self._gain(row, cells) for row in rows], "floors": list(self.ground.floors)}
        return tables | {f"{title}: {name}": table for name, table in beside.items() if table}

    def _untuned(self) -> Iterator[Cell]:
        """Yield (budget, method, preset, figures) of every solver as it is published."""
        entries = [(n, v) for n in self.plan.budgets for v in variants(self.plan.names, [n], kind="solvers")]
        for n, variant in track(entries, self.ground.title, transient=True):
            yield Cell(n, variant.method, variant.preset, self._run(n, variant))
        yield from self._fitted()

    def _fitted(self) -> Iterator[Cell]:
        """Yield the same of DPM-Solver-v3 with statistics of this prior, of which the log needs no second estimate."""
        table: Statistics | None = None
        entries = [(n, order) for n in self.plan.budgets for order in (2, 3)] if self.plan.known else []
        for n, order in track(entries, f"{self.ground.title}: {FITTED}", transient=True):
            preset = f"{FITTED}, order {order}"
            if table is None and not self.log.has(self._key(n, "dpm_v3", preset)):
                table = statistics_of(self.ground, self.plan.known)
            yield Cell(n, "dpm_v3", preset, self._run(n, Variant("dpm_v3", preset, DPMSolverV3(n, order, table))))

    def _run(self, budget: int, variant: Variant) -> dict[str, Any]:
        key = self._key(budget, variant.method, variant.preset)
        if not self.log.has(key):
            self.log.add(key, self.ground.figures(variant.sampler))
        return self.log.row(key)

    def _tuned(self, name: str, budget: int, base: str) -> dict[str, Any]:
        """Return what a tuner makes of the times of the solver `base`, or of its own, and the figures of the result."""
        key, tuner = self._key(budget, name, base), TUNERS[name]
        if not self.log.has(key):
            task = Task(self.ground.problem, budget, base, self.ground.seed + 1)
            found = Tuning(tuner, task, self.ground.title, self._state(key)).run()
            facts = {"tuner": name, "calls": budget, "solver": found.solver, **found.figures}
            self.log.add(key, facts | self.ground.figures(found.sampler()))
        return self.log.row(key)

    def _gain(self, row: Mapping[str, Any], cells: Sequence[Cell]) -> dict[str, Any]:
        """Return the row of a tuned schedule beside the untuned solver with the least mean error at as many calls."""
        best = min(comparable(cells, row["calls"]), key=mean_error)
        gain = torch.tensor(best.figures["items"]) - torch.tensor(row["items"])
        return {
            **{name: row[name] for name in ("tuner", "calls", "solver", "loss_before", "loss_after")},
            "mean error": float(torch.tensor(row["items"]).mean()),
            "best untuned": f"{best.method} {best.preset}",
            "its mean error": mean_error(best),
            "gain": float(gain.mean()),
            "gain ±": float(gain.std() / len(gain) ** 0.5),
        }

    def _base(self, cells: Sequence[Cell], budget: int) -> str:
        """Return the solver with the least mean error among those whose times can be tuned, as published."""
        fits = self._tunable(budget)
        own = [cell for cell in comparable(cells, budget) if cell.preset == "paper" and cell.method in fits]
        if not own:
            raise ValueError(f"none of {', '.join(fits)} has a mean error at {budget} calls, so none can be tuned")
        return min(own, key=mean_error).method

    def _tunable(self, budget: int) -> set[str]:
        """Return the solvers whose times can be tuned; ValueError where there is none."""
        found = {v.method: v.sampler for v in variants(self.plan.names, [budget], every_preset=False, kind="solvers")}
        fits = {name for name, sampler in found.items() if tunable(sampler)}
        if not fits:
            raise ValueError(f"none of {', '.join(self.plan.names)} has times that can be tuned: leave the tuners out")
        return fits

    def _key(self, budget: int, method: str, preset: str) -> str:
        return f"{self.ground.title}|{method}|{preset}|{budget}"

    def _state(self, key: str) -> Path | None:
        """Return where the state of a tuning is kept, beside the log."""
        name = hashlib.sha256(f"{self.log.mark}|{key}".encode()).hexdigest()[:16]
        return None if self.log.path is None else self.log.path.with_suffix(f".{name}")


def comparable(cells: Sequence[Cell], budget: int) -> list[Cell]:
    """Return the untuned cells of a budget whose samples can be compared one by one with the truth."""
    return [c for c in cells if c.budget == budget and "tuner" not in c.figures and ERROR in c.figures]


def mean_error(cell: Cell) -> float:
    """Return the mean over samples of the root mean square over coordinates, which is what tuners minimise."""
    return float(torch.tensor(cell.figures["items"]).mean())


def tunable(sampler: Sampler) -> bool:
    """Return whether every item may have its own times, as GGDM needs, at one call per step.

    The coefficients of DPM-Solver-v3 belong to coordinates instead.
    """
    single = isinstance(sampler, MultistepSolver) and sampler.nfe == sampler.steps
    return single and not isinstance(sampler, DPMSolverV3)


def statistics_of(ground: Ground, count: int) -> Statistics:
    """Return the statistics of a prior from `count` paths of its flow, whose noise is not that of the samples."""
    ends = ground.problem.schedule.ratio(torch.ones((), dtype=torch.float64)), torch.tensor(LOWEST, dtype=torch.float64)
    first, last = (-end.log() for end in ends)
    log_snr = first + torch.linspace(0, 1, LEVELS, dtype=torch.float64) * (last - first)
    noise = Noise.spawn([ground.seed + 2], range(count), ground.problem.likelihood.dtype)
    return estimate(ground.problem.expand(count), log_snr, noise)


def pivot(cells: Sequence[Cell], measure: str) -> list[dict[str, Any]]:
    """Return one row per solver and preset with a measure of each run in the column of its budget."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for budget, method, preset, figures in cells:
        row = rows.setdefault((method, preset), {"method": method, "preset": preset})
        if "remark" in figures:
            row["remark"] = figures["remark"]
        else:
            row[f"{budget} calls"] = figures.get(measure)
    return list(rows.values())
