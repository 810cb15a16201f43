"""`fewstep bench densities`: samplers of unnormalised densities by targets, methods and steps, at budgets that are told apart.

Every distance stands beside its value between two sets of exact draws, every log Z beside its interval, every trained sampler
beside Monte Carlo with as many calls of the target.
"""

from __future__ import annotations

import hashlib
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from rich.progress import track

from fewstep import __version__
from fewstep.bench.common import FAILURES, REMARK, Report, failure
from fewstep.bench.density_figures import PUBLISHED, Sizes, Truth
from fewstep.bench.density_published import beside
from fewstep.bench.density_runs import METHODS, Budget, Setup, Workshop, exchange_at, sequential_at
from fewstep.bench.density_speed import speeds
from fewstep.bench.density_tables import EQUAL, costed, ordered, starred, summary, total
from fewstep.bench.log import Log
from fewstep.bench.trials import kept
from fewstep.core.density import TargetDensity
from fewstep.core.noise import mix
from fewstep.densities.base import Transport
from fewstep.densities.draws import Draws
from fewstep.densities.targets import target

Row = Callable[[Workshop], dict[str, Any]]
FILES = {"sonar": "sonar.csv", "ionosphere": "ionosphere.csv", "cox": "pines.csv"}
NOTES = (
    "draws: weights of all draws of a training together; distances of the draws as they are, without weights: the mean over "
    "several sets, each to its own of as many exact draws; in the row of exact draws they are exact too. W1, W2: exact transport; "
    "Sinkhorn: debiased and converged, squared cost; SW: sliced 2-Wasserstein; energy: over all pairs, a row with itself too, so "
    "that it is positive; KSD: where no exact draws exist.",
    f"{PUBLISHED}: as the published tables have it, and only to stand beside them.",
    "weights: unbiased, or none (no log Z can be had). ELBO: mean log w, at most log Z in expectation, left out where a map "
    "was seen to fold; EUBO: the same over exact draws, at least log Z. low, high: 95 % interval of log Z, without an upper end "
    "where k-hat forbids one; covers: whether it holds the truth, open where it has no upper end. folds: draws at which the map has "
    "turned over, whose weights are negative; refused: draws without a valid weight. A value with ± is a mean over seeds with its "
    "95 % interval; log Z and the ends of its interval are then means too. What differs between seeds and is no number stands one "
    "after the other; what some seeds lack says how many have it.",
    "resampled: one-step draws by their weights. then SMC: sequential Monte Carlo in the noise that the one-step map starts "
    "from; its log Z is the corrected one.",
    "coverage: how many of so many further sets of draws have an interval that holds log Z (yes), has no upper end (open) or "
    "misses (no); log Z off: of the mean of Z over the sets of a training.",
    "training: calls of networks, of log rho and of its gradient, one per point, with those of the teacher; core minutes are "
    "processor time of one thread.",
    "equal budget: values and gradients of the target together, those of the one-step sampler's training and of its draws; replica "
    "exchange and SMC get as many, warm-up included. Best in its column: *. Distances below the floor are noise.",
    "laplace: the Gaussian that fits at the mode, which is one linear step. dis, matched: teachers, on grids of so many steps. "
    "matched-narrow, matched-modes: by its presets for narrow parts and for weights of modes. cdds, cdds-matched, cdds-modes: "
    "students of dis, matched and matched-modes by our recipe; cdds-narrow: of matched-narrow by the preset for narrow "
    "parts; matched-many, cdds-many: by the presets for many coordinates with modes of their own; cdds-paper: a student of dis by "
    "the published one; cdds-exchange: the student of a mixture that was fitted to draws of replica exchange.",
    "speed: processor time per sample in one run; iteration / calls: an iteration of training over the bare calls of its networks "
    "(with gradients where training takes them) and of the target.",
)


@dataclass(frozen=True)
class Plan:
    """What is run on every target.

    Attributes:
        methods: names of `METHODS`.
        steps: of samplers that are maps.
        path_steps: of samplers that simulate paths.
        seeds: how many trainings of each.
        repeats: sets of draws per training, whose intervals of log Z are counted.
    """

    methods: Sequence[str]
    steps: Sequence[int]
    path_steps: Sequence[int]
    seeds: int
    repeats: int = 32


