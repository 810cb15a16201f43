"""Samplers of a density as the benchmark trains them, with every call of the network and of the target counted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from fewstep.core.density import Bounds, TargetDensity
from fewstep.core.files import write_bytes
from fewstep.core.noise import Noise, mix
from fewstep.core.registry import get
from fewstep.densities.base import DensitySampler, load_density_sampler
from fewstep.densities.distill import OPTIONS, distill
from fewstep.densities.draws import Draws
from fewstep.densities.fit import FitOptions, fit, options_for
from fewstep.densities.laplace import laplace
from fewstep.densities.mcmc.hamiltonian import Hamiltonian
from fewstep.densities.mcmc.replica_exchange import ReplicaExchange
from fewstep.densities.mcmc.sequential import SequentialMonteCarlo
from fewstep.densities.mixtures import fit_mixture
from fewstep.densities.students.cdds import CDDS
from fewstep.densities.teachers._base import Teacher
from fewstep.densities.whitened import whiten
from fewstep.priors.exact import MixturePrior


@dataclass(frozen=True)
class Setup:
    """How samplers are trained.

    Attributes:
        train_steps: optimiser steps of teachers and of samplers that are trained from scratch; each one's own where it is None.
        batch: their paths per step, likewise.
        path_steps: steps of these paths, a power of two, likewise.
        distill_steps: optimiser steps of students.
        rows: trajectories of the teacher that students learn from.
        draws: of replica exchange, for teachers that are fitted to draws.
        components: of the mixture that is fitted to them.
        polish: optimiser steps of students on their exact weights; those of `CDDS` where it is None.
    """

    train_steps: int | None = None
    batch: int | None = None
    path_steps: int | None = None
    distill_steps: int = 8000
    rows: int = 32_768
    draws: int = 8192
    components: int = 64
    polish: int | None = None

    @property
    def student(self) -> CDDS:
        """How students are distilled by our recipe."""
        method = CDDS(rows=self.rows)
        return method if self.polish is None else replace(method, polish=self.polish)

    def options(self, teacher: Teacher) -> FitOptions:
        """Return how `teacher` is trained."""
        return options_for(teacher, train_steps=self.train_steps, batch=self.batch)

    @property
    def paths(self) -> dict[str, Any]:
        """Fields of teachers that simulate paths, as far as they are given."""
        return {} if self.path_steps is None else {"steps": self.path_steps}


@dataclass
class Counted(TargetDensity):
    """A density that counts its calls, one per point.

    Attributes:
        inner: the density.
        calls: of log_prob.
        gradients: of score.
    """

    inner: TargetDensity
    calls: int = 0
    gradients: int = 0

    @property
    def dim(self) -> int:  # type: ignore[override]
        """See `TargetDensity`."""
        return self.inner.dim

    @property
    def support(self) -> tuple[Tensor | float, Tensor | float] | None:  # type: ignore[override]
        """See `TargetDensity`."""
        return self.inner.support

    @property
    def log_z(self) -> float | None:  # type: ignore[override]
        """See `TargetDensity`."""
        return self.inner.log_z

    @property
    def log_z_bounds(self) -> Bounds | None:  # type: ignore[override]
        """See `TargetDensity`."""
        return self.inner.log_z_bounds

    def log_prob(self, x: Tensor) -> Tensor:
        """See `TargetDensity`."""
        self.calls += len(x)
        return self.inner.log_prob(x)

    def score(self, x: Tensor) -> Tensor:
        """See `TargetDensity`."""
        self.gradients += len(x)
        return self.inner.score(x)

    def sample(self, noise: Noise) -> Tensor:
        """See `TargetDensity`."""
        return self.inner.sample(noise)


@dataclass(frozen=True)
class Budget:
    """What a training has taken: calls of networks, of log rho and of its gradient, one per point, and processor seconds."""

    network: int = 0
    target: int = 0
    gradient: int = 0
    seconds: float = 0.0

    def __add__(self, other: Budget) -> Budget:
        return Budget(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def evaluations(self) -> int:
        """Values and gradients of the target together."""
        return self.target + self.gradient

    def drawing(self, draws: Draws) -> Budget:
        """Return the budget with that of the draws added, but for their time."""
        n = len(draws)
        return self + Budget(round(n * draws.nfe), round(n * draws.target_calls), round(n * draws.gradient_calls))


class Trained(NamedTuple):
    """A sampler and all that its training took, that of its teacher included."""

    sampler: DensitySampler
    budget: Budget


@contextmanager
def counted_networks() -> Iterator[list[int]]:
    """Count the rows that go through networks which are built inside, in the one number that is yielded.

    Every network of `densities` has one layer that each of its calls goes through once, `first`.
    """
    calls, watched = [0], [nn.Module()]

    def count(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        calls[0] += given[0].shape[:-1].numel()

    def watch(_: nn.Module, name: str, child: nn.Module | None) -> None:
        if name == "first" and child is not None and child is not watched[-1]:
            watched.append(child)
            child.register_forward_pre_hook(count)

    handle = register_module_module_registration_hook(watch)
    try:
        yield calls
    finally:
        handle.remove()


@dataclass(frozen=True, eq=False)
class Workshop:
    """Trains samplers of one target from one seed, each once, and keeps them in a folder.

    Attributes:
        target: the density.
        setup: how.
        seed: of everything.
        folder: where trained samplers lie.
    """

    target: TargetDensity
    setup: Setup
    seed: int
    folder: Path
    _made: dict[str, Trained] = field(default_factory=dict, repr=False)

    def trained(self, name: str) -> Trained:
        """Return the sampler called `name`, of `METHODS`."""
        if name not in self._made:
            kept = self.folder / name
            if not (kept / "budget.json").exists():
                self._train(name, kept)
            budget = Budget(**json.loads((kept / "budget.json").read_text(encoding="utf-8")))
            self._made[name] = Trained(load_density_sampler(kept, self.target), budget)
        return self._made[name]

    def _train(self, name: str, kept: Path) -> None:
        recipe, counted, before = METHODS[name], Counted(self.target), Budget()
        if recipe.teacher:
            before = self.trained(recipe.teacher).budget
        begin = time.process_time()
        with counted_networks() as calls:
            # read anew, so that it calls the target that counts
            teacher = load_density_sampler(self.folder / recipe.teacher, counted) if recipe.teacher else None
            sampler = recipe.make(self, counted, teacher)
        budget = before + Budget(calls[0], counted.calls, counted.gradients, time.process_time() - begin)
        sampler.save(kept)
        write_bytes(kept / "budget.json", json.dumps(asdict(budget)).encode())


BATCH = OPTIONS.batch  # of students
RUNS = 8  # of sequential Monte Carlo, whose spread is its error
KERNEL = Hamiltonian(4, 0.8, reach=100.0)
EXCHANGE = ReplicaExchange(KERNEL, levels=8, chains=64)


class Recipe(NamedTuple):
    """How a method is trained; `teacher` is the method that its teacher is trained by, empty where it has none.

    `steps` are given where others would make no difference.
    """

    make: Callable[[Workshop, TargetDensity, Any], DensitySampler]
    teacher: str = ""
    steps: Sequence[int] = ()


def from_scratch(name: str, preset: str | None = None) -> Recipe:
    """Return how the method of `fit` called `name` is trained, by its defaults or a preset."""

    def make(shop: Workshop, target: TargetDensity, _: Any) -> DensitySampler:
        setup, kind = shop.setup, get(name, "teachers")
        teacher = kind(**setup.paths) if preset is None else kind.preset(preset, **setup.paths)
        return fit(target, sampler=teacher, options=setup.options(teacher), seed=shop.seed)

    return Recipe(make)


def student_of(name: str, preset: str | None = None) -> Recipe:
    """Return how a student of the method called `name` is trained: our recipe, or a preset of CDDS."""

    def make(shop: Workshop, target: TargetDensity, teacher: Any) -> DensitySampler:
        method = CDDS.preset(preset) if preset else shop.setup.student
        return distill(teacher, method, train_steps=shop.setup.distill_steps, batch=BATCH, seed=shop.seed)

    return Recipe(make, name)


def from_exchange(shop: Workshop, target: TargetDensity, _: Any) -> DensitySampler:
    """Return a student of the mixture that is fitted to draws of replica exchange: no network but its own."""
    setup, method, whitened = shop.setup, shop.setup.student, whiten(target, seed=shop.seed)
    draws = replace(EXCHANGE, thin=2).sample(whitened, setup.draws, seed=mix(shop.seed, 1), dtype=torch.float32)
    fitted = MixturePrior(*fit_mixture(whitened.to_y(draws.x), setup.components, seed=shop.seed))
    return distill(
        fitted, method, target=whitened, train_steps=setup.distill_steps, batch=BATCH, seed=mix(shop.seed, 2)
    )


METHODS: dict[str, Recipe] = {
    **{name: from_scratch(name) for name in ("dis", "lrds", "matched", "scds", "osds")},
    "matched-narrow": from_scratch("matched", "narrow"),
    "matched-modes": from_scratch("matched", "modes"),
    "matched-many": from_scratch("matched", "many"),
    "cdds": student_of("dis"),
    "cdds-paper": student_of("dis", "paper"),
    "cdds-matched": student_of("matched"),
    "cdds-narrow": student_of("matched-narrow", "narrow"),
    "cdds-modes": student_of("matched-modes"),
    "cdds-many": student_of("matched-many", "many"),
    "cdds-exchange": Recipe(from_exchange),
    "laplace": Recipe(lambda shop, target, _: laplace(target), steps=(1,)),
}


def exchange_at(target: TargetDensity, evaluations: int, n: int, seed: int) -> Draws:
    """Return n draws of replica exchange for about so many values and gradients of the target, fewer where it is few steps."""
    whitened = whiten(target, seed=seed)
    one = EXCHANGE
    per_step = 2 * one.levels * one.chains * (KERNEL.leaps + 1)
    steps = max(evaluations // per_step, 2)
    warmup = min(one.warmup, steps // 3)
    length = min(n // one.chains, steps - warmup)
    made = replace(one, warmup=warmup, thin=max((steps - warmup) // length, 1))
    return made.sample(whitened, length * one.chains, seed=seed)


def sequential_at(target: TargetDensity, evaluations: int, n: int, seed: int) -> Draws:
    """Return n weighted draws of sequential Monte Carlo for about so many values and gradients of the target.

    The moves per temperature make up the budget; what one move costs is found by a run that is not counted.
    """
    whitened = whiten(target, seed=seed)
    one = SequentialMonteCarlo(particles=n // RUNS, moves=1)
    probe = one.sample(whitened, n, seed=mix(seed, 3))
    cost = n * (probe.target_calls + probe.gradient_calls)
    return replace(one, moves=max(1, round(evaluations / cost))).sample(whitened, n, seed=seed)
