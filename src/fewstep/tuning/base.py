"""What tuners share: the task, rounds that can be interrupted, and the times as numbers without constraints."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from fewstep.core.files import write_bytes
from fewstep.core.grid import lowest_ratio
from fewstep.core.multistep import MultistepSolver, Solver
from fewstep.core.noise import Noise, mix
from fewstep.core.problem import Posterior
from fewstep.core.reference import Reference
from fewstep.core.registry import get
from fewstep.core.schedule import Schedule
from fewstep.tuning.schedule_file import TunedSchedule

State = dict[str, Tensor]
Report = Callable[[int, int], None]  # (rounds done, rounds in all)
FINE = 100  # steps of the reference that stands for the exact probability flow
CHUNK = 64  # items that go through the network at once
GAP = 0.02  # least difference of neighbouring log ratios


@dataclass(frozen=True)
class Task:
    """What is tuned for.

    Attributes:
        problem: the prior with a `FlatLikelihood` of one item, which says shape, dtype and device.
        steps: steps of the schedule.
        solver: name of the solver that it is for.
        seed: of everything drawn.

    Raises:
        ValueError: an unknown solver, or one that is no table of coefficients.
    """

    problem: Posterior
    steps: int
    solver: str = "dpmpp"
    seed: int = 0

    def __post_init__(self) -> None:
        kind = get(self.solver, "solvers")
        if not issubclass(kind, MultistepSolver):
            raise ValueError(f"{self.solver} is no multistep solver, and its times are not tuned here")

    @property
    def schedule(self) -> Schedule:
        """The schedule of the prior."""
        return self.problem.schedule

    def noise(self, count: int, *words: int) -> Noise:
        """Return `count` streams that depend on the seed and on `words`."""
        likelihood = self.problem.likelihood
        seeds = [mix(self.seed, *words, item) for item in range(count)]
        return Noise(seeds, likelihood.dtype, likelihood.device)

    def make(self, times: tuple[float, ...] | str, steps: int | None = None, **settings: Any) -> MultistepSolver:
        """Return the solver on given times."""
        return cast(MultistepSolver, get(self.solver, "solvers")(steps=steps or self.steps, grid=times, **settings))

    @torch.no_grad()
    def draw(self, solver: Solver, count: int, *words: int) -> tuple[Tensor, Tensor]:
        """Return starts at t = 1 and the samples that `solver` makes of them, (count, *event) each."""
        starts, samples = [], []
        for part in range(0, count, CHUNK):
            size = min(CHUNK, count - part)
            items, noise = self.items(size), self.noise(size, part, *words)
            state = solver.init(items, noise)
            starts.append(state.x)
            samples.append(solver.run(items, noise, state))
        return torch.cat(starts), torch.cat(samples)

    def items(self, count: int) -> Posterior:
        """Return the problem of `count` items."""
        return self.problem.expand(count)


def reference(task: Task, count: int, steps: int = FINE, *words: int) -> tuple[Tensor, Tensor]:
    """Return starts and where the probability flow leads them by `steps` steps of DPM-Solver++, (count, *event) each."""
    return task.draw(replace(task, solver="dpmpp").make("log_snr", steps), count, *words)


class Tuner(ABC):
    """A method that finds a schedule in rounds. Final subclasses are frozen dataclasses, one file each.

    A round depends on the state and on (seed, round) only, so that a tuning that was stopped and resumed ends like one that
    was not.

    Attributes:
        reference: the publication.
    """

    rounds: int
    reference: ClassVar[Reference]

    @abstractmethod
    def init(self, task: Task) -> State:
        """Return the state before the first round."""

    @abstractmethod
    def step(self, task: Task, state: State, k: int) -> State:
        """Return the state after round k = 0, ..., rounds - 1."""

    @abstractmethod
    def result(self, task: Task, state: State, prior: str) -> TunedSchedule:
        """Return the schedule that the state stands for; `prior` is noted in it."""


@dataclass(frozen=True)
class Tuning:
    """A tuner at work on a task, with its state on disk after every round.

    Attributes:
        tuner: the method.
        task: what for.
        prior: name of the prior.
        state: file of the state, read where it is there and belongs to the same tuning; None keeps nothing.
    """

    tuner: Tuner
    task: Task
    prior: str
    state: Path | None = field(default=None)

    def run(self, report: Report | None = None) -> TunedSchedule:
        """Return the schedule; the file of the state is removed at the end.

        Raises:
            ValueError: the file of the state belongs to another tuning, or cannot be read.
        """
        done, state = self._resume()
        for k in range(done, self.tuner.rounds):
            state = self.tuner.step(self.task, state, k)
            self._keep(k + 1, state)
            if report is not None:
                report(k + 1, self.tuner.rounds)
        found = self.tuner.result(self.task, state, self.prior)
        if self.state is not None:
            self.state.unlink(missing_ok=True)
        return found

    def _facts(self) -> str:
        task = {"steps": self.task.steps, "solver": self.task.solver, "seed": self.task.seed, "prior": self.prior}
        settings = asdict(self.tuner)  # type: ignore[call-overload]
        shape = list(self.task.problem.likelihood.event_shape)
        facts = {"method": type(self.tuner).__name__, "settings": settings, **task, "shape": shape}
        return json.dumps({**facts, "cond": {k: str(v) for k, v in self.task.problem.cond.items()}})

    def _keep(self, done: int, state: State) -> None:
        if self.state is None:
            return
        self.state.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        moved = " ".join(name for name, value in state.items() if value.device.type != "cpu")
        write_bytes(self.state, save(tensors, metadata={"done": str(done), "facts": self._facts(), "moved": moved}))

    def _resume(self) -> tuple[int, State]:
        if self.state is None or not self.state.is_file():
            return 0, self.tuner.init(self.task)
        try:
            with safe_open(self.state, "pt") as file:
                header = file.metadata() or {}
            tensors = load_file(self.state)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.state} cannot be read ({error}); remove it to begin anew") from None
        if header.get("facts") != self._facts():
            raise ValueError(f"{self.state} belongs to a tuning with other settings; remove it to begin anew")
        device, moved = self.task.problem.likelihood.device, header.get("moved", "").split()
        return int(header["done"]), {n: v.to(device) if n in moved else v for n, v in tensors.items()}


def times_from(schedule: Schedule, ratios: Tensor) -> Tensor:
    """Return the times of falling positive ratios with 0 appended, (steps + 1,), differentiable in all but the first.

    What is below the schedule's smallest ratio is raised to it, and to `GAP` above the next.
    """
    apart = GAP * torch.arange(len(ratios) - 2, -1, -1, dtype=torch.float64)
    inner = schedule.time(torch.maximum(ratios[1:], lowest_ratio(schedule) * apart.exp()))
    return torch.cat([torch.ones_like(ratios[:1]), inner, torch.zeros_like(ratios[:1])])