def main(  # noqa: PLR0913 - one parameter is one option
    out: str | Path | None = None,
    *,
    targets: Sequence[str] = ("nine_modes", "mw54", "funnel"),
    methods: Sequence[str] = ("dis", "cdds", "cdds-exchange"),
    steps: Sequence[int] = (1, 4),
    path_steps: Sequence[int] = (8, 128),
    seeds: int = 3,
    repeats: int = 32,
    data: Path | None = None,
    train_steps: int | None = None,
    batch: int | None = None,
    simulated: int | None = None,
    distill_steps: int = 8000,
    rows: int = 32_768,
    polish: int | None = None,
    num_samples: int = 4096,
    sets: int = 3,
    transported: int = 1024,
    published: int = 2500,
    speed: bool = True,
    equal: bool = True,
) -> Report:
    """Train and measure, print the tables, write the JSON report to `out` where given, and return it.

    Args:
        out: path of the JSON file; rows and trained samplers are kept beside it, so that the same command goes on where it stopped.
        targets: names of `densities.targets`.
        methods: names of `density_runs.METHODS`; students train their teacher too.
        steps: of samplers that are maps.
        path_steps: of samplers that simulate paths.
        seeds: trainings of each method; with one alone no interval over trainings is given.
        repeats: sets of draws per training, whose intervals of log Z are counted; 0 leaves that table out.
        data: the folder of sonar.csv, ionosphere.csv and pines.csv, for the targets that are read from them.
        train_steps: optimiser steps of teachers and of samplers that are trained from scratch; each one's own where it is None.
        batch: their paths per step, likewise.
        simulated: steps of these paths, likewise.
        distill_steps: optimiser steps of students.
        rows: trajectories that students learn from.
        polish: their last optimiser steps, on exact weights, which cost a Jacobian each; those of `CDDS` where it is None.
        num_samples: draws of a set, a multiple of 256.
        sets: of draws of a training, each beside its own exact one.
        transported: rows of exact and debiased transport.
        published: rows of the published figure.
        speed: whether one step is timed against the teacher at 128 steps, and an iteration against its calls.
        equal: whether Monte Carlo is run with as many calls of the target, which takes about as long as the trainings.

    Raises:
        ValueError: an unknown target or method, no seeds or sets, repeats below 0, or a number of draws that does not divide.
    """
    check(methods, seeds, num_samples, sets, repeats)
    setup = Setup(train_steps, batch, simulated, distill_steps, rows, polish=polish)
    plan, sizes = Plan(methods, steps, path_steps, seeds, repeats), Sizes(transported, published, num_samples, sets)
    path = None if out is None else Path(out).with_suffix(".jsonl")
    tables: dict[str, list[dict[str, Any]]] = {}
    densities = {name: known(name, data) for name in targets}  # all, before the first is run
    for name, density in densities.items():
        log = Log(path, mark(name, setup, sizes))
        tables |= Bench(name, density, setup, plan, sizes, log).tables(speed, equal)
    given = {
        **asdict(setup),
        **asdict(plan),
        **asdict(sizes),
        "targets": targets,
        "data": data,
        "speed": speed,
        "equal": equal,
    }
    return Report("densities", given, tables, NOTES).finish(out)


def check(methods: Sequence[str], seeds: int, num_samples: int, sets: int, repeats: int) -> None:
    """Raise ValueError for what could not be run."""
    for name in methods:
        if name not in METHODS:
            raise ValueError(f"unknown method {name!r}; choose some of {', '.join(METHODS)}")
    if seeds < 1 or num_samples < 256 or num_samples % 256:
        raise ValueError(f"needs a seed and a multiple of 256 draws, got {seeds} and {num_samples}")
    if sets < 1:
        raise ValueError(f"needs a set of draws, got {sets}")
    if repeats < 0:
        raise ValueError(f"repeats must not be negative, got {repeats}")


