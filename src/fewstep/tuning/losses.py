"""How far samples are from where they should be, differentiable, and which of the named grids comes nearest."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fewstep.core.grid import GRIDS, times_of
from fewstep.core.multistep import Solver
from fewstep.core.sampler import State
from fewstep.tuning.base import CHUNK, Task

_TINY = 1e-12  # under the root, so that equal samples have a gradient


def energy(x: Tensor, truth: Tensor) -> Tensor:
    """Return the unbiased squared energy distance of two sets of samples, (N, *event) twice -> ().

    Row i of both may hang together, made from the same noise say: pairs are taken between different rows only.
    """
    a, b = x.flatten(1), truth.flatten(1)
    across = 2 * _distances(a, b) - _distances(a, a) - _distances(b, b)
    return (across.sum() - across.diagonal().sum()) / (len(a) * (len(a) - 1))


def paired(x: Tensor, truth: Tensor) -> Tensor:
    """Return the mean over items of the root mean square difference, (N, *event) twice -> ()."""
    return ((x - truth).flatten(1).square().mean(1) + _TINY).sqrt().mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"energy": energy, "paired": paired}


def score(task: Task, solver: Solver, start: Tensor, truth: Tensor, loss: str) -> float:
    """Return the loss of what `solver` makes of `start` against `truth`, (N, *event) each."""
    return float(LOSSES[loss](samples_of(task, solver, start), truth))


def error(task: Task, times: Tensor, start: Tensor, truth: Tensor, loss: str) -> float:
    """Return the loss of the solver of the task on `times`, (steps + 1,), from `start` against `truth`, (N, *event) each."""
    return score(task, task.make(tuple(times.tolist())), start, truth, loss)


@torch.no_grad()
def samples_of(task: Task, solver: Solver, start: Tensor) -> Tensor:
    """Return what `solver` makes of `start`, (N, *event), in chunks."""
    parts = enumerate(start.split(CHUNK))
    return torch.cat([solver.run(task.items(len(x)), task.noise(len(x), 2, i), State(x)) for i, x in parts])


def best_times(
    task: Task, candidates: Iterable[Tensor], start: Tensor, truth: Tensor, loss: str
) -> tuple[Tensor, float]:
    """Return those times among `candidates`, (steps + 1,) each, that give the least loss, and the loss."""
    scored = [(error(task, times, start, truth, loss), times) for times in candidates]
    value, times = min(scored, key=lambda pair: pair[0])
    return times, value


def named_grids(task: Task) -> list[Tensor]:
    """Return the times of all named grids, (steps + 1,) each."""
    return [times_of(name, task.schedule, task.steps) for name in GRIDS]


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Return all lengths |a_i - b_j|, (N, M)."""
    squares = a.square().sum(1)[:, None] - 2 * a @ b.T + b.square().sum(1)
    return (squares.clamp_min(0) + _TINY).sqrt()