def known(name: str, data: Path | None) -> TargetDensity:
    """Return the target called `name`, with its file in the folder `data` where it is read from one."""
    if name in FILES and data is None:
        raise ValueError(f"{name} is read from {FILES[name]}: give its folder as --data")
    return target(name, **({"data": data / FILES[name]} if name in FILES and data is not None else {}))


def mark(name: str, *given: Any) -> str:
    """Return a hash of what rows of a target depend on, the version that made them among it."""
    return hashlib.sha256(repr((__version__, name, *given)).encode()).hexdigest()[:16]


class Bench:
    """All rows of one target."""

    def __init__(self, name: str, density: TargetDensity, setup: Setup, plan: Plan, sizes: Sizes, log: Log) -> None:
        self.name, self.density, self.plan, self.log = name, density, plan, log
        self.truth = Truth(density, sizes)
        self._scratch = tempfile.TemporaryDirectory()  # lives as long as this object; nothing is kept without `out`
        home = Path(self._scratch.name) if log.path is None else log.path.with_suffix(".fits")
        folder = home / f"{name}-{mark(name, setup)}"  # more draws need no other training
        self.shops = [Workshop(density, setup, seed, folder / str(seed)) for seed in range(plan.seeds)]

    def tables(self, speed: bool, equal: bool) -> dict[str, list[dict[str, Any]]]:
        """Return the tables of the target by title; those without rows are left out."""
        drawn = ordered(list(self.drawn()))
        ours = {" ".join(str(row[k]) for k in ("method", "steps") if row[k]): row for row in drawn}
        found = {
            "draws": drawn,
            "coverage": list(self.covering()) if self.plan.repeats else [],
            "training": list(self.training()),
            "equal budget": list(self.equal()) if equal else [],
            "published figures": beside(self.name, self._few(ours)),
            "speed": list(self.timed()) if speed else [],
        }
        return {f"{self.name}: {title}": rows for title, rows in found.items() if rows}

    def drawn(self) -> Iterator[dict[str, Any]]:
        """Yield the row of exact draws and those of all methods at all steps, maps at one step with their correction."""
        first = {"method": "exact draws" if self.truth.exact else "SMC reference", "steps": None}
        yield first | kept(self.log, "floor", self.truth.floors)
        for name in track(self.plan.methods, self.name, transient=True):
            for steps in self._steps(name):
                found = self._over_seeds(f"{name} {steps}", name, self._row(name, steps))
                yield {"method": name, "steps": steps} | found
            if self._maps(name):
                resampled = self._over_seeds(f"{name} resampled", name, self._resampled(name))
                yield {"method": f"{name}, resampled", "steps": 1} | resampled
                corrected = self._over_seeds(f"{name} corrected", name, self._corrected(name))
                yield {"method": f"{name}, then SMC", "steps": 1} | corrected

    def covering(self) -> Iterator[dict[str, Any]]:
        """Yield how often the intervals of every method hold log Z; nothing where it is not known or weights do not tell it."""
        if self.truth.log_z is None:
            return
        for name in self.plan.methods:
            if self.shops[0].trained(name).sampler.kind != "unbiased":
                continue
            for steps in self._steps(name):
                key = f"{name} {steps} coverage {self.plan.repeats}"
                counted = self._each(key, name, self._counted(name, steps))
                yield {"method": name, "steps": steps} | total(counted, ["log Z off", REMARK])

    def training(self) -> Iterator[dict[str, Any]]:
        """Yield what every method has cost to train."""
        for name in self.plan.methods:
            parts = [asdict(shop.trained(name).budget) for shop in self.shops]
            row = summary(parts)
            seconds = statistics.mean(part["seconds"] for part in parts)
            yield {
                "method": name,
                **{key: row[key] for key in ("network", "target", "gradient")},
                "core minutes": seconds / 60,
            }

    def equal(self) -> Iterator[dict[str, Any]]:
        """Yield the one-step samplers, each followed by Monte Carlo with as many calls of the target."""
        rivals = {"replica exchange": exchange_at, "SMC": sequential_at}
        for name in filter(self._maps, self.plan.methods):
            rows = [{"method": f"{name}, 1 step"} | self._over_seeds(f"{name} 1", name, self._row(name, 1))]
            rows[0] |= summary([_tried(shop, name, partial(self._spent, name=name)) for shop in self.shops])
            for rival, sample in rivals.items():
                rows.append({"method": rival} | self._over_seeds(f"{rival} as {name}", name, self._rival(name, sample)))
            yield from starred([{key: row.get(key) for key in (*EQUAL, REMARK)} for row in rows])

    def timed(self) -> Iterator[dict[str, Any]]:
        """Yield the times of a sample and of an iteration, of the first seed."""
        for name in self.plan.methods:
            if METHODS[name].teacher:
                timed = partial(_tried, self.shops[0], name, partial(speeds, name=name))
                yield {"method": name} | kept(self.log, f"{name} speed", timed)

    def _row(self, name: str, steps: int) -> Row:
        def row(shop: Workshop) -> dict[str, Any]:
            upper = self.truth.upper_bound(shop.trained(name).sampler, steps)
            return costed(self.truth, self._draws(shop, name, steps)) | upper

        return row

    def _counted(self, name: str, steps: int) -> Row:
        def row(shop: Workshop) -> dict[str, Any]:
            def draw(seed: int) -> Draws:
                return shop.trained(name).sampler.sample(self.truth.sizes.most, steps, seed=mix(shop.seed, seed))

            return self.truth.coverage(draw, self.plan.repeats)

        return row

    def _resampled(self, name: str) -> Row:
        def row(shop: Workshop) -> dict[str, Any]:
            return self.truth.distances(self._draws(shop, name, 1).resample(seed=shop.seed).x)

        return row

    def _corrected(self, name: str) -> Row:
        def row(shop: Workshop) -> dict[str, Any]:
            found = self.truth.corrected(cast(Transport, shop.trained(name).sampler), shop.seed)
            return costed(self.truth, found, found.resample(seed=shop.seed))

        return row

    def _rival(self, name: str, sample: Callable[..., Draws]) -> Row:
        def row(shop: Workshop) -> dict[str, Any]:
            wanted = self._budget(shop, name).evaluations
            found = sample(self.density, wanted, self.truth.sizes.measured, shop.seed)
            used = Budget().drawing(found).evaluations
            even = found if found.kind is None else found.resample(seed=shop.seed)
            return costed(self.truth, found, even) | {"evaluations": used}

        return row

    def _draws(self, shop: Workshop, name: str, steps: int) -> Draws:
        return shop.trained(name).sampler.sample(self.truth.sizes.measured, steps, seed=shop.seed + 1)

    def _budget(self, shop: Workshop, name: str) -> Budget:
        return shop.trained(name).budget.drawing(self._draws(shop, name, 1))

    def _spent(self, shop: Workshop, name: str) -> dict[str, Any]:
        return {"evaluations": self._budget(shop, name).evaluations}

    def _maps(self, name: str) -> bool:
        return isinstance(self.shops[0].trained(name).sampler, Transport)

    def _steps(self, name: str) -> Sequence[int]:
        return METHODS[name].steps or (self.plan.steps if self._maps(name) else self.plan.path_steps)

    def _few(self, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
        """Return the rows that stand beside published figures: exact draws, one step, the most steps."""
        known = (None, 1, max(self.plan.path_steps))
        return {key: row for key, row in rows.items() if row["steps"] in known and "," not in key}

    def _over_seeds(self, key: str, name: str, row: Row) -> dict[str, Any]:
        return summary(self._each(key, name, row))

    def _each(self, key: str, name: str, row: Row) -> list[dict[str, Any]]:
        """Return the row of each seed of a method."""
        return [kept(self.log, f"{key} {shop.seed}", partial(_tried, shop, name, row)) for shop in self.shops]


def _tried(shop: Workshop, name: str, row: Row) -> dict[str, Any]:
    """Return a row of a method, or why its sampler gives none; a training that fails ends the run."""
    shop.trained(name)
    try:
        return row(shop)
    except FAILURES as error:
        return failure(error)
